"""CogVideoX with guidance that grows from step to step, and a scheduler that draws noise."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import STEPS, assemble, made, prompts
from tests.pipelines import _t5, _t5_tokenizer
from tests.zoo.cogvideox import CONFIG

VAE: dict[str, Any] = dict(
    block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    temporal_compression_ratio=4,
)  # fmt: skip


def build() -> Any:
    return assemble(
        "CogVideoXPipeline",
        transformer=made(
            "CogVideoXTransformer3DModel", CONFIG, use_rotary_positional_embeddings=True, text_embed_dim=32
        ),
        vae=diffusers.AutoencoderKLCogVideoX(**VAE),
        scheduler=diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        text_encoder=_t5("T5"),
        tokenizer=_t5_tokenizer(),
    )


def call(count: int) -> dict[str, Any]:
    """2 x 2 x 3 tokens."""
    return prompts(count) | dict(
        height=32, width=48, num_frames=5, num_inference_steps=STEPS, guidance_scale=6.0, use_dynamic_cfg=True,
        max_sequence_length=9, output_type="latent",
    )  # fmt: skip


CASES = [
    Guided(
        name="CogVideoX",
        build=build,
        call=call,
        source="tests/zoo/cogvideox.py as 5B, its scheduler; diffusers, tests/pipelines/cogvideo for the VAE",
    ),
]
