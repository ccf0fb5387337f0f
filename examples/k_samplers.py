"""k-diffusion's own samplers on a denoiser that runs on all ranks.

    torchrun --standalone --nproc-per-node 2 examples/k_samplers.py --sampler dpmpp_2m --out out/k_samplers.png

`parafuse.apply` puts all ranks behind the transformer; who calls it does not matter. Here the samplers of the
`k-diffusion` package do, which ask for the picture that a model sees in a noisy one. Every rank also paints alone,
before; if the two results differ by more than 1e-5 of the largest value, the exit code is 1. `make setup` installs what
it needs, or:

    pip install --no-deps k-diffusion torchdiffeq && pip install 'parafuse[schedulers]'
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import diffusers
import torch
import typer
from torch import Tensor

import parafuse

MODEL = Path(parafuse.__file__).parent / "models" / "emoji"
SIZE = 128
ALLOWED = 1e-5


def load_samplers() -> Any:
    """The module `k_diffusion.sampling` alone. Raises ImportError where it, or what it samples with, is missing.

    `import k_diffusion` brings what the package trains and measures with (wandb, CLIP, kornia, clean-fid); its samplers
    need torch, scipy, torchsde and torchdiffeq."""
    if "k_diffusion" in sys.modules:
        return importlib.import_module("k_diffusion.sampling")
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        raise ImportError("k-diffusion is not installed: pip install --no-deps k-diffusion torchdiffeq")
    put_in: dict[str, ModuleType] = {"k_diffusion": importlib.util.module_from_spec(spec)}  # its __init__ does not run
    if importlib.util.find_spec("torchvision") is None:  # `k_diffusion.utils` names it, for pictures
        functional, transforms = ModuleType("torchvision.transforms.functional"), ModuleType("torchvision.transforms")
        vars(transforms)["functional"] = functional
        put_in |= {"torchvision": ModuleType("torchvision"), "torchvision.transforms": transforms}
    sys.modules.update(put_in)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in put_in:
            del sys.modules[name]


def denoiser(pipeline: Any, prompt: str, guidance: float) -> Callable[..., Tensor]:
    """FLUX as k-diffusion asks for it: (x_BSC, sigma_B) -> the picture that the model sees.

    A flow model is given x = (1 - sigma) * picture + sigma * noise and tells v = noise - picture, so that the picture
    is x - sigma * v, and (x - picture) / sigma, along which samplers go, is v. That holds for samplers without noise of
    their own; the others add it as if x were picture + sigma * noise."""
    texts = [pipeline.encode_prompt(prompt=text, prompt_2=text, max_sequence_length=32) for text in (prompt, "")]
    side = SIZE // (2 * pipeline.vae_scale_factor)
    ids = pipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)

    def velocity(x_BSC: Tensor, sigma_B: Tensor, text: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return pipeline.transformer(
            hidden_states=x_BSC, timestep=sigma_B, guidance=None, encoder_hidden_states=text[0],
            pooled_projections=text[1], txt_ids=text[2], img_ids=ids, return_dict=False,
        )[0]  # fmt: skip

    def denoised(x_BSC: Tensor, sigma_B: Tensor) -> Tensor:
        asked, empty = (velocity(x_BSC, sigma_B, text) for text in texts)
        return x_BSC - sigma_B.view(-1, 1, 1) * (empty + guidance * (asked - empty))

    return denoised


@torch.no_grad()
def latents(pipeline: Any, sampler: str, prompt: str, *, steps: int, seed: int, guidance: float = 2.0) -> Tensor:
    """(1, S, C) packed latents by `k_diffusion.sampling.sample_...`."""
    channels = pipeline.transformer.config.in_channels
    tokens = (SIZE // (2 * pipeline.vae_scale_factor)) ** 2
    noise = torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(seed))
    sample = getattr(load_samplers(), f"sample_{sampler}")
    return sample(denoiser(pipeline, prompt, guidance), noise, torch.linspace(1, 0, steps + 1), disable=True)


@torch.no_grad()
def picture(pipeline: Any, x_BSC: Tensor) -> Any:
    """A PIL image."""
    unpacked = pipeline._unpack_latents(x_BSC, SIZE, SIZE, pipeline.vae_scale_factor)
    config = pipeline.vae.config
    pixels = pipeline.vae.decode(unpacked / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    return pipeline.image_processor.postprocess(pixels, output_type="pil")[0]


def main(
    sampler: Annotated[str, typer.Option(help="Of k_diffusion.sampling, without sample_.")] = "dpmpp_2m",
    prompt: Annotated[str, typer.Option(help="What to paint.")] = "a red apple",
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 7,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("out/k_samplers.png"),
) -> None:
    """Paint one prompt with a sampler of k-diffusion, alone and on all ranks, and compare."""
    pipeline: Any = diffusers.FluxPipeline.from_pretrained(MODEL, dtype=torch.float32)
    alone = latents(pipeline, sampler, prompt, steps=steps, seed=seed)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with parafuse.apply(pipeline, parafuse.Config(parallel=parafuse.Parallel(ulysses=ranks))) as handle:
        together = latents(pipeline, sampler, prompt, steps=steps, seed=seed)
        applied = "; ".join(handle.applied) or "nothing, on one rank"
    error = float((together - alone).abs().max() / alone.abs().max())
    if os.environ.get("RANK", "0") == "0":
        out.parent.mkdir(parents=True, exist_ok=True)
        picture(pipeline, together).save(out)
        print(f"{sampler}, {steps} steps on {ranks} ranks: {out}; differs from one rank by {error:.0e}; {applied}")
    if not error <= ALLOWED:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
