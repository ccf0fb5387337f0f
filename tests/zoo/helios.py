"""Helios."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import video


def plain_inputs(sizes: Sizes) -> Inputs:
    """No history."""
    return dict(
        hidden_states=video(sizes, 4, 2),
        timestep=torch.randint(0, 999, (sizes.batch,)),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
    )


def history_inputs(sizes: Sizes) -> Inputs:
    """Long, mid and short history in front of the noise; frame indices of batch 1, as the pipeline."""
    frames, rows, columns = sizes.grid
    start, long, mid, short, noise = torch.arange(0, 8 + frames)[None].split([1, 4, 2, 1, frames], dim=1)

    def history(count: int) -> Tensor:
        return torch.randn(sizes.batch, 4, count, 2 * rows, 2 * columns)

    return plain_inputs(sizes) | dict(
        indices_hidden_states=noise,
        indices_latents_history_short=torch.cat([start, short], dim=1),
        indices_latents_history_mid=mid,
        indices_latents_history_long=long,
        latents_history_short=history(2),
        latents_history_mid=history(2),
        latents_history_long=history(4),
    )


CONFIG = dict(
    patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_dim=(4, 4, 4),
    has_multi_term_memory_patch=True, guidance_cross_attn=True, zero_history_timestep=True, is_amplify_history=False,
)  # fmt: skip
SOURCE = "diffusers, tests/models/transformers/test_models_transformer_helios.py; 3 heads instead of 2"

CASES = (
    Case(name="HeliosTransformer3DModel", config=CONFIG, inputs=history_inputs, source=SOURCE),
    Case(name="HeliosTransformer3DModel: no history", config=CONFIG, inputs=plain_inputs, source=SOURCE),
    Case(
        name="HeliosTransformer3DModel: amplified history",
        config=CONFIG | dict(is_amplify_history=True, guidance_cross_attn=False, zero_history_timestep=False),
        inputs=history_inputs,
        source=f"{SOURCE}; the keys of the history scaled for each head, text and time for the history too",
        sizes=Sizes(grid=(6, 2, 3)),  # more noise than history, which takes nearly all of the attention
    ),
)
