"""A bare model called step by step with a cache on it: what it gave, and what the cache did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import parafuse
from parafuse.engine.caches.memory import Memory
from tests.models import Inputs


@dataclass
class Run:
    """Of one request."""

    outputs: list[Tensor] = field(default_factory=list[Tensor])
    decisions: list[str] = field(default_factory=list[str])
    """By call a letter for each sample."""
    most_bytes: int = 0
    calls: dict[int, dict[int, str]] = field(default_factory=dict[int, dict[int, str]])
    """The same by number of the call and place of the sample."""
    graphs: list[int] = field(default_factory=list[int])
    """Made until the end of each step, where they are counted."""


def later(values: Inputs, step: int) -> Inputs:
    """The inputs of another step: other latents, another timestep."""
    return {
        name: _moved(x, step) if name in ("hidden_states", "sample", "timestep", "cloth") else x
        for name, x in values.items()
    }


def _moved(x: Any, step: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    if not x.is_floating_point() or x.ndim < 2:
        return x - (0.01 * step if x.is_floating_point() else step)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=x.dtype)
    return x + 0.1 * step * noise


def steps_of(
    model: nn.Module, cache: str, branches: list[Inputs], num_steps: int, *,
    parallel: parafuse.Parallel | None = None, move: Callable[[Inputs, int], Inputs] = later,
    graphs: Callable[[], int] | None = None, prepare: Callable[[], None] | None = None,
) -> Run:  # fmt: skip
    """Runs `num_steps` steps of all branches with the cache on, and takes it off. Decisions are those made here."""
    found = Run()
    config = parafuse.Config(cache=cache or None, parallel=parallel or parafuse.Parallel())
    with parafuse.apply(model, config) as handle, torch.no_grad(), handle.request() as memories:
        if prepare:
            prepare()
        for step in range(num_steps):
            given = [move(values, step) for values in branches]
            for name in ("hidden_states", "sample"):  # branches have the same latents, as in a pipeline
                for one in given[1:]:
                    if name in one and one[name].shape == given[0][name].shape:
                        one[name] = given[0][name]
            results = [model(**values) for values in given]
            found.outputs += [tree_leaves(result)[0].clone() for result in results]
            found.graphs.append(graphs() if graphs else 0)
        for memory in memories.values():
            found.decisions, found.most_bytes = letters(memory), memory.most_bytes
    return found


def letters(memory: Memory) -> list[str]:
    """What was decided: by call a letter for each sample."""
    return [
        "".join("s" if one.skipped else "c" for _, one in sorted(samples.items()))
        for _, samples in sorted(memory.decisions.items())
    ]


def painted(name: str, cache: str, degrees: dict[str, int], prompts: int, num_steps: int) -> list[Run]:
    """Two requests of a whole pipeline with guidance: what each gave, and decisions of calls that this rank made."""
    from tests.guided.cells import seeded, tensors
    from tests.guided.collect import cases

    case = cases()[name]
    pipeline, found = case.build(), list[Run]()
    config = parafuse.Config(cache=cache or None, parallel=parafuse.Parallel(**degrees))
    with parafuse.apply(pipeline, config) as handle:
        for _ in range(2):  # in the first one guidance and data parallel learn how to share calls
            call = seeded(case.call(prompts)) | dict(num_inference_steps=num_steps)
            handle.rounds.forget()
            with handle.request() as memories:
                run = Run([x + 0 for x in tensors(pipeline(**call))])
                for memory in memories.values():
                    run.calls = {
                        number: {row: "s" if one.skipped else "c" for row, one in samples.items()}
                        for number, samples in memory.decisions.items()
                    }
            found.append(run)
    return found
