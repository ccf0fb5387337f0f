"""Bria 3.2, FIBO and FIBO 2."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes, positions
from tests.zoo.case import Case
from tests.zoo.inputs import legible, picture


def bria_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        timestep=torch.rand(sizes.batch) * 1000,
        img_ids=positions(sizes.grid, 3),
        txt_ids=torch.zeros(sizes.text, 3),
    )


def bria_control_inputs(sizes: Sizes) -> Inputs:
    """Residuals for the blocks of two streams; those of one stream go to a slice that the class gets wrong."""
    return bria_inputs(sizes) | dict(
        controlnet_block_samples=[torch.randn(sizes.batch, sizes.image, 48) for _ in range(2)]
    )


def fibo_inputs(sizes: Sizes) -> Inputs:
    """States of one layer of the text encoder for every block; the mask of text and image goes to the attentions."""
    mask = torch.cat([legible(sizes), torch.ones(sizes.batch, sizes.image, dtype=torch.bool)], dim=1)
    return bria_inputs(sizes) | dict(
        text_encoder_layers=[torch.randn(sizes.batch, sizes.text, 20) for _ in range(4)],
        joint_attention_kwargs=dict(attention_mask=mask[:, None, None, :]),
    )


def fibo2_inputs(sizes: Sizes) -> Inputs:
    """Text states for the Perceiver and for the one injection block. Samples differ in how many tokens are legible, and
    with that in their number of gist tokens."""
    return dict(
        hidden_states=picture(sizes, 4, 2),
        timestep=torch.rand(sizes.batch),
        encoder_hidden_states=torch.randn(sizes.batch, 2, sizes.text, 24),
        encoder_attention_mask=legible(sizes),
    )


def fibo2_edit_inputs(sizes: Sizes) -> Inputs:
    """Two images of other sizes; without a mask the gist comes first instead of last."""
    frames, rows, columns = sizes.grid
    images = [torch.randn(sizes.batch, 4, 2 * frames * rows, 2), torch.randn(sizes.batch, 4, 2, 2 * columns)]
    return fibo2_inputs(sizes) | dict(encoder_attention_mask=None, context_latents=images)


FLUX_LIKE = dict(
    patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
    joint_attention_dim=32, axes_dims_rope=[4, 4, 8],
)  # fmt: skip
FIBO2 = dict(
    in_channels=4, patch_size=2, dim=48, n_layers=3, n_refiner_layers=2, n_heads=3, cap_feat_dim=24,
    injection_layer_ids=(1,), perceiver_num_layers=2, min_num_gist_tokens=3, max_num_gist_tokens=9, gist_step=2,
    gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(16, 64, 64),
)  # fmt: skip

CASES = (
    Case(
        name="BriaTransformer2DModel",
        config=FLUX_LIKE,
        inputs=bria_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_bria.py; 3 heads instead of 2",
    ),
    Case(
        name="BriaTransformer2DModel: control residuals",
        config=FLUX_LIKE | dict(num_layers=3),
        inputs=bria_control_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_bria.py; residuals as for FLUX.1",
    ),
    Case(
        name="BriaFiboTransformer2DModel",
        config=FLUX_LIKE | dict(text_encoder_dim=20),
        inputs=fibo_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_bria_fibo.py; 3 heads, with a mask",
    ),
    Case(
        name="BriaFibo2Transformer2DModel",
        config=FIBO2,
        inputs=fibo2_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_bria_fibo2.py; 3 heads instead of 2",
    ),
    Case(
        name="BriaFibo2Transformer2DModel: images to edit",
        config=FIBO2,
        inputs=fibo2_edit_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_bria_fibo2.py; 3 heads instead of 2",
    ),
)
