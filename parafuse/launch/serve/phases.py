"""Tells what a pipeline's call is at, by the components that it calls; no pipeline is known by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parafuse.engine.targets import autoencoders, weighty
from parafuse.launch.serve.beats import COMPILING, DECODING, DENOISING, ENCODING, Progress
from parafuse.parallel.hooks import override

MOST_SIZES = 1024


class Phases:
    """Stands on the components of one pipeline from when it is made until `close`, before the engine's own close.

    Put on once and before the first request: what watches components for changes sees none."""

    def __init__(self, pipeline: Any, progress: Progress, *, prepares: bool):
        """`prepares`: whether a denoiser's first call of a size takes longer than others, since it is compiled, or how
        to split it is found out: it has a phase of its own."""
        self._progress, self._prepares = progress, prepares
        self._seen: set[Any] = set()
        self._renewed = progress.renewed
        self._undo = ExitStack()
        denoisers, encoders = weighty(pipeline)
        for _, module in encoders:
            self._hook(module.register_forward_pre_hook(lambda *_: progress.enter(ENCODING)))
        for _, module in denoisers:
            self._hook(module.register_forward_pre_hook(self._denoises, with_kwargs=True))
            self._hook(module.register_forward_hook(self._denoised))
        for _, module in autoencoders(pipeline):
            for method, phase in (("encode", ENCODING), ("decode", DECODING)):
                if callable(getattr(module, method, None)):
                    self._undo.callback(override(module, method, self._entering(getattr(module, method), phase)))

    def close(self) -> None:
        """Takes everything off. Raises RuntimeError where something was put on an autoencoder since."""
        self._undo.close()

    def _hook(self, handle: Any) -> None:
        self._undo.callback(handle.remove)

    def _denoises(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._renewed != self._progress.renewed:
            self._renewed = self._progress.renewed
            self._seen.clear()
        size = (id(module), *(tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
        is_new = self._prepares and size not in self._seen
        if len(self._seen) < MOST_SIZES:
            self._seen.add(size)
        self._progress.enter(COMPILING if is_new else DENOISING)

    def _denoised(self, *_: Any) -> None:
        self._progress.enter(DENOISING)

    def _entering(self, original: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(original)  # with all that others have noted on it
        def method(*args: Any, **kwargs: Any) -> Any:
            self._progress.enter(phase)
            return original(*args, **kwargs)

        return method
