"""ChronoEdit: Wan with a gap in time between two frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import video

PADDED_TEXT = 512
"""Where there are image embeddings, the class takes all but the last 512 tokens for the image."""


def inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=video(sizes, 4, 2),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
    )


def image_inputs(sizes: Sizes) -> Inputs:
    """Text padded with zeros, as the pipeline pads it; 7 tokens of the image."""
    values = inputs(sizes)
    text = F.pad(values["encoder_hidden_states"], (0, 0, 0, PADDED_TEXT - sizes.text))
    return values | dict(encoder_hidden_states=text, encoder_hidden_states_image=torch.randn(sizes.batch, 7, 20))


CONFIG = dict(
    patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    rope_temporal_skip_len=8,
)  # fmt: skip

CASES = (
    Case(
        name="ChronoEditTransformer3DModel",
        config=CONFIG,
        inputs=inputs,
        sizes=Sizes(grid=(2, 3, 5)),  # two frames are far apart in time, any other number of them is not
        source="diffusers, tests/models/transformers/test_models_transformer_chronoedit.py; 3 heads of 12 instead of 2",
    ),
    Case(
        name="ChronoEditTransformer3DModel: image embeddings",
        config=CONFIG | dict(image_dim=20, added_kv_proj_dim=36),
        inputs=image_inputs,
        source="nvidia/ChronoEdit-14B-Diffusers scaled down; pipelines/chronoedit/pipeline_chronoedit.py",
    ),
)
