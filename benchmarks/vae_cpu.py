"""Scaling of a divided decode on two CPU cores: a Stable Diffusion autoencoder of half the width, 256 x 256
pixels; 2 ranks x 1 thread against 1.

`python -m benchmarks.vae_cpu`: every round times, one after another in the same processes, the decode on one rank (the
other one idle), on two ranks, and on both at once without any exchange (the machine's ceiling). Medians of the rounds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

import parafuse
from benchmarks.two_ranks import Scaling, on_two_ranks

ROUNDS = 7
GOAL = 1.7
PIXELS = {"256": 256}


def autoencoder() -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        block_out_channels=(64, 128, 256, 256), layers_per_block=2, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return AutoencoderKL(**settings).eval()


def timed(vae: Any, latents: torch.Tensor) -> float:
    begun = time.perf_counter()
    vae.decode(latents)
    return time.perf_counter() - begun


def measure(name: str, rank: int) -> dict[str, Any]:
    """All three variants, interleaved; the same numbers on both ranks but for `independent`."""
    vae, edge = autoencoder(), PIXELS[name] // 8
    latents = torch.randn(1, 4, edge, edge)
    samples: dict[str, list[float]] = {"one": [], "two": [], "independent": []}
    with torch.no_grad():
        whole = vae.decode(latents).sample
        with parafuse.apply(vae, parafuse.Config(vae="sharded")):
            split = vae.decode(latents).sample
        for _ in range(ROUNDS):
            dist.barrier()
            if rank == 0:
                samples["one"].append(timed(vae, latents))
            dist.barrier()
            samples["independent"].append(timed(vae, latents))
            with parafuse.apply(vae, parafuse.Config(vae="sharded")):
                dist.barrier()
                samples["two"].append(timed(vae, latents))
    return {"samples": samples, "error": float((split - whole).abs().max() / whole.abs().max())}


def report(name: str, both: list[dict[str, Any]]) -> bool:
    """Prints one size's figures; True when the goal is met."""
    found = Scaling.of(both, GOAL)
    print(f"{name} x {name}: {found}")
    print(
        f"  spread of the one-rank samples {found.spread:.2f}; relative error against one rank {both[0]['error']:.1e}"
    )
    return found.ratio >= found.goal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    names = list(PIXELS)
    results = on_two_ranks(measure, names)
    good = [report(name, results[name]) for name in names]
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
