"""diffusers' guide "Distributed inference", section PyTorch Distributed: a process for each GPU, a prompt for each.

    torchrun --standalone --nproc-per-node 2 examples/guides/all_prompts.py
    python examples/guides/all_prompts.py  # starts the second rank itself, as the guide's mp.spawn does

`Parallel(data=2)` stands where the guide gives each rank a prompt by `if dist.get_rank() == 0: ...`: all prompts go
into one call, the ranks share them, and every rank gets all pictures. init_process_group and mp.spawn go away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import parafuse

PROMPTS = ["a dog", "a cat"]
RANKS = 2


def main(
    model: Annotated[str, typer.Option(help="Folder, hub id, emoji, or tiny:NAME without weights.")] = "emoji",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/guides"),
    steps: Annotated[int, typer.Option(help="Steps of denoising.")] = 20,
    size: Annotated[int, typer.Option(help="Width and height.")] = 128,
) -> list[Any]:
    """Paint all prompts in one call over replicas; rank 0 saves, every rank returns all pictures."""
    # The guide: sd = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16, use_safetensors=True)
    #            dist.init_process_group("nccl", rank=rank, world_size=world_size); sd.to(rank)
    config = parafuse.Config(parallel=parafuse.Parallel(data=RANKS))
    with parafuse.Engine.from_pretrained(model, config) as sd:
        # The guide: prompt = "a dog" on rank 0, "a cat" on rank 1; image = sd(prompt).images[0]
        images = sd(PROMPTS, num_inference_steps=steps, width=size, height=size, seed=[0, 1]).images
        if sd.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            for prompt, image in zip(PROMPTS, images, strict=True):
                image.save(out / f"{prompt.replace(' ', '_')}.png")
    return images


if __name__ == "__main__":
    typer.run(main)
