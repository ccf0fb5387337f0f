"""Sana and Sana-Video: linear self-attention, and convolutions over the tokens' grid."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, picture, video


def sana_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=picture(sizes, 4, 1),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        encoder_attention_mask=legible(sizes).long(),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
    )


def sprint_inputs(sizes: Sizes) -> Inputs:
    return sana_inputs(sizes) | dict(timestep=torch.rand(sizes.batch), guidance=torch.rand(sizes.batch))


def control_inputs(sizes: Sizes) -> Inputs:
    """Residuals after the second and the third block."""
    residuals = tuple(torch.randn(sizes.batch, sizes.image, 24) for _ in range(2))
    return sana_inputs(sizes) | dict(controlnet_block_samples=residuals)


def video_inputs(sizes: Sizes) -> Inputs:
    return sana_inputs(sizes) | dict(hidden_states=video(sizes, 4, 2))


def image_to_video_inputs(sizes: Sizes) -> Inputs:
    """A timestep for every token, 0 for those of the first frame."""
    timestep = torch.randint(1, 1000, (sizes.batch, 1, 1, 1, 1)).float().repeat(1, 1, *sizes.grid)
    timestep[:, :, 0] = 0
    return video_inputs(sizes) | dict(timestep=timestep)


SANA = dict(
    patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3,
    num_cross_attention_heads=3, cross_attention_head_dim=8, cross_attention_dim=24, caption_channels=20,
    sample_size=32,
)  # fmt: skip
VIDEO = dict(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=12, num_layers=2,
    num_cross_attention_heads=3, cross_attention_head_dim=12, cross_attention_dim=36, caption_channels=20,
    mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
)  # fmt: skip

CASES = (
    Case(
        name="SanaTransformer2DModel",
        config=SANA,
        inputs=sana_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_sana.py; 3 heads, 2 layers",
    ),
    Case(
        name="SanaTransformer2DModel: sprint",
        config=SANA | dict(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        inputs=sprint_inputs,
        source="as above; norms and guidance of Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
    ),
    Case(
        name="SanaTransformer2DModel: control residuals",
        config=SANA | dict(num_layers=3),
        inputs=control_inputs,
        source="as above, 3 layers; residuals as diffusers.SanaControlNetModel returns them",
    ),
    Case(
        name="SanaVideoTransformer3DModel",
        config=VIDEO,
        inputs=video_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_sana_video.py; 3 heads instead of 2",
        sizes=Sizes(grid=(3, 3, 5)),  # a convolution over frames, too
    ),
    Case(
        name="SanaVideoTransformer3DModel: image to video",
        config=VIDEO,
        inputs=image_to_video_inputs,
        source="as above; timesteps as pipelines/sana_video/pipeline_sana_video_i2v.py passes them",
        sizes=Sizes(grid=(3, 3, 5)),
    ),
)
