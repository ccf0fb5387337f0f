"""Trains the AutoencoderKL of `emoji` (factor 4, 8 latent channels) and encodes the training set once.

`python train_vae.py WORKDIR --minutes 14`: reads pictures.pt, writes vae/ and latents.pt. Two CPU cores are enough.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

VAE_CONFIG = dict(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(24, 48, 64),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    sample_size=128,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
BATCH = 16
CROP = 96
KL_WEIGHT = 1e-6


def crops(pictures_N3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(BATCH, 3, CROP, CROP) in -1..1: one random crop for the batch, random pictures and mirror."""
    index = torch.randint(len(pictures_N3HW), (BATCH,), generator=generator)
    room = pictures_N3HW.shape[-1] - CROP + 1
    y, x, mirror = (int(v) for v in torch.randint(room, (3,), generator=generator))
    batch = pictures_N3HW[index, :, y : y + CROP, x : x + CROP].float() / 127.5 - 1
    return batch.flip(-1) if mirror % 2 else batch


def loss_of(vae: AutoencoderKL, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, mean absolute error): L1 at two scales plus L1 of the colour means, and a light KL."""
    posterior = vae.encode(batch).latent_dist
    out = vae.decode(posterior.sample()).sample.float()
    fine = F.l1_loss(out, batch)
    coarse = F.l1_loss(F.avg_pool2d(out, 4), F.avg_pool2d(batch, 4))
    edges = F.l1_loss(out.diff(dim=-1), batch.diff(dim=-1)) + F.l1_loss(out.diff(dim=-2), batch.diff(dim=-2))
    return fine + coarse + 0.5 * edges + KL_WEIGHT * posterior.kl().mean(), fine.detach()


def train(vae: AutoencoderKL, pictures_N3HW: torch.Tensor, minutes: float) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.99))
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start, curve = time.monotonic(), []
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, spent * 50 + 0.02) * (1 - spent) ** 0.7
        batch = crops(pictures_N3HW, generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss, error = loss_of(vae, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        curve.append(float(error))
        if len(curve) % 50 == 0:
            print(f"step {len(curve)} {spent:.0%} mean abs {sum(curve[-50:]) / 50:.4f}", flush=True)
    return curve


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures_N3HW: torch.Tensor, size: int) -> torch.Tensor:
    """Latent means (N, 8, size / 4, size / 4) of the pictures at `size` pixels."""
    out = []
    for batch in pictures_N3HW.split(16):
        x = batch.float() / 127.5 - 1
        if size != x.shape[-1]:
            x = F.interpolate(x, size=size, mode="area")
        out.append(vae.encode(x).latent_dist.mean)
    return torch.cat(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=14)
    args = parser.parse_args()
    torch.manual_seed(0)
    pictures = torch.load(args.work / "pictures.pt").permute(0, 3, 1, 2).contiguous()
    vae = AutoencoderKL(**VAE_CONFIG)
    curve = train(vae, pictures, args.minutes)
    vae.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    latents = {size: encode(vae, pictures, size) for size in (64, 128)}
    full = latents[128]
    vae.register_to_config(scaling_factor=round(1 / float(full.std()), 5), shift_factor=round(float(full.mean()), 5))
    vae.save_pretrained(args.work / "vae")
    torch.save(latents, args.work / "latents.pt")
    (args.work / "vae_curve.json").write_text(json.dumps(curve))
    print("done", vae.config["scaling_factor"], vae.config["shift_factor"], "mean abs", sum(curve[-100:]) / 100)


if __name__ == "__main__":
    main()
