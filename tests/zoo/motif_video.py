"""Motif-Video."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, video


def motif_inputs(sizes: Sizes) -> Inputs:
    """Noise, picture and its mask along the channels."""
    return dict(
        hidden_states=video(sizes, 9, 2),
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        encoder_attention_mask=legible(sizes),
    )


def motif_picture_inputs(sizes: Sizes) -> Inputs:
    return motif_inputs(sizes) | dict(image_embeds=torch.randn(sizes.batch, 5, 4))


CONFIG = dict(
    in_channels=9, out_channels=4, num_attention_heads=3, attention_head_dim=12, num_layers=2, num_single_layers=4,
    num_decoder_layers=2, mlp_ratio=4.0, patch_size=2, patch_size_t=1, qk_norm="rms_norm", norm_type="layer_norm",
    text_embed_dim=32, image_embed_dim=4, rope_axes_dim=(4, 4, 4), enable_text_cross_attention_dual=True,
    enable_text_cross_attention_single=True,
)  # fmt: skip
SOURCE = (
    "diffusers, tests/models/transformers/test_models_transformer_motif_video.py; 3 heads instead of 2, 2 blocks of "
    "each kind with all options, the default patch size"
)

CASES = (
    Case(name="MotifVideoTransformer3DModel", config=CONFIG, inputs=motif_inputs, source=SOURCE),
    Case(
        name="MotifVideoTransformer3DModel: image to video", config=CONFIG, inputs=motif_picture_inputs, source=SOURCE
    ),
    Case(
        name="MotifVideoTransformer3DModel: no decoder",
        config=CONFIG
        | dict(
            num_single_layers=2,
            num_decoder_layers=0,
            enable_text_cross_attention_dual=False,
            enable_text_cross_attention_single=False,
        ),
        inputs=motif_inputs,
        source=SOURCE,
    ),
)
