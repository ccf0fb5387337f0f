"""The noise of one replica: what a single generator draws for the whole batch, on every replica, and this one's rows of
it, at the start and at every stochastic step. Pictures that are given may be encoded with noise, one for all or one for
each: then the whole call is rehearsed up to the denoiser, which shows what it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parafuse.engine.replicas import PICTURES, Share
from parafuse.parallel.hooks import Forward, override_forward

Sizes = tuple[int, ...]
Paint = Callable[[dict[str, Any]], Any]
"""The pipeline's call with these keywords."""


class Draws(TorchFunctionMode):
    """Hands every draw of normal noise from one generator to `draw(sizes, other keywords)` while it is entered."""

    def __init__(self, generator: torch.Generator, draw: Callable[[Sizes, dict[str, Any]], Tensor]):
        super().__init__()
        self.generator, self.draw = generator, draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn or kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        sizes = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
        return self.draw(tuple(sizes), {key: value for key, value in kwargs.items() if key != "size"})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Not on the way of every function, as inside of the denoiser, which draws no noise."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()


class SharedNoise:
    """Draws the whole batch's noise and gives the rows of one replica."""

    def __init__(self, share: Share, rehearsed: list[Sizes]):
        self.share, self._rehearsed = share, list(rehearsed)

    def draw(self, sizes: Sizes, rest: dict[str, Any]) -> Tensor:
        share = self.share
        if self._rehearsed:
            whole = self._rehearsed.pop(0)
        else:
            whole = (share.total, *sizes[1:]) if sizes[:1] == (share.count,) else sizes
        noise = torch.randn(whole, **rest)
        if whole[:1] == (share.total,) and sizes[:1] == (share.count,):
            return noise[share.first : share.last].clone()
        if whole[:1] == (share.prompts,) and share.prompts > 1:
            return noise[share.chosen]
        return noise


class _Rehearsed(Exception):
    """The denoiser is reached."""


def rehearse(paint: Paint, call: dict[str, Any], denoisers: Sequence[nn.Module]) -> list[Sizes]:
    """Sizes of the draws that the whole call makes before its first denoiser step; none where no picture is given."""
    if not any(call.get(name) is not None for name in PICTURES):
        return []
    generator = torch.Generator(call["generator"].device)
    generator.set_state(call["generator"].get_state())
    found: list[Sizes] = []

    def note(sizes: Sizes, rest: dict[str, Any]) -> Tensor:
        found.append(sizes)
        return torch.randn(sizes, **rest)

    def stop(*_: Any, **__: Any) -> Any:
        raise _Rehearsed

    with ExitStack() as stack, suppress(_Rehearsed), Draws(generator, note):
        for module in denoisers:
            stack.callback(override_forward(module, lambda _: stop))
        paint(call | {"generator": generator})
    return found


@contextmanager
def shared_noise(share: Share, paint: Paint, call: dict[str, Any], denoisers: Sequence[nn.Module]) -> Iterator[None]:
    """While a replica's part of `call` runs: noise of a single generator is that of the whole batch."""
    generator = call.get("generator")
    if not isinstance(generator, torch.Generator) or share.count == share.total:
        yield
        return
    mode = Draws(generator, SharedNoise(share, rehearse(paint, call, denoisers)).draw)

    def pausing(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with mode.paused():
                return original(*args, **kwargs)

        return forward

    with ExitStack() as stack, mode:
        for module in denoisers:
            stack.callback(override_forward(module, pausing))
        yield
