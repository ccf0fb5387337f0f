"""Stable Diffusion 1.5: a UNet, with the schedulers that it is published with."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import STEPS, assemble, prompts
from tests.pipelines import _clip, _clip_tokenizer, _vae

BETAS: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
UNET: dict[str, Any] = dict(
    block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8, sample_size=16,
    attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


def build(scheduler: Any) -> Any:
    return assemble(
        "StableDiffusionPipeline",
        unet=diffusers.UNet2DConditionModel(**UNET),
        vae=_vae(),
        scheduler=scheduler,
        text_encoder=_clip(8),
        tokenizer=_clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def call(count: int) -> dict[str, Any]:
    return prompts(count) | dict(
        height=16, width=24, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent"
    )


CASES = [
    Guided(
        name="Stable Diffusion",
        build=lambda: build(diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)),
        call=call,
        source="diffusers, tests/pipelines/stable_diffusion/test_stable_diffusion.py; narrower, PNDM as published",
    ),
    Guided(
        name="Stable Diffusion: LCM",
        build=lambda: build(diffusers.LCMScheduler(**BETAS)),
        call=call,
        source="as above; the scheduler draws noise in every step but the last",
    ),
]
