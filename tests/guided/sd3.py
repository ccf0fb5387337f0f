"""Stable Diffusion 3, and its guidance by skipped layers."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import STEPS, assemble, made, prompts
from tests.pipelines import _clip, _clip_tokenizer, _t5, _t5_tokenizer, _vae
from tests.zoo.sd3 import SD3


def build(pipeline: str = "StableDiffusion3Pipeline", **more: Any) -> Any:
    return assemble(
        pipeline,
        transformer=made("SD3Transformer2DModel", SD3, pooled_projection_dim=24),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=_clip(8, projection=8),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(16, projection=16),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5("T5"),
        tokenizer_3=_t5_tokenizer(),
        **more,
    )


def call(count: int) -> dict[str, Any]:
    return prompts(count) | dict(
        height=8, width=12, num_inference_steps=STEPS, guidance_scale=5.0, max_sequence_length=9, output_type="latent"
    )


def call_skipping(count: int) -> dict[str, Any]:
    """The second step alone makes a third branch: the prompts once more, without layer 1."""
    return call(count) | dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.5)


SOURCE = "tests/zoo/sd3.py; text encoders as tests/pipelines.py"

CASES = [
    Guided(name="Stable Diffusion 3", build=build, call=call, source=SOURCE),
    Guided(name="Stable Diffusion 3: skipped layers", build=build, call=call_skipping, source=SOURCE),
]
