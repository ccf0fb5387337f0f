"""Qwen-Image: the text encoder is a language model, so embeddings come in its place."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import NO_TEXT, STEPS, assemble, legible, made, picture, rows
from tests.zoo.qwen_image import QWEN

VAE: dict[str, Any] = dict(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def build() -> Any:
    vae = diffusers.AutoencoderKLQwenImage(
        **VAE, base_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
    )
    return _build("QwenImagePipeline", vae)


def build_edit() -> Any:
    """A latent covers 64 x 64 pixels: the pipeline enlarges every picture to a million of them."""
    vae = diffusers.AutoencoderKLQwenImage(
        **VAE, base_dim=2, dim_mult=[1] * 7, num_res_blocks=0, temperal_downsample=[False] * 6
    )
    return _build("QwenImageEditPipeline", vae, processor=None)


def _build(pipeline: str, vae: Any, **more: Any) -> Any:
    return assemble(
        pipeline,
        transformer=made("QwenImageTransformer2DModel", QWEN, num_layers=2),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **NO_TEXT,
        **more,
    )


def call(count: int) -> dict[str, Any]:
    """The negative text has more tokens, as the pipeline encodes the two apart."""
    return dict(
        prompt_embeds=rows(count, 7, 20, seed=1),
        prompt_embeds_mask=legible(count, 7),
        negative_prompt_embeds=rows(count, 9, 20, seed=2),
        negative_prompt_embeds_mask=legible(count, 9, missing=1),
        height=16,
        width=24,
        num_inference_steps=STEPS,
        true_cfg_scale=4.0,
        output_type="latent",
    )


def call_edit(count: int) -> dict[str, Any]:
    """2 x 3 tokens, and 8 x 8 of the picture."""
    return call(count) | dict(image=picture(32, 32), height=256, width=384)


SOURCE = "tests/zoo/qwen_image.py; diffusers, tests/pipelines/qwenimage for the VAE"

CASES = [
    Guided(name="Qwen-Image", build=build, call=call, source=SOURCE),
    Guided(name="Qwen-Image-Edit", build=build_edit, call=call_edit, source=f"{SOURCE}, which is deeper"),
]
