"""JoyImage-Edit and JoyImage-Edit-Plus."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, video


def edit_inputs(sizes: Sizes, *, items: int = 2) -> Inputs:
    """(B, items, C, F, H, W): pictures to look at, and the noise at the end."""
    return dict(
        hidden_states=torch.stack([video(sizes, 4, 2) for _ in range(items)], dim=1),
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
    )


def plain_inputs(sizes: Sizes) -> Inputs:
    """Noise alone."""
    return edit_inputs(sizes, items=1)


def plus_inputs(sizes: Sizes, *, references: bool = True) -> Inputs:
    """(B, patches, C, 1, 2, 2): the noise, then pictures of other sizes; the last sample has one less, and padding."""
    pictures = [sizes.grid, (1, 2, 3), (1, 3, 1)] if references else [sizes.grid]
    shapes = [list(pictures) for _ in range(sizes.batch)]
    if references:
        shapes[-1].pop()
    patches = torch.zeros(sizes.batch, max(map(count, shapes)), 4, 1, 2, 2)
    for sample, shape in enumerate(shapes):
        patches[sample, : count(shape)] = torch.randn(count(shape), 4, 1, 2, 2)
    return dict(
        hidden_states=patches,
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        encoder_hidden_states_mask=legible(sizes).long(),
        shape_list=shapes,
    )


def plus_plain_inputs(sizes: Sizes) -> Inputs:
    """Noise alone: nothing is padded."""
    return plus_inputs(sizes, references=False)


def count(shape: list[tuple[int, int, int]]) -> int:
    """Patches of all pictures."""
    return sum(Sizes(grid).image for grid in shape)


CONFIG = dict(
    patch_size=[1, 2, 2], in_channels=4, hidden_size=48, num_attention_heads=3, text_dim=16, num_layers=2,
    rope_dim_list=[4, 6, 6], theta=256,
)  # fmt: skip
EDIT = "diffusers, tests/models/transformers/test_models_transformer_joyimage.py; 3 heads instead of 2, 4 channels"
PLUS = "diffusers, tests/models/transformers/test_models_transformer_joyimage_edit_plus.py; 3 heads, 4 channels"

CASES = (
    Case(name="JoyImageEditTransformer3DModel", config=CONFIG, inputs=plain_inputs, source=EDIT),
    Case(
        name="JoyImageEditTransformer3DModel: edit",
        config=CONFIG | dict(rope_type="mrope"),
        inputs=edit_inputs,
        source=f"{EDIT}; positions for the text too",
    ),
    Case(name="JoyImageEditPlusTransformer3DModel", config=CONFIG, inputs=plus_plain_inputs, source=PLUS),
    Case(name="JoyImageEditPlusTransformer3DModel: edit", config=CONFIG, inputs=plus_inputs, source=PLUS),
)
