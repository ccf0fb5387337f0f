"""The phases of a request, met at the components: encode, denoise, decode. What a component gives leaves it as a real
tensor, so that the pipeline's own code goes on as with values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from parafuse.engine.memory.fake_pipeline import components
from parafuse.engine.memory.ledger import ACTIVATIONS, Ledger
from parafuse.engine.targets import DENOISERS
from parafuse.parallel.hooks import Forward, override
from parafuse.parallel.placeholder import settled

ENCODE, DENOISE, DECODE = "encode", "denoise", "decode"
Leave = Callable[[list[Any]], Any]
MOST_NOISE = 1 << 24
"""Values of a result that are drawn."""
PHASES = (ENCODE, DENOISE, DECODE)


def boundaries(pipeline: Any) -> list[tuple[str, nn.Module, str, str]]:
    """(component, module, method, phase) of everything that a pipeline calls its components by."""
    found: list[tuple[str, nn.Module, str, str]] = []
    for name, module in components(pipeline).items():
        phase = DENOISE if name in DENOISERS else ENCODE
        found.append((name, module, "forward", phase))
        if name not in DENOISERS:
            found += [(name, module, method, by) for method, by in _METHODS.items() if hasattr(module, method)]
    return found


_METHODS = {"encode": ENCODE, "decode": DECODE}


@contextmanager
def met(pipeline: Any, enter: Callable[[str, str], Leave]) -> Iterator[None]:
    """Inside, `enter(component, phase)` is told of each call of a component, and what it returns is given the result,
    in a list from which it takes it, so that nothing else holds it.

    Stands on instances, outside of what parafuse has put there, and is gone afterwards."""
    undo: list[Callable[[], None]] = []
    depth = 0

    def watched(original: Forward, name: str, phase: str) -> Forward:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth:  # a component that calls itself by another name, as VAEs do
                return original(*args, **kwargs)
            leave = enter(name, phase)
            depth += 1
            results: list[Any] = []
            try:
                results.append(original(*args, **kwargs))
            finally:
                depth -= 1
            return leave(results)

        return call

    try:
        for name, module, method, phase in boundaries(pipeline):
            undo.append(override(module, method, watched(getattr(module, method), name, phase)))
        yield
    finally:
        for back in reversed(undo):
            back()


def counting(ledger: Ledger) -> Callable[[str, str], Leave]:
    """For `met`: phases and components as the ledger has them, and results as real tensors of zeros."""

    def enter(name: str, phase: str) -> Leave:
        before = ledger.kind, ledger.module
        ledger.kind, ledger.module = ACTIVATIONS, name
        ledger.enter(phase)

        def leave(results: list[Any]) -> Any:
            leaves, spec = tree_flatten(settled(results.pop()))
            ledger.kind, ledger.module = before
            return tree_unflatten(_real(leaves, ledger), spec)

        return leave

    return enter


def _real(leaves: list[Any], ledger: Ledger) -> list[Any]:
    """Fake tensors as real ones; views stay views."""
    made: dict[int, Tensor] = {}
    for number, x in enumerate(leaves):
        if not isinstance(x, FakeTensor):
            continue
        leaves[number] = None
        storage = x.untyped_storage()
        if storage._cdata not in made:
            made[storage._cdata] = _values(max(1, storage.nbytes() // x.itemsize), x.dtype)
        del storage
        whole = made[x.untyped_storage()._cdata]
        leaves[number] = torch.as_strided(whole, x.size(), x.stride(), x.storage_offset())
    for whole in made.values():
        ledger.adopt(whole)
    return leaves


def _values(number: int, dtype: torch.dtype) -> Tensor:
    """So many values, noise where they are numbers with fractions, so that what is made of them differs from step to
    step; large ones are zeros, in memory that is taken when it is written to."""
    if not dtype.is_floating_point or number > MOST_NOISE:
        return torch.from_numpy(np.zeros(number * dtype.itemsize, dtype=np.uint8)).view(dtype)
    noise = torch.from_numpy(np.random.default_rng(number).standard_normal(number, dtype=np.float32))
    return noise if dtype == torch.float32 else noise.to(dtype)
