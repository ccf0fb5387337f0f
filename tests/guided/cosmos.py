"""Cosmos: the scheduler is called twice in a step, for both branches and then for what guidance makes of them."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import STEPS, assemble, made, prompts
from tests.pipelines import _t5, _t5_tokenizer
from tests.zoo.cosmos import COSMOS


class Trusting:
    """In place of the guardrail, which is a package of its own with large weights: every text is safe."""

    def to(self, device: Any) -> None:
        """It has no weights."""

    def check_text_safety(self, prompt: str) -> bool:
        return True


def build() -> Any:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=2, patch_size=4, scaling_factor=1.0,
        spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon", rho=7.0,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    return assemble(
        "CosmosTextToWorldPipeline",
        transformer=made("CosmosTransformer3DModel", COSMOS, text_embed_dim=32),
        vae=vae,
        scheduler=scheduler,
        text_encoder=_t5("T5"),
        tokenizer=_t5_tokenizer(),
        safety_checker=Trusting(),
    )


def call(count: int) -> dict[str, Any]:
    """2 x 2 x 4 tokens."""
    return prompts(count) | dict(
        height=16, width=32, num_frames=5, num_inference_steps=STEPS, guidance_scale=5.0, max_sequence_length=9,
        output_type="latent",
    )  # fmt: skip


CASES = [
    Guided(
        name="Cosmos",
        build=build,
        call=call,
        source="diffusers, tests/pipelines/cosmos/test_cosmos.py; transformer of tests/zoo/cosmos.py",
    ),
]
