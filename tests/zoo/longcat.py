"""LongCat-Image and LongCat-AudioDiT."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible


def positions(sizes: Sizes) -> Tensor:
    """(S, 3) of (1, row, column), behind those of the text."""
    rows = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in sizes.grid))
    return rows * torch.tensor([0.0, 1.0, 1.0]) + torch.tensor([1.0, sizes.text, sizes.text])


def image_inputs(sizes: Sizes) -> Inputs:
    text = torch.arange(sizes.text, dtype=torch.float32)
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        timestep=torch.rand(sizes.batch),
        guidance=None,
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        txt_ids=torch.stack([torch.zeros_like(text), text, text], dim=1),
        img_ids=positions(sizes),
    )


def audio_inputs(sizes: Sizes) -> Inputs:
    """As many moments as the grid has tokens; the last of several samples is shorter."""
    lasts = torch.ones(sizes.batch, sizes.image, dtype=torch.bool)
    if sizes.batch > 1:
        lasts[-1, sizes.image - sizes.image // 3 :] = False
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 8),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        encoder_attention_mask=legible(sizes),
        timestep=torch.rand(sizes.batch),
        attention_mask=lasts,
        latent_cond=torch.zeros(sizes.batch, sizes.image, 8),
    )


CASES = (
    Case(
        name="LongCatImageTransformer2DModel",
        config=dict(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=3, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
        ),
        inputs=image_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_longcat_image.py; 3 heads, 2 blocks each",
    ),
    Case(
        name="LongCatAudioDiTTransformer",
        config=dict(dit_dim=48, dit_depth=2, dit_heads=3, dit_text_dim=32, latent_dim=8, text_conv=True),
        inputs=audio_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_longcat_audio_dit.py; 3 heads instead of "
        "4, convolutions over the text as published",
    ),
)  # fmt: skip
