"""LTX-Video and LTX-2."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible

AUDIO = 9
"""Frames of sound."""


def ltx_inputs(sizes: Sizes) -> Inputs:
    frames, rows, columns = sizes.grid
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_attention_mask=legible(sizes),
        num_frames=frames,
        height=rows,
        width=columns,
        rope_interpolation_scale=(8 / 25, 32, 32),
    )


def first_frame_clean(sizes: Sizes) -> Tensor:
    """(B, S): a time for every token, 0 in the first frame."""
    _, rows, columns = sizes.grid
    times = (torch.rand(sizes.batch, 1) * 1000).repeat(1, sizes.image)
    times[:, : rows * columns] = 0
    return times


def positions(sizes: Sizes) -> Tensor:
    """(B, 3, S) of frame, row and column in pixels."""
    grid = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in sizes.grid))
    return (grid * torch.tensor([8 / 25, 32, 32])).T[None].repeat(sizes.batch, 1, 1)


def ltx_picture_inputs(sizes: Sizes) -> Inputs:
    """As the pipeline with conditions: a time for every token, and coordinates instead of a grid."""
    values = ltx_inputs(sizes) | dict(timestep=first_frame_clean(sizes), video_coords=positions(sizes))
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del values[name]
    return values


def ltx2_inputs(sizes: Sizes) -> Inputs:
    frames, rows, columns = sizes.grid
    mask = legible(sizes).long()
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        audio_hidden_states=torch.randn(sizes.batch, AUDIO, 4),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        audio_encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_attention_mask=mask,
        audio_encoder_attention_mask=mask,
        num_frames=frames,
        height=rows,
        width=columns,
        fps=25.0,
        audio_num_frames=AUDIO,
    )


def ltx23_inputs(sizes: Sizes) -> Inputs:
    """LTX-2.3, picture to video, the call for spatio-temporal guidance: block 1 uses its values without attention."""
    sigma = torch.rand(sizes.batch) * 1000
    return ltx2_inputs(sizes) | dict(
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 24),
        audio_encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 12),
        timestep=first_frame_clean(sizes),
        audio_timestep=sigma,
        sigma=sigma,
        use_cross_timestep=True,
        spatio_temporal_guidance_blocks=[1],
    )


def ltx2_reference_inputs(sizes: Sizes) -> Inputs:
    """The grid's tokens and 6 of a reference, which attend to each other less; the mask is expanded, as usual."""
    noise, total = sizes.image, sizes.image + 6
    strength = torch.full((total, total), 0.9999)
    strength[:noise, :noise] = 1
    strength[noise:, noise:] = 1
    corners = torch.cat([positions(sizes), torch.rand(sizes.batch, 3, 6)], dim=2)
    return ltx2_inputs(sizes) | dict(
        hidden_states=torch.randn(sizes.batch, total, 4),
        timestep=torch.rand(sizes.batch, total) * 1000,
        audio_timestep=torch.rand(sizes.batch) * 1000,
        video_coords=torch.stack([corners, corners + 1], dim=-1),
        video_self_attention_mask=strength[None].expand(sizes.batch, -1, -1),
    )


LTX = dict(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=8, cross_attention_dim=24, num_layers=2,
    qk_norm="rms_norm_across_heads", caption_channels=16,
)  # fmt: skip
LTX2 = dict(
    in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=3, attention_head_dim=8,
    cross_attention_dim=24, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=3,
    audio_attention_head_dim=4, audio_cross_attention_dim=12, num_layers=2, qk_norm="rms_norm_across_heads",
    caption_channels=16, rope_double_precision=False,
)  # fmt: skip
LTX23 = LTX2 | dict(
    num_layers=3, gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True,
    use_prompt_embeddings=False, perturbed_attn=True, rope_type="split", rope_double_precision=True,
)  # fmt: skip
LTX_TEST = "diffusers, tests/models/transformers/test_models_transformer_ltx.py; 3 heads instead of 2, 2 blocks"
LTX2_TEST = "diffusers, tests/models/transformers/test_models_transformer_ltx2.py; 3 heads instead of 2"

CASES = (
    Case(name="LTXVideoTransformer3DModel", config=LTX, inputs=ltx_inputs, source=LTX_TEST),
    Case(
        name="LTXVideoTransformer3DModel: image to video",
        config=LTX,
        inputs=ltx_picture_inputs,
        source=LTX_TEST,
        sizes=Sizes(grid=(3, 3, 5)),  # the first frame's tokens have another time
    ),
    Case(name="LTX2VideoTransformer3DModel", config=LTX2, inputs=ltx2_inputs, source=LTX2_TEST),
    Case(
        name="LTX2VideoTransformer3DModel: 2.3, image to video, guidance",
        config=LTX23,
        inputs=ltx23_inputs,
        source=f"{LTX2_TEST}; the options that the class calls LTX-2.3",
        sizes=Sizes(grid=(3, 3, 5)),
    ),
    Case(
        name="LTX2VideoTransformer3DModel: reference tokens",
        config=LTX2,
        inputs=ltx2_reference_inputs,
        source=f"{LTX2_TEST}; inputs as pipelines/ltx2/pipeline_ltx2_ic_lora.py",
    ),
)
