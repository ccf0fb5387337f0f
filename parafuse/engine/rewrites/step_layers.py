"""Which layers of a denoiser depend on the step alone, told by following the values of one plain call; and how they are
run for other steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from parafuse.engine.rewrites.flow import Flow, Slice
from parafuse.engine.rewrites.rewrite import bare
from parafuse.engine.rewrites.rows import RowLinear
from parafuse.errors import is_out_of_memory
from parafuse.parallel.traced import casts

EXACT = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Of the largest value: how far a row may be from what the layer gave, which multiplies in another order."""


@dataclass(eq=False)
class Learned:
    """What is known of calls of one structure."""

    spec: TreeSpec
    facts: tuple[Any, ...]
    """Of all leaves, without shapes where they do not matter."""
    layers: list[nn.Linear]
    like: dict[nn.Linear, Tensor]
    """The results of the call that was followed."""
    slice: Slice
    uses: frozenset[int]
    """Leaves that they depend on, the timestep among them."""
    times: tuple[int, ...]
    """Leaf numbers of the timestep; models of several streams take it several times."""
    most_rows: int
    """Tokens of all samples, as the longest input of a linear layer."""
    proven: set[Any] = field(default_factory=set[Any])
    """Shapes of all leaves at which the layers gave what the slice gives."""

    def fits(self, leaves: list[Any], spec: TreeSpec) -> bool:
        """Whether such a call runs the same operators, as far as its arguments tell."""
        return self.spec == spec and self.facts == facts_of(leaves, self.uses)

    def of_all_steps(self, held: dict[int, Tensor], times_N: Tensor, leaves: list[Any]) -> dict[nn.Linear, Tensor]:
        """Layer -> (N, ...) its results for these timesteps: one product for each layer, or one for each step where an
        operator cannot be run for several."""

        def at(time: Tensor) -> tuple[Tensor, ...]:
            given = {i: time.to(leaves[i].dtype).expand(leaves[i].shape) for i in self.times}
            return tuple(self.slice({**held, **given}))

        with torch.inference_mode(False), torch.no_grad(), self.slice.weights():
            try:
                found = torch.func.vmap(at)(times_N)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                found = tuple(torch.stack(each) for each in zip(*map(at, times_N.unbind(0)), strict=True))
        return dict(zip(self.layers, found, strict=True))


def followed(module: nn.Module, leaves: list[Any], spec: TreeSpec, flow: Flow) -> tuple[dict[nn.Linear, Tensor], int]:
    """One plain call on this rank: the results of layers that were called once, with a vector for each sample, and the
    rows of the longest input of a layer."""
    results: dict[nn.Linear, list[Tensor | None]] = {}
    most_rows = 0

    def note_result(layer: Any, args: Any, out: Any) -> None:
        nonlocal most_rows
        x = args[0] if args else None
        is_vector = isinstance(x, Tensor) and (x.ndim <= 2 or (x.ndim == 3 and x.shape[1] == 1))
        results.setdefault(layer, []).append(out if is_vector else None)
        most_rows = max(most_rows, x.shape[:-1].numel() if isinstance(x, Tensor) else 0)

    plain = [part for part in module.modules() if type(part) in (nn.Linear, RowLinear)]
    hooks = [part.register_forward_hook(note_result) for part in plain]
    try:
        args, kwargs = tree_unflatten(leaves, spec)
        with bare(module) as forward, torch.no_grad(), flow:
            forward(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    once = {layer: found[0] for layer, found in results.items() if len(found) == 1}
    return {layer: found for layer, found in once.items() if isinstance(layer, nn.Linear) and found is not None}, (
        most_rows
    )


def facts_of(leaves: list[Any], uses: frozenset[int]) -> tuple[Any, ...]:
    """What of the arguments decides which operators run: the values of those that are no tensors, and of tensors that
    the layers depend on, the shapes."""
    return casts() + tuple(
        (i in uses and x.shape, x.dtype, x.device, x.shape[:1])
        if isinstance(x, Tensor)
        else x
        if isinstance(x, (bool, int, float, str, type(None)))
        else type(x).__name__
        for i, x in enumerate(leaves)
    )


def shapes_of(leaves: list[Any]) -> Any:
    return tuple(x.shape if isinstance(x, Tensor) else None for x in leaves)


def is_close(found: Tensor, want: Tensor) -> bool:
    error = (found.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
    return bool(error <= EXACT.get(want.dtype, 1e-5))
