"""Ideogram 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.models import Inputs, Sizes
from tests.zoo.case import Case


def ideogram4_inputs(sizes: Sizes) -> Inputs:
    """Padding, words and picture in one sequence; the last sample has a third of padding in front of its words."""
    from diffusers.models.transformers.transformer_ideogram4 import (
        IMAGE_POSITION_OFFSET,
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
        SEQUENCE_PADDING_INDICATOR,
    )

    frames, rows, columns = sizes.grid
    total = sizes.text + sizes.image
    places = torch.cartesian_prod(torch.arange(1), torch.arange(frames * rows), torch.arange(columns))
    positions = torch.zeros(sizes.batch, total, 3, dtype=torch.long)
    segments = torch.ones(sizes.batch, total, dtype=torch.long)
    kinds = torch.full((sizes.batch, total), OUTPUT_IMAGE_INDICATOR)
    for sample in range(sizes.batch):
        padding = sizes.text // 3 if sample == sizes.batch - 1 else 0
        positions[sample, padding : sizes.text] = torch.arange(sizes.text - padding)[:, None]
        positions[sample, sizes.text :] = places + IMAGE_POSITION_OFFSET
        segments[sample, :padding] = SEQUENCE_PADDING_INDICATOR
        kinds[sample, :padding] = 0
        kinds[sample, padding : sizes.text] = LLM_TOKEN_INDICATOR
    return dict(
        hidden_states=F.pad(torch.randn(sizes.batch, sizes.image, 16), (0, 0, sizes.text, 0)),
        timestep=torch.rand(sizes.batch),
        encoder_hidden_states=F.pad(torch.randn(sizes.batch, sizes.text, 24), (0, 0, 0, sizes.image)),
        position_ids=positions,
        segment_ids=segments,
        indicator=kinds,
    )


CASES = (
    Case(
        name="Ideogram4Transformer2DModel",
        config=dict(
            in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=3, intermediate_size=32,
            adaln_dim=16, llm_features_dim=24, rope_theta=10_000, mrope_section=(2, 1, 1), norm_eps=1e-5,
        ),
        inputs=ideogram4_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_ideogram4.py; 3 heads instead of 4",
    ),
)  # fmt: skip
