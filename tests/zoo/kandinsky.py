"""Kandinsky 5 and 6."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible


def kandinsky5_inputs(sizes: Sizes, *, channels: int = 4) -> Inputs:
    """Channels at the end, and the positions of every axis for all samples."""
    frames, rows, columns = sizes.grid
    return dict(
        hidden_states=torch.randn(sizes.batch, frames, 2 * rows, 2 * columns, channels),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        timestep=torch.rand(sizes.batch) * 1000,
        pooled_projections=torch.randn(sizes.batch, 32),
        visual_rope_pos=[torch.arange(n) for n in sizes.grid],
        text_rope_pos=torch.arange(sizes.text),
        scale_factor=(1, 2, 2),
    )


def kandinsky5_picture_inputs(sizes: Sizes) -> Inputs:
    """Noise, picture and its mask along the channels."""
    return kandinsky5_inputs(sizes, channels=9)


def kandinsky6_inputs(sizes: Sizes) -> Inputs:
    """No sound. Noise, unused picture and mask along the channels."""
    frames, rows, columns = sizes.grid
    return dict(
        hidden_states=torch.randn(sizes.batch, frames, 2 * rows, 2 * columns, 9),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 8),
        pooled_projections=torch.randn(sizes.batch, 8),
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_attention_mask=legible(sizes),
    )


def kandinsky6_sound_inputs(sizes: Sizes) -> Inputs:
    return kandinsky6_inputs(sizes) | dict(audio_hidden_states=torch.randn(sizes.batch, 9, 4))


def kandinsky6_picture_inputs(sizes: Sizes) -> Inputs:
    """A picture as one more frame: it has the first frame's position, and a type of its own."""
    frames, rows, columns = sizes.grid
    types = torch.zeros(sizes.batch, frames + 1, dtype=torch.long)
    types[:, -1] = 1
    moments = torch.arange(frames + 1) % frames
    return kandinsky6_sound_inputs(sizes) | dict(
        hidden_states=torch.randn(sizes.batch, frames + 1, 2 * rows, 2 * columns, 9),
        visual_rope_pos=(moments, torch.arange(rows), torch.arange(columns)),
        visual_token_type_ids=types,
    )


def upscale_inputs(sizes: Sizes) -> Inputs:
    """No text. Rows and columns come in eights: the next multiple of those of the grid."""
    frames, rows, columns = sizes.grid
    return dict(
        hidden_states=torch.randn(sizes.batch, frames, 2 * (rows + -rows % 8), 2 * (columns + -columns % 8), 9),
        timestep=torch.rand(sizes.batch) * 1000,
    )


KANDINSKY5 = dict(
    in_visual_dim=4, in_text_dim=16, in_text_dim2=32, time_dim=32, out_visual_dim=4, patch_size=(1, 2, 2),
    model_dim=36, ff_dim=64, num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 4, 4), visual_cond=False,
)  # fmt: skip
KANDINSKY6 = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, patch_size=(1, 2, 2), model_dim=36,
    ff_dim=64, num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 4, 4), visual_cond=True, in_audio_dim=4,
    out_audio_dim=4, text_token_padding=True, ca_rope=True, cross_gates=True, fix_modulation=True,
)  # fmt: skip
KANDINSKY6_SR = dict(
    in_visual_dim=4, out_visual_dim=8, time_dim=16, patch_size=(1, 2, 2), model_dim=36, ff_dim=32,
    num_visual_blocks=2, axes_dims=(4, 4, 4), nabla_threshold=0.5, nabla_window=(1, 1, 1),
)  # fmt: skip
SOURCE5 = "diffusers, tests/pipelines/kandinsky5/test_kandinsky5.py; 3 heads of 12 channels, 2 blocks of each kind"
SOURCE6 = (
    "diffusers, tests/models/transformers/test_models_transformer_kandinsky6.py; 3 heads instead of 4, 2 blocks, "
    "the options of released checkpoints"
)

ROUNDING = "rounds queries and keys to bf16 after their rotation (transformer_kandinsky.py), whatever its weights are"

CASES = (
    Case(
        name="Kandinsky5Transformer3DModel",
        rounding=ROUNDING,
        config=KANDINSKY5,
        inputs=kandinsky5_inputs,
        source=SOURCE5,
    ),
    Case(
        name="Kandinsky5Transformer3DModel: image to video",
        rounding=ROUNDING,
        config=KANDINSKY5 | dict(visual_cond=True),
        inputs=kandinsky5_picture_inputs,
        source=SOURCE5,
    ),
    Case(name="Kandinsky6Transformer3DModel", config=KANDINSKY6, inputs=kandinsky6_sound_inputs, source=SOURCE6),
    Case(name="Kandinsky6Transformer3DModel: silent", config=KANDINSKY6, inputs=kandinsky6_inputs, source=SOURCE6),
    Case(
        name="Kandinsky6Transformer3DModel: image to video",
        config=KANDINSKY6 | dict(visual_token_type_num_embeddings=2),
        inputs=kandinsky6_picture_inputs,
        source=SOURCE6,
    ),
    Case(
        name="Kandinsky6SRTransformer3DModel",
        config=KANDINSKY6_SR,
        inputs=upscale_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_kandinsky6_sr.py; 3 heads instead of 2, "
        "a threshold and a window that leave pairs of blocks out",
        sizes=Sizes(grid=(3, 8, 16)),  # 6 blocks of 8x8 tokens
    ),
)
