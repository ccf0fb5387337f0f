"""Krea 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible


def krea2_inputs(sizes: Sizes) -> Inputs:
    """Three layers of the text encoder for every word; positions of words and picture in one tensor."""
    rows = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in sizes.grid))
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 16),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 3, 24),
        timestep=torch.rand(sizes.batch),
        position_ids=F.pad(rows[:, 1:], (1, 0, sizes.text, 0)),
        encoder_attention_mask=legible(sizes),
    )


CASES = (
    Case(
        name="Krea2Transformer2DModel",
        config=dict(
            in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=6, num_key_value_heads=2,
            intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=24, num_text_layers=3,
            text_num_attention_heads=3, text_num_key_value_heads=3, text_intermediate_size=16,
            num_layerwise_text_blocks=2, num_refiner_text_blocks=2, axes_dims_rope=(4, 2, 2),
        ),
        inputs=krea2_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_krea2.py; 6 heads of 2 keys, 2 blocks",
    ),
)  # fmt: skip
