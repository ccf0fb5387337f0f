"""How long the parts of a request take: text, denoising, VAE. Each by the device's own events where it has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from parafuse.engine.targets import DECODERS, DENOISERS
from parafuse.launch.bench.clock import Instant, now, seconds_between
from parafuse.parallel.hooks import override

TEXT, DENOISING, VAE = "text", "denoising", "VAE"
PART_OF = dict.fromkeys(DENOISERS, DENOISING) | dict.fromkeys(DECODERS, VAE)
"""Component -> part; all other modules are encoders of what is asked for: text."""


class PartClock:
    """Stands on the modules of one pipeline, by torch's own hooks, until `remove`."""

    def __init__(self, pipeline: Any, device: torch.device):
        self._device = device
        self._calls: dict[str, list[tuple[Instant, Instant]]] = {}
        self._begun: list[Instant] = []
        self._undo: list[Callable[[], None]] = []
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self._watch(part, PART_OF.get(name, TEXT))

    @property
    def first_step(self) -> Instant | None:
        """When the first call of a denoiser began."""
        calls = self._calls.get(DENOISING)
        return calls[0][0] if calls else None

    def forget(self) -> None:
        """Begins another request."""
        self._calls.clear()
        self._begun.clear()

    def seconds(self) -> dict[str, float]:
        """Part -> seconds. The device must have come to its end. Denoising is from its first call to its last, with the
        scheduler between."""
        found = {part: sum(seconds_between(*call) for call in calls) for part, calls in self._calls.items()}
        if DENOISING in found:
            calls = self._calls[DENOISING]
            found[DENOISING] = seconds_between(calls[0][0], calls[-1][1])
        return found

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _watch(self, module: nn.Module, part: str) -> None:
        hooks = [
            module.register_forward_pre_hook(lambda *_: self._begun.append(now(self._device))),
            module.register_forward_hook(lambda *_: self._end(part)),
        ]
        self._undo += [hook.remove for hook in hooks]
        for name in ("encode", "decode") if part == VAE else ():
            method = getattr(module, name, None)
            if method is not None:
                self._undo.append(override(module, name, partial(self._timed, method, part)))

    def _timed(self, method: Callable[..., Any], part: str, *args: Any, **kwargs: Any) -> Any:
        self._begun.append(now(self._device))
        try:
            return method(*args, **kwargs)
        finally:
            self._end(part)

    def _end(self, part: str) -> None:
        begun = self._begun.pop()
        if not self._begun:  # a part within a part is in that one's time
            self._calls.setdefault(part, []).append((begun, now(self._device)))
