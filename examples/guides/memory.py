"""diffusers' guide "Reduce memory usage": what it calls on a pipeline, called on an engine over all ranks.

    torchrun --standalone --nproc-per-node 2 examples/guides/memory.py --saving vae_tiling

Only the guide's first section changes: `device_map="balanced"`, which lays the parts of a model on several GPUs, one
working at a time, is refused, and `Engine.from_pretrained` on several ranks stands there: they work at once, and each
has the whole model; give `group_offload` or `layerwise_casting` too where it does not fit. The other calls are the
guide's own lines. Left out are `torch.jit.trace` of a UNet, which this was not tried with, and xFormers, whose operator
cannot be split: torch's own attention needs as little.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import parafuse

ONLOAD, OFFLOAD = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.device("cpu")
COMPUTE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def group_offload(pipeline: Any) -> None:
    """Of the denoiser, and of the VAE, as the guide does it for each component."""
    for part in (pipeline.transformer, pipeline.vae):
        part.enable_group_offload(onload_device=ONLOAD, offload_device=OFFLOAD, offload_type="leaf_level")


SAVINGS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda pipeline: None,
    "vae_slicing": lambda pipeline: pipeline.vae.enable_slicing(),
    "vae_tiling": lambda pipeline: pipeline.vae.enable_tiling(),
    "model_offload": lambda pipeline: pipeline.enable_model_cpu_offload(device=ONLOAD),
    "sequential_offload": lambda pipeline: pipeline.enable_sequential_cpu_offload(device=ONLOAD),
    "group_offload": group_offload,
    "layerwise_casting": lambda pipeline: pipeline.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=COMPUTE
    ),
    "channels_last": lambda pipeline: pipeline.vae.to(memory_format=torch.channels_last),
    "attention": lambda pipeline: pipeline.transformer.set_attention_backend("native"),
}
"""The lines of the guide's sections by name."""


def main(
    model: Annotated[str, typer.Option(help="Folder, hub id, emoji, or tiny:NAME without weights.")] = "emoji",
    saving: Annotated[str, typer.Option(help=f"One of {', '.join(SAVINGS)}.")] = "nothing",
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("out/guides/memory.png"),
    steps: Annotated[int, typer.Option(help="Steps of denoising.")] = 20,
    size: Annotated[int, typer.Option(help="Width and height.")] = 128,
) -> list[Any]:
    """Paint two prompts on all ranks with less memory; every rank returns the pictures."""
    # The guide: pipeline = AutoPipelineForText2Image.from_pretrained(model, torch_dtype=torch.bfloat16,
    #                                                                 device_map="balanced", max_memory={0: "16GB"})
    with parafuse.Engine.from_pretrained(model) as pipeline:
        SAVINGS[saving](pipeline)
        prompts = ["a red apple", "a rocket"]
        images = pipeline(prompts, num_inference_steps=steps, width=size, height=size, seed=0).images
        if pipeline.rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            images[0].save(out)
            if torch.cuda.is_available():
                print(f"Max memory allocated: {torch.cuda.max_memory_allocated() / 1024**3:.2f} GB")
    return images


if __name__ == "__main__":
    typer.run(main)
