"""Chroma: FLUX.1 with a mask of the text and modulations from one small network."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes, positions
from tests.zoo.case import Case
from tests.zoo.inputs import legible


def inputs(sizes: Sizes) -> Inputs:
    """The mask covers text and image and is a float of 0 and 1, as the pipeline makes it: added to the scores."""
    mask = torch.cat([legible(sizes), torch.ones(sizes.batch, sizes.image, dtype=torch.bool)], dim=1)
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        timestep=torch.rand(sizes.batch),
        img_ids=positions(sizes.grid, 3),
        txt_ids=torch.zeros(sizes.text, 3),
        attention_mask=mask.float(),
    )


def control_inputs(sizes: Sizes) -> Inputs:
    """Residuals of a ControlNet that is shallower than the model: two for three blocks."""
    residuals = [torch.randn(sizes.batch, sizes.image, 48) for _ in range(4)]
    return inputs(sizes) | dict(controlnet_block_samples=residuals[:2], controlnet_single_block_samples=residuals[2:])


CONFIG = dict(
    patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
    joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
    approximator_layers=1,
)  # fmt: skip

CASES = (
    Case(
        name="ChromaTransformer2DModel",
        config=CONFIG,
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_chroma.py; 3 heads, with a mask",
    ),
    Case(
        name="ChromaTransformer2DModel: control residuals",
        config=CONFIG | dict(num_layers=3, num_single_layers=3),
        inputs=control_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_chroma.py; residuals as for FLUX.1",
    ),
)
