"""Kandinsky 5, text to video."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.guided.case import Guided
from tests.guided.hunyuan import VAE
from tests.guided.parts import NO_TEXTS, STEPS, assemble, made, rows
from tests.zoo.kandinsky import KANDINSKY5

TOKENS, NEGATIVE_TOKENS = 7, 5


def build() -> Any:
    return assemble(
        "Kandinsky5T2VPipeline",
        transformer=made("Kandinsky5Transformer3DModel", KANDINSKY5),
        vae=diffusers.AutoencoderKLHunyuanVideo(**VAE),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **NO_TEXTS,
    )


def call(count: int) -> dict[str, Any]:
    """2 x 2 x 3 tokens; the latents of a step are written over those of the one before."""
    return dict(
        prompt_embeds_qwen=rows(count, TOKENS, 16, seed=1),
        prompt_embeds_clip=rows(count, 32, seed=2),
        prompt_cu_seqlens=TOKENS * torch.arange(count + 1),
        negative_prompt_embeds_qwen=rows(count, NEGATIVE_TOKENS, 16, seed=3),
        negative_prompt_embeds_clip=rows(count, 32, seed=4),
        negative_prompt_cu_seqlens=NEGATIVE_TOKENS * torch.arange(count + 1),
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
    )


CASES = [
    Guided(
        name="Kandinsky 5",
        build=build,
        call=call,
        source="tests/zoo/kandinsky.py, which says where the transformer rounds to bf16; "
        "diffusers, tests/pipelines/kandinsky5/test_kandinsky5.py for the VAE",
    ),
]
