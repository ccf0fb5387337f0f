"""EasyAnimate."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import video


def inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=video(sizes, 4, 2),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
    )


def inpaint_inputs(sizes: Sizes) -> Inputs:
    """The second encoder's 5 tokens of text come after the first's."""
    return inputs(sizes) | dict(
        encoder_hidden_states_t5=torch.randn(sizes.batch, 5, 16),
        inpaint_latents=video(sizes, 5, 2),
    )


CONFIG = dict(
    num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=3,
    mmdit_layers=2, time_embed_dim=8, text_embed_dim=16, add_norm_text_encoder=True,
)  # fmt: skip

CASES = (
    Case(
        name="EasyAnimateTransformer3DModel",
        config=CONFIG,
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_easyanimate.py; 3 heads, 3 blocks",
    ),
    Case(
        name="EasyAnimateTransformer3DModel: inpainting",
        config=CONFIG | dict(in_channels=9, text_embed_dim_t5=16, after_norm=True),
        inputs=inpaint_inputs,
        source="diffusers 0.42.1, pipelines/easyanimate/pipeline_easyanimate_inpaint.py, scaled down; with T5",
    ),
)
