"""The transformer inside DreamLite's U-Net."""

from __future__ import annotations

from typing import Any

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case, Prepared
from tests.zoo.inputs import legible, picture


def inputs(sizes: Sizes) -> Inputs:
    """Features, not latents: every pixel is a token."""
    return dict(
        hidden_states=picture(sizes, 48, 1),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        encoder_attention_mask=legible(sizes),
    )


def share_keys(model: Any) -> None:
    """As the U-Net does; the processor that the class gives itself cannot group heads."""
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    for block in model.transformer_blocks:
        block.attn1.set_processor(DreamLiteAttnProcessor2_0())
        block.attn2.set_processor(DreamLiteAttnProcessor2_0())


CONFIG = dict(
    num_attention_heads=3, attention_head_dim=16, in_channels=48, num_layers=2, norm_num_groups=4,
    cross_attention_dim=32, use_linear_projection=True, qk_norm="rms_norm", ff_mult=2,
)  # fmt: skip
SOURCE = "diffusers 0.42.1, models/unets/unet_dreamlite.py, scaled down"

CASES = (
    Case(name="DreamLiteTransformer2DModel", config=CONFIG, inputs=inputs, source=SOURCE),
    Prepared(
        name="DreamLiteTransformer2DModel: grouped queries",
        config=CONFIG | dict(num_attention_heads=4, attention_head_dim=12, num_kv_heads=2),
        inputs=inputs,
        prepare=share_keys,
        source=SOURCE,
    ),
    Case(
        name="DreamLiteTransformer2DModel: no self-attention",
        config=CONFIG | dict(use_self_attention=False),
        inputs=inputs,
        source=SOURCE,
    ),
)
