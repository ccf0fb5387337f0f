"""CogView 3 Plus and CogView 4."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, picture


def inputs(sizes: Sizes) -> Inputs:
    frames, rows, columns = sizes.grid
    size = torch.tensor([16 * frames * rows, 16 * columns]).expand(sizes.batch, -1)
    return dict(
        hidden_states=picture(sizes, 4, 2),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(sizes.batch, 2, dtype=torch.int64),
    )


def masked_inputs(sizes: Sizes) -> Inputs:
    """No pipeline passes the mask, and the class adds it to the scores as 0 and 1 instead of excluding keys."""
    return inputs(sizes) | dict(attention_mask=legible(sizes).int())


CONFIG = dict(
    patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3, out_channels=4,
    text_embed_dim=16, time_embed_dim=16, condition_dim=4, pos_embed_max_size=32, sample_size=16,
)  # fmt: skip

CASES = (
    Case(
        name="CogView3PlusTransformer2DModel",
        config=CONFIG,
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_cogview3plus.py; 3 heads instead of 2",
    ),
    Case(
        name="CogView4Transformer2DModel",
        config=CONFIG | dict(rope_axes_dim=(32, 32)),
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_cogview4.py; 3 heads instead of 4",
    ),
    Case(
        name="CogView4Transformer2DModel: text mask",
        config=CONFIG | dict(rope_axes_dim=(32, 32)),
        inputs=masked_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_cogview4.py; 3 heads, with a mask",
    ),
)
