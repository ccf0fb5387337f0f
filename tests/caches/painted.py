"""What a whole pipeline paints with a cache, and what the cache decided."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

import parafuse
from parafuse.cache import FirstBlockCache
from tests.guided.cells import seeded, tensors
from tests.guided.collect import cases

STEPS = 8
EVERY_STEP: dict[str, Any] = dict(warmup_steps=0, final_steps=0)


class Stopped(Exception):
    """A user's own reason to end a run."""


def stop_at_4(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A callback that ends a run in its fifth step."""
    if step == 4:
        raise Stopped
    return values


def painted(
    name: str, cache: parafuse.Cache | None, degrees: dict[str, int] | None = None, prompts: int = 1, **call: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """(tensors of the output, the receipt's word of the cache) of one of the pipelines with guidance."""
    case = cases()[name]
    given = seeded(case.call(prompts) | {"num_inference_steps": STEPS} | call)
    config = parafuse.Config(cache=cache, parallel=parafuse.Parallel(**(degrees or {})))
    with parafuse.Engine.from_pipeline(case.build(), config) as engine:
        return tensors(engine(**given)), engine.receipt["cache"]


def parting(name: str, prompts: int = 1, **more: Any) -> FirstBlockCache:
    """A threshold that parts the decisions of a pipeline: in the middle of the widest gap of the inner half."""
    _, word = painted(name, FirstBlockCache(0.0, **EVERY_STEP), prompts=prompts)
    changes = sorted(x for calls in word["changes"].values() for call in calls for x in call if x)
    inner = changes[len(changes) // 4 : -len(changes) // 4 or None]
    low, high = max(pairwise(inner), key=lambda pair: pair[1] - pair[0])
    return FirstBlockCache(float(f"{(low + high) / 2:.3g}"), **EVERY_STEP, **more)
