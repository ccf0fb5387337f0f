"""CogVideoX, and ConsisID, which is CogVideoX with a face."""

from __future__ import annotations

from typing import Any

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case

TEXT = 13
"""Text tokens of the model that adds positions to text and image at once, and so takes no other number."""


def rotary(sizes: Sizes, *, sliced: bool = False) -> Any:
    """Two of (S, 16). CogVideoX 1.5 takes slices of a larger table."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, rows, columns = sizes.grid
    return get_3d_rotary_pos_embed(
        embed_dim=16,
        crops_coords=None if sliced else ((0, 0), (rows, columns)),
        grid_size=(rows, columns),
        temporal_size=frames,
        grid_type="slice" if sliced else "linspace",
        max_size=(32, 32) if sliced else None,
    )


def absolute_inputs(sizes: Sizes) -> Inputs:
    """Always `TEXT` tokens of text."""
    frames, rows, columns = sizes.grid
    return dict(
        hidden_states=torch.randn(sizes.batch, frames, 4, 2 * rows, 2 * columns),
        encoder_hidden_states=torch.randn(sizes.batch, TEXT, 16),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
    )


def rotary_inputs(sizes: Sizes) -> Inputs:
    return absolute_inputs(sizes) | dict(
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16), image_rotary_emb=rotary(sizes)
    )


def image_inputs(sizes: Sizes) -> Inputs:
    """CogVideoX 1.5: two latent frames make one of tokens; the image is in channels of its own."""
    frames, rows, columns = sizes.grid
    return rotary_inputs(sizes) | dict(
        hidden_states=torch.randn(sizes.batch, 2 * frames, 8, 2 * rows, 2 * columns),
        ofs=torch.full((1,), 2.0),
        image_rotary_emb=rotary(sizes, sliced=True),
    )


def face_inputs(sizes: Sizes) -> Inputs:
    """States of two layers of the image encoder for the face, 5 tokens each."""
    return rotary_inputs(sizes) | dict(
        id_cond=torch.randn(sizes.batch, 20), id_vit_hidden=[torch.randn(sizes.batch, 5, 24) for _ in range(2)]
    )


CONFIG = dict(
    num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=16,
    num_layers=2, sample_width=16, sample_height=16, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
    max_text_seq_length=TEXT,
)  # fmt: skip
IMAGE = dict(in_channels=8, patch_size_t=2, ofs_embed_dim=16, patch_bias=False, sample_width=64, sample_height=64)
FACE = dict(
    is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=8, cross_attn_num_heads=3, LFE_id_dim=20,
    LFE_vit_dim=24, LFE_depth=4, LFE_dim_head=8, LFE_num_heads=3, LFE_num_id_token=2, LFE_num_querie=3,
    LFE_output_dim=32, LFE_ff_mult=2, LFE_num_scale=2,
)  # fmt: skip

CASES = (
    Case(
        name="CogVideoXTransformer3DModel",
        config=CONFIG | dict(use_rotary_positional_embeddings=True),
        inputs=rotary_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_cogvideox.py; 3 heads, rotary as 5B",
    ),
    Case(
        name="CogVideoXTransformer3DModel: absolute positions",
        config=CONFIG,
        inputs=absolute_inputs,
        sizes=Sizes(text=TEXT),
        source="diffusers, tests/models/transformers/test_models_transformer_cogvideox.py; 3 heads, as 2B",
    ),
    Case(
        name="CogVideoXTransformer3DModel: image to video",
        config=CONFIG | IMAGE | dict(use_rotary_positional_embeddings=True),
        inputs=image_inputs,
        sizes=Sizes(grid=(3, 3, 5)),
        source="THUDM/CogVideoX1.5-5B-I2V scaled down; pipelines/cogvideo/pipeline_cogvideox_image2video.py",
    ),
    Case(
        name="ConsisIDTransformer3DModel",
        config=CONFIG | FACE | dict(use_rotary_positional_embeddings=True),
        inputs=face_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_consisid.py; 3 heads, rotary",
    ),
)
