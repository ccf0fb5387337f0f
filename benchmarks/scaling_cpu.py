"""Scaling of Ulysses on two CPU cores: FLUX, width 512, 2 + 4 blocks, 1024 + 128 tokens; 2 ranks x 1 thread against 1.

`python -m benchmarks.scaling_cpu`: every round times, one after another in the same processes, the transformer on one
rank (the other one idle), on two ranks, and on both at once without any exchange (the machine's ceiling). Medians of
7 rounds. Prints bytes and calls per block beside the formulas of `parafuse.parallel.layout`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

import parafuse
from benchmarks.two_ranks import Scaling, on_two_ranks

IMAGE, TEXT, WIDTH, HEADS = 1024, 128, 512, 8
DOUBLE, SINGLE = 2, 4
ROUNDS = 7
GOALS = {"float32": 1.75, "bfloat16": 1.5}


def model_and_inputs(dtype: torch.dtype) -> tuple[FluxTransformer2DModel, dict[str, Any]]:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS, joint_attention_dim=256, pooled_projection_dim=256, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, IMAGE, 64, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, 256, dtype=dtype),
        "pooled_projections": torch.randn(1, 256, dtype=dtype),
        "timestep": torch.full((1,), 0.5, dtype=dtype),
        "img_ids": torch.randint(0, 32, (IMAGE, 3)).to(dtype),
        "txt_ids": torch.zeros(TEXT, 3, dtype=dtype),
        "return_dict": False,
    }
    torch.nn.Module.to(model.eval(), dtype)
    return model, inputs


def timed(model: Callable[..., Any], inputs: dict[str, Any], times: int) -> float:
    """Seconds per forward."""
    begun = time.perf_counter()
    for _ in range(times):
        model(**inputs)
    return (time.perf_counter() - begun) / times


def measure(dtype_name: str, rank: int) -> dict[str, Any]:
    """All three variants, interleaved; the same numbers on both ranks but for `independent`."""
    model, inputs = model_and_inputs(getattr(torch, dtype_name))
    times = 1 if dtype_name == "float32" else 3
    samples: dict[str, list[float]] = {"one": [], "two": [], "independent": []}
    with torch.no_grad():
        whole = model(**inputs)[0]
        handle = parafuse.apply(model)
        split = model(**inputs)[0]
        before = handle.exchanged()["ulysses.all_to_all"]
        model(**inputs)
        after = handle.exchanged()["ulysses.all_to_all"]
        handle.remove()
        for _ in range(ROUNDS):
            dist.barrier()
            if rank == 0:
                samples["one"].append(timed(model, inputs, times))
            dist.barrier()
            samples["independent"].append(timed(model, inputs, times))
            with parafuse.apply(model):
                model(**inputs)  # examines the blocks again
                dist.barrier()
                samples["two"].append(timed(model, inputs, times))
    error = float((split - whole).abs().max() / whole.abs().max())
    blocks = DOUBLE + SINGLE
    counts = {"calls": (after.calls - before.calls) / blocks, "bytes": (after.bytes - before.bytes) / blocks}
    return {"samples": samples, "error": error, "counts": counts, "item_bytes": inputs["timestep"].element_size()}


def report(name: str, both: list[dict[str, Any]]) -> bool:
    """Prints one dtype's table; True when the goal is met."""
    found = Scaling.of(both, GOALS[name])
    expected = 4 * (IMAGE + TEXT) * WIDTH * both[0]["item_bytes"] / 2 * 1 / 2
    counts = both[0]["counts"]
    print(f"{name}: {found}")
    print(
        f"  spread of the one-rank samples {found.spread:.2f}; relative error against one rank {both[0]['error']:.1e}"
    )
    print(
        f"  per block: {counts['calls']:.0f} exchanges (2), {counts['bytes']:.0f} bytes sent (formula {expected:.0f})"
    )
    return found.ratio >= found.goal and counts["bytes"] == expected and counts["calls"] == 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=list(GOALS), action="append")
    args = parser.parse_args()
    dtypes = args.dtype or list(GOALS)
    results = on_two_ranks(measure, dtypes)
    good = [report(name, results[name]) for name in dtypes]
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
