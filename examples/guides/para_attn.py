"""diffusers' guide "ParaAttention": context parallel, a compiled transformer, rank 0 saves; a picture or a video.

    torchrun --standalone --nproc-per-node 2 examples/guides/para_attn.py
    torchrun --standalone --nproc-per-node 2 examples/guides/para_attn.py --model tiny:hunyuanvideo --frames 9

`parafuse.apply(pipe, ...)` stands where the guide says `init_context_parallel_mesh` and `parallelize_pipe`, and needs
no `dist.init_process_group` before it. `parallelize_vae` has no counterpart: every rank decodes (the data axis shares
the decoding of several pictures). Nor has `apply_cache_on_pipe`: this version has no caches, so that line goes away.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.utils import export_to_gif

import parafuse


def load(model: str) -> Any:
    """The plain pipeline. The guide: FluxPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to("cuda")."""
    return parafuse.Engine.from_pretrained(model, alone=True).pipeline


def main(
    model: Annotated[str, typer.Option(help="Folder, hub id, emoji, or tiny:NAME without weights.")] = "emoji",
    ring: Annotated[int, typer.Option(help="The guide's max_ring_dim_size.")] = 1,
    backend: Annotated[str, typer.Option(help="Compile the blocks with it, as with inductor.")] = "",
    out: Annotated[Path, typer.Option(help="File without suffix: .png, or .gif for a video.")] = Path(
        "out/guides/flux"
    ),
    steps: Annotated[int, typer.Option(help="Steps of denoising.")] = 20,
    size: Annotated[int, typer.Option(help="Width and height.")] = 64,
    frames: Annotated[int, typer.Option(help="Of a video; 0 for a picture.")] = 0,
    runs: Annotated[int, typer.Option(help="The first one compiles.")] = 2,
) -> Any:
    """Paint the same on all ranks `runs` times; every rank returns the last picture or video."""
    pipe = load(model)
    if frames:
        pipe.vae.enable_tiling()
    # The guide: mesh = init_context_parallel_mesh(pipe.device.type, max_ring_dim_size=2)
    #            parallelize_pipe(pipe, mesh=mesh); parallelize_vae(pipe.vae, mesh=mesh._flatten())
    handle = parafuse.apply(pipe, parafuse.Config(parallel=parafuse.Parallel(ring=ring)))
    # The guide: apply_cache_on_pipe(pipe, residual_diff_threshold=0.12)
    if backend:  # The guide: pipe.transformer = torch.compile(pipe.transformer, mode="max-autotune-no-cudagraphs")
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    is_first = os.environ.get("RANK", "0") == "0"  # the guide: dist.get_rank() == 0
    call: dict[str, Any] = {"num_frames": frames} if frames else {}
    output: Any = None
    with handle:
        for i in range(runs):
            begin = time.time()
            output = pipe(
                "A cat walks on the grass, realistic", num_inference_steps=steps, width=size, height=size,
                max_sequence_length=16, generator=torch.Generator().manual_seed(0), **call,
            )[0][0]  # fmt: skip
            if is_first:
                print(f"{'Warm up' if i == 0 else 'Time'}: {time.time() - begin:.2f}s")
    if is_first:
        out.parent.mkdir(parents=True, exist_ok=True)
        if frames:
            export_to_gif(output, str(out.with_suffix(".gif")), fps=15)  # the guide: export_to_video, a .mp4
        else:
            output.save(out.with_suffix(".png"))
    return output


if __name__ == "__main__":
    typer.run(main)
