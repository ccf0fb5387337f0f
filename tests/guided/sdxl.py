"""Stable Diffusion XL: two text encoders, sizes as conditions, schedulers with one and two calls in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import STEPS, assemble, picture, prompts
from tests.guided.stable_diffusion import BETAS
from tests.pipelines import _clip, _clip_tokenizer, _vae

HEIGHT, WIDTH = 16, 24
BLOCKS: dict[str, Any] = dict(
    block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=(2, 4),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True, cross_attention_dim=24,
    addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    transformer_layers_per_block=(1, 2),
)  # fmt: skip


def build(pipeline: str = "StableDiffusionXLPipeline", scheduler: str = "EulerDiscreteScheduler", **more: Any) -> Any:
    return assemble(
        pipeline,
        unet=diffusers.UNet2DConditionModel(
            **BLOCKS, sample_size=16, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
        ),
        vae=_vae(),
        scheduler=getattr(diffusers, scheduler)(**BETAS, steps_offset=1, timestep_spacing="leading"),
        text_encoder=_clip(8),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(16, projection=16),
        tokenizer_2=_clip_tokenizer(),
        add_watermarker=False,
        **more,
    )


def build_controlled() -> Any:
    controlnet = diffusers.ControlNetModel(**BLOCKS, conditioning_embedding_out_channels=(8, 16))
    return build("StableDiffusionXLControlNetPipeline", controlnet=controlnet)


def call(count: int) -> dict[str, Any]:
    return prompts(count) | dict(num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent")


def call_text(count: int) -> dict[str, Any]:
    return call(count) | dict(height=HEIGHT, width=WIDTH)


def call_controlled(count: int) -> dict[str, Any]:
    """A picture for every prompt."""
    return call_text(count) | dict(image=[picture(HEIGHT, WIDTH, seed=i) for i in range(count)])


def call_image(count: int) -> dict[str, Any]:
    """Of 4 steps the last 3."""
    return call(count) | dict(image=picture(HEIGHT, WIDTH), strength=0.75, num_inference_steps=STEPS + 1)


def call_inpaint(count: int) -> dict[str, Any]:
    """The right half is to be painted."""
    from PIL import Image

    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (WIDTH // 2, 0, WIDTH, HEIGHT))
    return call_text(count) | dict(image=picture(HEIGHT, WIDTH), mask_image=mask, strength=1.0)


def _scheduled(name: str, scheduler: str, source: str) -> Guided:
    return Guided(
        name=f"Stable Diffusion XL: {name}", build=lambda: build(scheduler=scheduler), call=call_text, source=source
    )


def _piped(name: str, make: Callable[[], Any], ask: Callable[[int], dict[str, Any]], source: str) -> Guided:
    return Guided(name=f"Stable Diffusion XL: {name}", build=make, call=ask, source=source)


SOURCE = "diffusers, tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py; narrower"

CASES = [
    Guided(name="Stable Diffusion XL", build=build, call=call_text, source=SOURCE),
    _scheduled("Heun", "HeunDiscreteScheduler", f"{SOURCE}; two calls in every step but the last"),
    _scheduled("KDPM2", "KDPM2DiscreteScheduler", f"{SOURCE}; two calls in every step but the last"),
    _scheduled("Euler ancestral", "EulerAncestralDiscreteScheduler", f"{SOURCE}; noise is drawn in every step"),
    _piped("ControlNet", build_controlled, call_controlled, f"{SOURCE}; tests/pipelines/controlnet for the ControlNet"),
    _piped("image to image", lambda: build("StableDiffusionXLImg2ImgPipeline"), call_image, SOURCE),
    _piped("inpainting", lambda: build("StableDiffusionXLInpaintPipeline"), call_inpaint, SOURCE),
]
