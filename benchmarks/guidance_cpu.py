"""Guidance parallel on two CPU cores: the step of two branches on 2 ranks x 1 thread against 1, FLUX of width 512.

`python -m benchmarks.guidance_cpu`: every round times, one after another in the same processes, a step (the denoiser
with prompt and without, their combination, an Euler step) on one rank (the other one idle), on both at once without any
exchange (the machine's ceiling), and with its branches side by side. Medians of 7 rounds, for pipelines that call the
denoiser twice and for those that stack the branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import parafuse
from benchmarks.scaling_cpu import IMAGE, ROUNDS, model_and_inputs, timed
from benchmarks.two_ranks import Scaling, on_two_ranks

WAYS = ("two calls", "stacked batch")
GOAL, OF_CEILING = 1.9, 0.95
SCALE, STEP = 3.5, 0.05


def step_of(way: str, model: Any, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    """One step of a pipeline that has guidance, as diffusers' pipelines write it."""
    latents, texts = inputs["hidden_states"], [torch.randn_like(inputs["encoder_hidden_states"]) for _ in range(2)]
    rows = {"pooled_projections": 0, "timestep": 0}

    def two_calls() -> Tensor:
        prompt, none = (model(**inputs | {"encoder_hidden_states": text})[0] for text in texts)
        return latents - STEP * (none + SCALE * (prompt - none))

    def stacked() -> Tensor:
        doubled = {name: torch.cat([inputs[name]] * 2) for name in ("hidden_states", *rows)}
        both = model(**inputs | doubled | {"encoder_hidden_states": torch.cat(texts)})[0]
        prompt, none = both.chunk(2)
        return latents - STEP * (none + SCALE * (prompt - none))

    return two_calls if way == "two calls" else stacked


def measure(way: str, rank: int) -> dict[str, Any]:
    model, inputs = model_and_inputs(torch.float32)
    torch.manual_seed(1)
    step = step_of(way, model, inputs)
    samples: dict[str, list[float]] = {"one": [], "two": [], "independent": []}

    def run(**_: Any) -> Tensor:
        return step() + 0  # a value is needed at the end of a step

    config = parafuse.Config(parallel=parafuse.Parallel(cfg=2, ulysses=1))
    with torch.no_grad():
        whole = run()
        with parafuse.apply(model, config) as handle:
            run()  # its results are seen once
            before = handle.exchanged()["cfg.all_gather"]
            split = run()
            after = handle.exchanged()["cfg.all_gather"]
        for _ in range(ROUNDS):
            dist.barrier()
            if rank == 0:
                samples["one"].append(timed(run, {}, 1))
            dist.barrier()
            samples["independent"].append(timed(run, {}, 1))
            with parafuse.apply(model, config):
                run()
                dist.barrier()
                samples["two"].append(timed(run, {}, 1))
    return {
        "samples": samples,
        "error": float((split - whole).abs().max() / whole.abs().max()),
        "calls": after.calls - before.calls,
        "bytes": after.bytes - before.bytes,
    }


def report(way: str, both: list[dict[str, Any]]) -> bool:
    """Prints one way's figures; True when the goal is met."""
    found = Scaling.of(both, GOAL, OF_CEILING)
    expected = IMAGE * 64 * 4 + 8  # one branch's result to the other rank, and word that it is one
    print(f"{way}: {found}")
    print(
        f"  relative error against one rank {both[0]['error']:.1e}; per step {both[0]['calls']} exchange (1), "
        f"{both[0]['bytes']} bytes sent (formula {expected})"
    )
    return found.ratio >= found.goal and both[0]["calls"] == 1 and both[0]["bytes"] == expected


def main() -> int:
    results = on_two_ranks(measure, list(WAYS))
    good = [report(way, results[way]) for way in WAYS]
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
