"""Nucleus-Image: only image tokens ask, grouped-query heads, and experts that choose among all tokens of a sample."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible


def nucleus_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 16),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        encoder_hidden_states_mask=legible(sizes).long(),
        timestep=torch.rand(sizes.batch),
        img_shapes=[sizes.grid] * sizes.batch,
    )


NUCLEUS = dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
    num_key_value_heads=2, joint_attention_dim=20, axes_dims_rope=(8, 4, 4), num_experts=3, moe_intermediate_dim=32,
    dense_moe_strategy="leave_first_block_dense", capacity_factors=[2.0, 2.0, 1.0], use_sigmoid=True,
)  # fmt: skip

CASES = (
    Case(
        name="NucleusMoEImageTransformer2DModel",
        config=NUCLEUS,
        inputs=nucleus_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_nucleusmoe_image.py; experts, GQA",
    ),
)
