"""Steady state of compiled blocks against the compiled whole where blocks are wide: FLUX of width 1536, 2 + 4 blocks.

`python -m benchmarks.compile_wide`: both in one process in turns, processor time of each call, medians and minima.
What regional compile costs (telling calls apart, joining and cutting text and picture in each block) is paid by block;
the wider a block, the less it is. Figures: docs/notes/compile.md.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import parafuse
from benchmarks.compile_cold import inputs

ROUNDS = 15


def model() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    ).eval().requires_grad_(False)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    values, regional = inputs(), model()
    ways: dict[str, Any] = {"whole": torch.compile(model(), fullgraph=True, dynamic=False), "regional": regional}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad(), parafuse.apply(regional, parafuse.Config(compile=True)):
        for turn in range(ROUNDS + 3):
            for name, run in ways.items():
                begun = time.process_time()
                run(**values)
                if turn >= 3:  # the first ones compile
                    seconds[name].append(time.process_time() - begun)
    for name, found in seconds.items():
        print(f"{name:9} median {statistics.median(found) * 1e3:.0f} ms, least {min(found) * 1e3:.0f} ms")
    whole, own = seconds["whole"], seconds["regional"]
    medians = statistics.median(own) / statistics.median(whole) - 1
    print(f"regional: {medians:+.1%} of the medians, {min(own) / min(whole) - 1:+.1%} of the least")


if __name__ == "__main__":
    main()
