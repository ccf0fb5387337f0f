"""A pipeline with rewrites on several ranks, against plain diffusers."""

from __future__ import annotations

from typing import Any

import parafuse
from parafuse.engine.verify import relative_error
from tests.guided.cells import seeded, tensors
from tests.guided.collect import cases


def painted(
    name: str, rewrites: str, degrees: dict[str, int], prompts: int, cache: str = "", steps: int = 0
) -> tuple[float, list[str]]:
    """(largest error of three requests, what was applied), as one rank sees it. With a cache, against the same cache
    without rewrites."""
    case = cases()[name]
    call = case.call(min(prompts, case.max_prompts)) | ({"num_inference_steps": steps} if steps else {})

    def run(some: str) -> tuple[list[Any], list[str]]:
        config = parafuse.Config(parallel=parafuse.Parallel(**degrees), rewrites=some, cache=cache or None)
        with parafuse.Engine.from_pipeline(case.build(), config) as engine:
            found = [[x.clone() for x in tensors(engine(**seeded(call)))] for _ in range(3)]
            return found, engine.receipt["applied"]

    want = run("")[0] if cache else [tensors(case.build()(**seeded(call)))] * 3
    found, applied = run(rewrites)
    return max(relative_error(x, y) for x, y in zip(found, want, strict=True)), applied
