"""diffusers' guide "Distributed inference", section Context parallelism: one picture by all ranks.

    torchrun --standalone --nproc-per-node 2 examples/guides/context_parallel.py
    torchrun --standalone --nproc-per-node 2 examples/guides/context_parallel.py --ring 1 --ulysses 2
    torchrun --standalone --nproc-per-node 4 examples/guides/context_parallel.py --ring 2 --ulysses 2  # unified

`parafuse.Parallel` stands where the guide says `enable_parallelism(config=ContextParallelConfig(...))`. It needs no
`_cp_plan` of the model, and takes lengths and heads that do not divide (the guide's `ulysses_anything`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import parafuse


def main(
    model: Annotated[str, typer.Option(help="Folder, hub id, emoji, or tiny:NAME without weights.")] = "emoji",
    ring: Annotated[int, typer.Option(help="The guide's ring_degree.")] = 2,
    ulysses: Annotated[int, typer.Option(help="The guide's ulysses_degree.")] = 1,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("out/guides/output.png"),
    steps: Annotated[int, typer.Option(help="Steps of denoising.")] = 20,
    size: Annotated[int, typer.Option(help="Width and height.")] = 128,
) -> Any:
    """Paint one picture on all ranks; every rank returns it."""
    # The guide: device = setup_distributed()  (init_process_group, torch.cuda.set_device)
    #            pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16, device_map=device)
    #            pipeline.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=world_size))
    config = parafuse.Config(parallel=parafuse.Parallel(ring=ring, ulysses=ulysses))
    with parafuse.Engine.from_pretrained(model, config) as pipeline:
        pipeline.transformer.set_attention_backend("native")  # the guide: "_native_cudnn"
        generator = torch.Generator().manual_seed(42)  # the same on every rank, as in the guide
        image = pipeline("a red apple", num_inference_steps=steps, width=size, height=size, generator=generator).images[
            0
        ]
        if pipeline.rank == 0:  # the guide: if dist.get_rank() == 0
            out.parent.mkdir(parents=True, exist_ok=True)
            image.save(out)
    return image  # the guide: dist.destroy_process_group(), which close() has done


if __name__ == "__main__":
    typer.run(main)
