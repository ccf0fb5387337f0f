"""DiT: classes instead of text."""

from __future__ import annotations

import math

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case


def inputs(sizes: Sizes) -> Inputs:
    """The class takes squares only: the largest one of at most `sizes.image` tokens."""
    side = 2 * math.isqrt(sizes.image)
    return dict(
        hidden_states=torch.randn(sizes.batch, 4, side, side),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        class_labels=torch.randint(0, 10, (sizes.batch,)),
    )


CASES = (
    Case(
        name="DiTTransformer2DModel",
        config=dict(
            num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=10,
            patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=10, norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
        inputs=inputs,
        sizes=Sizes(grid=(1, 5, 5)),
        source="diffusers, tests/models/transformers/test_models_dit_transformer2d.py; 3 heads, latents of 10 x 10",
    ),
)  # fmt: skip
