"""PRX: only image tokens ask, text gives keys and values."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, picture


def prx_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=picture(sizes, 4, 2),
        timestep=torch.rand(sizes.batch),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        attention_mask=legible(sizes),
    )


CASES = (
    Case(
        name="PRXTransformer2DModel",
        config=dict(
            in_channels=4, patch_size=2, context_in_dim=20, hidden_size=48, mlp_ratio=2.0, num_heads=3, depth=2,
            axes_dim=[8, 8], theta=10_000, resolution_embeds=True,
        ),
        inputs=prx_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_prx.py scaled down, resolution embeddings",
    ),
)  # fmt: skip
