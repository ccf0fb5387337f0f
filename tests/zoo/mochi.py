"""Mochi 1."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, video


def mochi_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=video(sizes, 4, 2),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_attention_mask=legible(sizes),
    )


CASES = (
    Case(
        name="MochiTransformer3DModel",
        config=dict(
            patch_size=2, num_attention_heads=3, attention_head_dim=8, num_layers=3, pooled_projection_dim=16,
            in_channels=4, out_channels=None, qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4,
            activation_fn="swiglu", max_sequence_length=16,
        ),
        inputs=mochi_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_mochi.py; 3 heads and 3 blocks instead "
        "of 2: the last block drops the text",
    ),
)  # fmt: skip
