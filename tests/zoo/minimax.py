"""MiniMax-H3 and MiniMax Music 3."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case

AUDIO = 6
"""Moments of sound."""


def video_inputs(sizes: Sizes, *, pictures: int = 0) -> Inputs:
    """One layout for all samples: words, clean pictures, sound, noise. Times: noise, sound, pictures."""
    _, rows, columns = sizes.grid
    lengths = [sizes.text, pictures * rows * columns, AUDIO, sizes.image]
    text, clean, audio, noise = torch.arange(sum(lengths)).split(lengths)
    tags, times = torch.zeros(2, sum(lengths), dtype=torch.long)
    tags[text], tags[audio] = 1, 2
    times[audio], times[clean] = 1, 2
    positions = torch.zeros(sum(lengths), 3, dtype=torch.float64)
    positions[text, 0] = torch.arange(sizes.text, dtype=torch.float64)
    positions[audio, 0] = sizes.text + torch.arange(AUDIO).double() / 4
    start = torch.tensor([sizes.text, 0, 0])
    positions[noise] = (torch.cartesian_prod(*(torch.arange(n) for n in sizes.grid)) + start).double()
    if pictures:
        places = [torch.arange(n) for n in (pictures, rows, columns)]
        positions[clean] = (torch.cartesian_prod(*places) + start).double()
    return dict(
        hidden_states=torch.randn(sizes.batch, len(clean) + len(noise), 16),
        audio_hidden_states=torch.randn(sizes.batch, AUDIO, 6),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 8),
        timestep=torch.tensor([0.7, 0.3, 0.999] if pictures else [0.7, 0.3]),
        timestep_indices=times,
        token_tags=tags,
        position_ids=positions,
        video_indices=torch.cat([clean, noise]),
        audio_indices=audio,
        text_indices=text,
    )


def picture_inputs(sizes: Sizes) -> Inputs:
    """A clean first frame in front of the sound: the video's rows lie in two places."""
    return video_inputs(sizes, pictures=1)


def music_inputs(sizes: Sizes) -> Inputs:
    """As many moments as the grid has tokens; the condition has the same length, so `sizes.text` does not count."""
    return dict(
        hidden_states=torch.randn(sizes.batch, 8, sizes.image),
        timestep=torch.rand(sizes.batch),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.image, 16),
    )


VIDEO = dict(
    num_attention_heads=3, attention_head_dim=16, hidden_size=24, num_layers=2, num_refiner_layers=2, ffn_dim=32,
    in_channels=4, audio_in_channels=6, patch_size=(1, 2, 2), text_dim=8, freq_dim=8, time_embed_hidden_dim=24,
    time_embed_dim=16, rope_freq_dim=2,
)  # fmt: skip
MUSIC = dict(
    in_channels=8, condition_dim=16, num_layers=2, num_attention_heads=3, attention_head_dim=8, ff_inner_dim=32,
    rotary_dim=4, fourier_embedding_dim=8,
)  # fmt: skip
VIDEO_TEST = "diffusers, tests/models/transformers/test_models_transformer_minimax_h3.py; 3 heads instead of 2"
MUSIC_TEST = "diffusers, tests/models/transformers/test_models_transformer_minimax_music3.py; 3 heads instead of 2"

CASES = (
    Case(name="MiniMaxH3Transformer3DModel", config=VIDEO, inputs=video_inputs, source=VIDEO_TEST),
    Case(name="MiniMaxH3Transformer3DModel: image to video", config=VIDEO, inputs=picture_inputs, source=VIDEO_TEST),
    Case(name="MiniMaxMusic3Transformer1DModel", config=MUSIC, inputs=music_inputs, source=MUSIC_TEST),
)
