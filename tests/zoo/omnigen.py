"""OmniGen: one sequence of text, a token of the timestep, and image, with a mask that is causal in the text."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import picture


def omnigen_inputs(sizes: Sizes, images: int = 0) -> Inputs:
    """As OmniGenCollator: the last sample's text is a third shorter, with padding before it. An input image is as
    large as the output and stands amid the text, from the second word on."""
    frames, rows, columns = sizes.grid
    text = sizes.text + images * sizes.image
    length = text + 1 + sizes.image
    mask = torch.ones(length, length).tril().repeat(sizes.batch, 1, 1)
    mask[:, text + 1 :] = 1
    padding = sizes.text // 3
    mask[-1, :, :padding] = 0
    mask[-1, :padding] = 1
    positions = torch.arange(length).repeat(sizes.batch, 1)
    positions[-1] = (positions[-1] - padding).clamp_min(0)
    spans: dict[int, list[list[int]]] = {}
    for sample in range(sizes.batch if images else 0):
        start = min(padding + 1, sizes.text)
        spans[sample] = [[start, start + sizes.image]]
        mask[sample, start : start + sizes.image, start : start + sizes.image] = 1
    return dict(
        hidden_states=picture(sizes, 4, 2),
        timestep=torch.rand(sizes.batch),
        input_ids=torch.randint(3, 50, (sizes.batch, text)),
        input_img_latents=[torch.randn(1, 4, 2 * frames * rows, 2 * columns) for _ in spans],
        input_image_sizes=spans,
        attention_mask=mask,
        position_ids=positions,
    )


OMNIGEN = dict(
    in_channels=4, patch_size=2, hidden_size=48, num_attention_heads=3, num_key_value_heads=3, intermediate_size=64,
    num_layers=2, pad_token_id=0, vocab_size=50, time_step_dim=32, pos_embed_max_size=32,
    rope_scaling={"long_factor": list(range(1, 9)), "short_factor": list(range(1, 9))},
)  # fmt: skip

CASES = (
    Case(
        name="OmniGenTransformer2DModel",
        config=OMNIGEN,
        inputs=omnigen_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_omnigen.py; 3 heads, 2 layers",
    ),
    Case(
        name="OmniGenTransformer2DModel: input images",
        config=OMNIGEN,
        inputs=lambda sizes: omnigen_inputs(sizes, images=1),
        source="as above; masks as pipelines/omnigen/processor_omnigen.py makes them",
    ),
)
