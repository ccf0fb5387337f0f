"""ACE-Step: music."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case


def inputs(sizes: Sizes) -> Inputs:
    """A sound has one dim: `sizes.image` tokens of two latents each."""
    length = 2 * sizes.image
    return dict(
        hidden_states=torch.randn(sizes.batch, length, 8),
        timestep=torch.rand(sizes.batch),
        timestep_r=torch.rand(sizes.batch),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        context_latents=torch.randn(sizes.batch, length, 16),
    )


CASES = (
    Case(
        name="AceStepTransformer1DModel",
        config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, rope_theta=10000.0,
            sliding_window=5, encoder_hidden_size=20,
        ),
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_ace_step.py; a window of 5 instead of 16",
    ),
)  # fmt: skip
