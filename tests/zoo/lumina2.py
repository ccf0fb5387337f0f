"""Lumina-Image 2.0."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, picture


def lumina2_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=picture(sizes, 4, 2),
        timestep=torch.rand(sizes.batch),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        encoder_attention_mask=legible(sizes).long(),
    )


CASES = (
    Case(
        name="Lumina2Transformer2DModel",
        config=dict(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=2,
            num_attention_heads=6, num_kv_heads=2, multiple_of=2, ffn_dim_multiplier=None, norm_eps=1e-5,
            scaling_factor=1.0, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=32,
        ),
        inputs=lumina2_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_lumina2.py; 6 heads of 2 keys, 2 refiners",
    ),
)  # fmt: skip
