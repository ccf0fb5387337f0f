"""diffusers' guide "Distributed inference", section Accelerate: every rank paints prompts of its own.

    torchrun --standalone --nproc-per-node 2 examples/guides/split_prompts.py

`Engine.from_pretrained(..., alone=True)` stands where the guide loads the pipeline and moves it to the process's
device: it runs on this rank by itself, so that ranks may be given different calls. All else is the guide's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState

import parafuse


def main(
    model: Annotated[str, typer.Option(help="Folder, hub id, emoji, or tiny:NAME without weights.")] = "emoji",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/guides"),
    steps: Annotated[int, typer.Option(help="Steps of denoising.")] = 20,
    size: Annotated[int, typer.Option(help="Width and height.")] = 128,
) -> list[Any]:
    """Split prompts between processes; each saves its own pictures, and returns them."""
    distributed_state = PartialState(cpu=not torch.cuda.is_available())
    # The guide: pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16, use_safetensors=True)
    #            pipeline.to(distributed_state.device)
    pipeline = parafuse.Engine.from_pretrained(model, alone=True)
    out.mkdir(parents=True, exist_ok=True)
    results: list[Any] = []
    with distributed_state.split_between_processes(["a dog", "a cat", "a red apple"]) as prompts:
        for number, prompt in enumerate(prompts):
            result = pipeline(prompt, num_inference_steps=steps, width=size, height=size, seed=0).images[0]
            result.save(out / f"result_{distributed_state.process_index}_{number}.png")
            results.append(result)
    pipeline.close()
    return results


if __name__ == "__main__":
    typer.run(main)
