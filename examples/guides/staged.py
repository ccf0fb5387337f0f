"""diffusers' guide "Distributed inference", section Model sharding: one stage in memory at a time.

    torchrun --standalone --nproc-per-node 2 examples/guides/staged.py

`parafuse.Engine` stands where the guide says `FluxPipeline`: components are given as None, all methods are the
pipeline's. `device_map="balanced"` and `max_memory` go away: the ranks share the denoising instead of lying one after
another, and each has one device. Of text encoders or a VAE alone, every rank does all of the work.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import parafuse

NO_TEXT: dict[str, Any] = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}


def flush() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="A FLUX.1: folder, hub id, emoji.")] = "emoji",
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("out/guides/split_transformer.png"),
    steps: Annotated[int, typer.Option(help="Steps of denoising.")] = 20,
    size: Annotated[int, typer.Option(help="Width and height.")] = 128,
    tokens: Annotated[int, typer.Option(help="Of the prompt, at most; 512 for FLUX.1-dev.")] = 16,
    vae_factor: Annotated[int, typer.Option(help="Pixels per latent: 4 for emoji, 8 for FLUX.1.")] = 4,
) -> Any:
    """Paint one picture in three stages; every rank returns it."""
    pipeline = parafuse.Engine.from_pretrained(model, transformer=None, vae=None)  # was: FluxPipeline.from_pretrained
    texts = [
        pipeline.encode_prompt(prompt=text, prompt_2=None, max_sequence_length=tokens) for text in ("a red apple", "")
    ]
    (prompt_embeds, pooled_prompt_embeds, _), (negative_embeds, negative_pooled_embeds, _) = texts
    pipeline.close()  # was: del pipeline.text_encoder, pipeline.tokenizer, ...
    del pipeline
    flush()

    # was: transformer = AutoModel.from_pretrained(..., device_map="auto"), given to FluxPipeline.from_pretrained
    pipeline = parafuse.Engine.from_pretrained(model, vae=None, **NO_TEXT)
    pipeline.vae_scale_factor = vae_factor  # without its VAE a pipeline takes it to be 8
    latents = pipeline(
        prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, negative_prompt_embeds=negative_embeds,
        negative_pooled_prompt_embeds=negative_pooled_embeds, num_inference_steps=steps, height=size, width=size,
        output_type="latent", seed=0,
    ).images  # fmt: skip
    pipeline.close()
    del pipeline
    flush()

    # was: vae = AutoencoderKL.from_pretrained(...); VaeImageProcessor(...); FluxPipeline._unpack_latents(...)
    with parafuse.Engine.from_pretrained(model, transformer=None, **NO_TEXT) as pipeline:
        latents = pipeline._unpack_latents(latents, size, size, pipeline.vae_scale_factor)
        latents = (latents / pipeline.vae.config.scaling_factor) + pipeline.vae.config.shift_factor
        image = pipeline.vae.decode(latents, return_dict=False)[0]
        image = pipeline.image_processor.postprocess(image, output_type="pil")[0]
        if pipeline.rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            image.save(out)
    return image


if __name__ == "__main__":
    typer.run(main)
