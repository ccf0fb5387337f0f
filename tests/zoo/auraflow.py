"""AuraFlow."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import picture


def inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=picture(sizes, 4, 2),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        timestep=torch.rand(sizes.batch),
    )


CASES = (
    Case(
        name="AuraFlowTransformer2DModel",
        config=dict(
            sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
            attention_head_dim=16, num_attention_heads=3, joint_attention_dim=32, caption_projection_dim=48,
            out_channels=4, pos_embed_max_size=1024,
        ),
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_aura_flow.py; 3 heads instead of 4",
    ),
)  # fmt: skip
