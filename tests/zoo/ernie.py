"""ERNIE-Image."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import picture


def inputs(sizes: Sizes) -> Inputs:
    """The last sample's text lacks its last third; the class knows lengths only, and so no holes elsewhere."""
    lengths = torch.full((sizes.batch,), sizes.text)
    lengths[-1] -= sizes.text // 3
    return dict(
        hidden_states=picture(sizes, 4, 2),
        timestep=torch.rand(sizes.batch) * 1000,
        text_bth=torch.randn(sizes.batch, sizes.text, 32),
        text_lens=lengths,
    )


CASES = (
    Case(
        name="ErnieImageTransformer2DModel",
        config=dict(
            hidden_size=48, num_attention_heads=3, num_layers=2, ffn_hidden_size=64, in_channels=4, out_channels=4,
            patch_size=2, text_in_dim=32, rope_theta=256, rope_axes_dim=(4, 6, 6),
        ),
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_ernie_image.py; 3 heads and 2 blocks",
    ),
)  # fmt: skip
