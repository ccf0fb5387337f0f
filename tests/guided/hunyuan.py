"""HunyuanVideo with true guidance, and HunyuanVideo 1.5, whose guidance is a component."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import NO_TEXTS, STEPS, assemble, legible, made, rows
from tests.zoo.hunyuan import VIDEO, VIDEO15

VAE: dict[str, Any] = dict(
    latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    spatial_compression_ratio=8, temporal_compression_ratio=4,
)  # fmt: skip
"""8 x 8 pixels of 4 frames become one latent of 4 channels."""
VAE15: dict[str, Any] = dict(
    latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
    temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
)  # fmt: skip


def build() -> Any:
    return assemble(
        "HunyuanVideoPipeline",
        transformer=made("HunyuanVideoTransformer3DModel", VIDEO),
        vae=diffusers.AutoencoderKLHunyuanVideo(**VAE),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **NO_TEXTS,
    )


def build_15() -> Any:
    return assemble(
        "HunyuanVideo15Pipeline",
        transformer=made("HunyuanVideo15Transformer3DModel", VIDEO15, task_type="t2v"),
        vae=diffusers.AutoencoderKLHunyuanVideo15(**VAE15),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **NO_TEXTS,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
    )


def call(count: int) -> dict[str, Any]:
    """2 x 2 x 3 tokens."""
    return dict(
        prompt_embeds=rows(count, 7, 16, seed=1),
        prompt_attention_mask=legible(count, 7),
        pooled_prompt_embeds=rows(count, 8, seed=2),
        negative_prompt_embeds=rows(count, 7, 16, seed=3),
        negative_prompt_attention_mask=legible(count, 7, missing=2),
        negative_pooled_prompt_embeds=rows(count, 8, seed=4),
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=STEPS,
        true_cfg_scale=4.0,
        output_type="latent",
    )


def call_15(count: int) -> dict[str, Any]:
    """2 x 4 x 6 tokens; the second text is that of quoted words."""
    return dict(
        prompt_embeds=rows(count, 7, 16, seed=1),
        prompt_embeds_mask=legible(count, 7),
        prompt_embeds_2=rows(count, 4, 8, seed=2),
        prompt_embeds_mask_2=legible(count, 4),
        negative_prompt_embeds=rows(count, 7, 16, seed=3),
        negative_prompt_embeds_mask=legible(count, 7, missing=2),
        negative_prompt_embeds_2=rows(count, 4, 8, seed=4),
        negative_prompt_embeds_mask_2=legible(count, 4, missing=1),
        height=16,
        width=24,
        num_frames=3,
        num_inference_steps=STEPS,
        output_type="latent",
    )


CASES = [
    Guided(
        name="HunyuanVideo",
        build=build,
        call=call,
        source="tests/zoo/hunyuan.py; diffusers, tests/pipelines/hunyuan_video for the VAE",
    ),
    Guided(
        name="HunyuanVideo 1.5",
        build=build_15,
        call=call_15,
        source="tests/zoo/hunyuan.py; diffusers, tests/pipelines/hunyuan_video1_5 for the VAE",
    ),
]
