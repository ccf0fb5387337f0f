"""Calls on fake tensors that were made before with arguments of the same shapes: counted again, not made again.

A tiled decode calls the decoder and blends edges for hundreds of tiles, column by column; they have a few shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from parafuse.engine.memory.fake_pipeline import components
from parafuse.engine.memory.ledger import Ledger, Span
from parafuse.engine.targets import AUTOENCODERS
from parafuse.parallel.hooks import override

CODERS = ("encoder", "decoder")
"""Parts of an autoencoder that are called for each tile. Pure, where they are given tensors and plain values alone."""
BLENDS = ("blend_v", "blend_h", "blend_t")
"""Methods of an autoencoder that change the second tensor of two that they are given, and return it."""
PLAIN = (int, float, bool, str, type(None))


@contextmanager
def repeats(pipeline: Any, ledger: Ledger) -> Iterator[Counter[str]]:
    """Inside, an autoencoder's work on tiles is run once for each shape; how often each coder was called is told.
    Stands on instances; gone afterwards."""
    undo: list[Callable[[], None]] = []
    calls: Counter[str] = Counter()
    try:
        for name, module in components(pipeline).items():
            if name in AUTOENCODERS:
                undo += [_stand(module, method, ledger) for method in BLENDS if hasattr(module, method)]
                for coder in CODERS:
                    part = getattr(module, coder, None)
                    if isinstance(part, nn.Module):
                        undo.append(_counted(part, coder, calls))
                        undo.append(_stand(part, "forward", ledger))
        yield calls
    finally:
        for back in reversed(undo):
            back()


@dataclass
class _Met:
    """A call that was made."""

    span: Span
    result: int | tuple[Any, ...]
    """Which of the arguments it returned, or size, stride and dtype of a new tensor."""


def _stand(module: nn.Module, method: str, ledger: Ledger) -> Callable[[], None]:
    original, met = getattr(module, method), dict[Any, _Met]()

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if not all(isinstance(x, (Tensor, *PLAIN)) for x in given):
            return original(*args, **kwargs)
        key = (tuple(kwargs), *(_shape(x) if isinstance(x, Tensor) else x for x in given))
        if key in met:
            ledger.again(met[key].span)
            result = met[key].result
            return given[result] if isinstance(result, int) else ledger.fake(*result)
        with ledger.span() as span:
            result = original(*args, **kwargs)
        told = _told(result, given)
        if told is not None:
            met[key] = _Met(span, told)
        return result

    return override(module, method, call)


def _counted(part: nn.Module, name: str, calls: Counter[str]) -> Callable[[], None]:
    def before(*_: Any) -> None:
        calls[name] += 1

    return part.register_forward_pre_hook(before).remove


def _shape(x: Tensor) -> tuple[Any, ...]:
    return x.size(), x.stride(), x.dtype


def _told(result: Any, given: list[Any]) -> int | tuple[Any, ...] | None:
    """What was returned; None for what cannot be made again from that: a view of an argument, several tensors."""
    if not isinstance(result, FakeTensor):
        return None
    same = next((place for place, x in enumerate(given) if x is result), None)
    if same is not None:
        return same
    storage = result.untyped_storage()
    shared = any(isinstance(x, Tensor) and x.untyped_storage()._cdata == storage._cdata for x in given)
    return None if shared or storage.nbytes() != result.nbytes else _shape(result)
