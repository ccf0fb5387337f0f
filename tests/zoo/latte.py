"""Latte."""

from __future__ import annotations

from functools import partial

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import video


def latte_inputs(sizes: Sizes, *, length: int) -> Inputs:
    """The class takes one frame or as many as it was built for: any other number of frames becomes rows of one."""
    frames, rows, _ = sizes.grid
    if frames != length:
        frames, rows = 1, frames * rows
    return dict(
        hidden_states=video(sizes, 4, 2),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 8),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        enable_temporal_attentions=True,
    )


def config(length: int) -> dict[str, object]:
    return dict(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=8,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        video_length=length,
    )  # fmt: skip


SOURCE = (
    "diffusers, tests/models/transformers/test_models_transformer_latte.py; 3 heads of 8 channels instead of 2 of 4"
)

CASES = (
    Case(name="LatteTransformer3DModel", config=config(2), inputs=partial(latte_inputs, length=2), source=SOURCE),
    Case(
        name="LatteTransformer3DModel: video",
        config=config(5),
        inputs=partial(latte_inputs, length=5),
        source=SOURCE,
        sizes=Sizes(grid=(5, 3, 5)),  # with one frame, attention across frames does nothing
    ),
)
