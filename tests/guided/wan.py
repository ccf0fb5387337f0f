"""Wan 2.1, and 2.2 with an expert for high and one for low noise."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import STEPS, assemble, made, prompts
from tests.pipelines import _t5, _t5_tokenizer
from tests.zoo.wan import WAN


def _transformer() -> Any:
    return made("WanTransformer3DModel", WAN, text_dim=32)


def build(**more: Any) -> Any:
    return assemble(
        "WanPipeline",
        transformer=_transformer(),
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=_t5("UMT5"),
        tokenizer=_t5_tokenizer(),
        **more,
    )


def build_experts() -> Any:
    return build(transformer_2=_transformer(), boundary_ratio=0.875)


def call(count: int) -> dict[str, Any]:
    """2 x 2 x 3 tokens."""
    return prompts(count) | dict(
        height=32, width=48, num_frames=5, num_inference_steps=STEPS, guidance_scale=5.0, max_sequence_length=9,
        output_type="latent",
    )  # fmt: skip


def call_experts(count: int) -> dict[str, Any]:
    """Each expert has its own scale; the second makes the last two steps."""
    return call(count) | dict(guidance_scale_2=3.0)


SOURCE = "tests/zoo/wan.py; text encoder as tests/pipelines.py, scheduler as published"

CASES = [
    Guided(name="Wan 2.1", build=build, call=call, source=SOURCE),
    Guided(name="Wan 2.2: two experts", build=build_experts, call=call_experts, source=SOURCE),
]
