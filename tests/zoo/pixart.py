"""PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, picture


def pixart_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=picture(sizes, 4, 2),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        encoder_attention_mask=legible(sizes).long(),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def sized_inputs(sizes: Sizes) -> Inputs:
    frames, rows, columns = sizes.grid
    height, width = 16.0 * frames * rows, 16.0 * columns
    return pixart_inputs(sizes) | dict(
        added_cond_kwargs={
            "resolution": torch.tensor([[height, width]]).repeat(sizes.batch, 1),
            "aspect_ratio": torch.tensor([[height / width]]).repeat(sizes.batch, 1),
        },
    )


PIXART = dict(
    sample_size=16, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=3, in_channels=4,
    cross_attention_dim=48, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    caption_channels=20, use_additional_conditions=False,
)  # fmt: skip

CASES = (
    Case(
        name="PixArtTransformer2DModel",
        config=PIXART,
        inputs=pixart_inputs,
        source="diffusers, tests/models/transformers/test_models_pixart_transformer2d.py; 3 heads, caption_channels",
    ),
    Case(
        name="PixArtTransformer2DModel: size conditions",
        config=PIXART | dict(use_additional_conditions=True),
        inputs=sized_inputs,
        source="as above; added_cond_kwargs as pipelines/pixart_alpha/pipeline_pixart_alpha.py passes them",
    ),
)
