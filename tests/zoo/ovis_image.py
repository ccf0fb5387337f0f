"""Ovis-Image."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes, positions
from tests.zoo.case import Case


def ovis_inputs(sizes: Sizes) -> Inputs:
    words = torch.arange(sizes.text, dtype=torch.float32)
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        timestep=torch.rand(sizes.batch),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        txt_ids=torch.stack([torch.zeros(sizes.text), words, words], 1),
        img_ids=positions(sizes.grid, 3),
    )


CASES = (
    Case(
        name="OvisImageTransformer2DModel",
        config=dict(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=3, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        ),
        inputs=ovis_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_ovis_image.py; 3 heads, 2 layers of each",
    ),
)  # fmt: skip
