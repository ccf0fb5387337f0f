"""SkyReels-V2."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import video


def skyreels_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=video(sizes, 4, 2),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
    )


def image_to_video_inputs(sizes: Sizes) -> Inputs:
    """Image tokens before the text in the cross-attention, which takes the last 512 of both as text."""
    return skyreels_inputs(sizes) | dict(
        hidden_states=video(sizes, 12, 2),
        encoder_hidden_states=torch.randn(sizes.batch, 512, 16),
        encoder_hidden_states_image=torch.randn(sizes.batch, 5, 20),
    )


def diffusion_forcing_inputs(sizes: Sizes) -> Inputs:
    """A timestep for every frame; a frame sees its own pair of frames and those before, so frames are even."""
    frames, _, _ = sizes.grid
    frames += frames % 2
    return dict(
        hidden_states=video(sizes, 4, 2),
        timestep=torch.randint(0, 1000, (sizes.batch, frames)),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        enable_diffusion_forcing=True,
        fps=[1] * sizes.batch,
    )


SKYREELS = dict(
    patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
)  # fmt: skip

CASES = (
    Case(
        name="SkyReelsV2Transformer3DModel",
        config=SKYREELS,
        inputs=skyreels_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_skyreels_v2.py; 3 heads instead of 2",
    ),
    Case(
        name="SkyReelsV2Transformer3DModel: diffusion forcing",
        config=SKYREELS | dict(num_frame_per_block=2),
        inputs=diffusion_forcing_inputs,
        source="as above; called as pipeline_skyreels_v2_diffusion_forcing.py does, causal_block_size 2",
        sizes=Sizes(grid=(6, 3, 3)),  # an even number of frames, three blocks of them
    ),
    Case(
        name="SkyReelsV2Transformer3DModel: image to video",
        config=SKYREELS | dict(in_channels=12, image_dim=20, added_kv_proj_dim=36),
        inputs=image_to_video_inputs,
        source="as above; Skywork/SkyReels-V2-I2V-14B-540P-Diffusers scaled down, 5 image tokens instead of 257",
        sizes=Sizes(text=512),  # SkyReelsV2AttnProcessor has this length hardcoded
    ),
)
