"""Allegro."""

from __future__ import annotations

from typing import Any

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, video


def inputs(sizes: Sizes) -> Inputs:
    """Two image tokens or more: of one, the class squeezes the dim away.

    Rotary embedding as AllegroPipeline makes it: a table for each axis, and the places of the tokens in them.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, rows, columns = sizes.grid
    rotary: Any = get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (rows, columns)),
        grid_size=(rows, columns),
        temporal_size=frames,
        interpolation_scale=(2.2, 2.0, 2.0),
    )
    places = torch.cartesian_prod(*(torch.arange(n) for n in sizes.grid)).T[:, None].contiguous()
    return dict(
        hidden_states=video(sizes, 4, 2),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        encoder_attention_mask=legible(sizes).long(),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        image_rotary_emb=(rotary[:3], tuple(places)),
    )


CASES = (
    Case(
        name="AllegroTransformer3DModel",
        config=dict(
            patch_size=2, patch_size_t=1, num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4,
            num_layers=2, cross_attention_dim=36, sample_height=16, sample_width=16, sample_frames=8,
            caption_channels=20,
        ),
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_allegro.py; 3 heads of 12, with rotary",
    ),
)  # fmt: skip
