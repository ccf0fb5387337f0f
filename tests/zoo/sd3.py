"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import picture


def sd3_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=picture(sizes, 4, 2),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        pooled_projections=torch.randn(sizes.batch, 40),
        timestep=torch.rand(sizes.batch) * 1000,
    )


def control_inputs(sizes: Sizes) -> Inputs:
    """Residuals between the blocks, the second of them also after a block that is not called."""
    residuals = [torch.randn(sizes.batch, sizes.image, 24) for _ in range(3)]
    return sd3_inputs(sizes) | dict(block_controlnet_hidden_states=residuals, skip_layers=[1])


SD3 = dict(
    sample_size=64, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=3,
    joint_attention_dim=32, caption_projection_dim=24, pooled_projection_dim=40, out_channels=4, pos_embed_max_size=32,
)  # fmt: skip

CASES = (
    Case(
        name="SD3Transformer2DModel",
        config=SD3,
        inputs=sd3_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_sd3.py; 3 heads, patches of 2",
    ),
    Case(
        name="SD3Transformer2DModel: dual attention",
        config=SD3 | dict(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        inputs=sd3_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_sd3.py (3.5); 3 heads, 2 dual layers",
    ),
    Case(
        name="SD3Transformer2DModel: control residuals and a skipped layer",
        config=SD3 | dict(dual_attention_layers=(0,), qk_norm="rms_norm"),
        inputs=control_inputs,
        source="as above; residuals as diffusers.SD3ControlNetModel returns them, skip_layers as in its test",
    ),
)
