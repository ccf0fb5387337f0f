"""FLUX.1 with true guidance, which is a second call: from text, from a picture, and with a ControlNet."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import STEPS, assemble, made, picture, prompts
from tests.pipelines import _clip, _clip_tokenizer, _t5, _t5_tokenizer, _vae
from tests.zoo.flux import FLUX

HEIGHT, WIDTH = 8, 12
CONFIG = FLUX | dict(in_channels=16, pooled_projection_dim=8)


def build(pipeline: str, **more: Any) -> Any:
    return assemble(
        pipeline,
        transformer=made("FluxTransformer2DModel", CONFIG),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=_clip(8),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5("T5"),
        tokenizer_2=_t5_tokenizer(),
        **more,
    )


def build_controlled() -> Any:
    """A ControlNet that is shallower than the model."""
    controlnet = made("FluxControlNetModel", CONFIG, num_layers=1, num_single_layers=1)
    return build("FluxControlNetPipeline", controlnet=controlnet)


def call(count: int) -> dict[str, Any]:
    return prompts(count) | dict(
        height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, true_cfg_scale=4.0, max_sequence_length=9,
        output_type="latent",
    )  # fmt: skip


def call_kontext(count: int) -> dict[str, Any]:
    """The picture's tokens come after those of the latents."""
    return call(count) | dict(image=picture(8, 8), max_area=HEIGHT * WIDTH, _auto_resize=False)


def call_controlled(count: int) -> dict[str, Any]:
    return call(count) | dict(control_image=picture(HEIGHT, WIDTH), controlnet_conditioning_scale=0.7)


SOURCE = "tests/zoo/flux.py with 16 channels, as packed latents of 4 have them"

CASES = [
    Guided(name="FLUX.1", build=lambda: build("FluxPipeline"), call=call, source=SOURCE),
    Guided(name="FLUX.1 Kontext", build=lambda: build("FluxKontextPipeline"), call=call_kontext, source=SOURCE),
    Guided(
        name="FLUX.1: ControlNet",
        build=build_controlled,
        call=call_controlled,
        source=f"{SOURCE}; diffusers, tests/pipelines/controlnet_flux/test_controlnet_flux.py",
    ),
]
