"""AnyFlow: Wan with two timesteps, at once (`AnyFlow...`) or chunk after chunk (`AnyFlowFAR...`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case


def inputs(sizes: Sizes) -> Inputs:
    frames, rows, columns = sizes.grid
    timestep = torch.rand(sizes.batch, 1) * 1000
    return dict(
        hidden_states=torch.randn(sizes.batch, frames, 4, 2 * rows, 2 * columns),
        timestep=timestep.expand(-1, frames),
        r_timestep=timestep.expand(-1, frames) / 2,
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
    )


def image_inputs(sizes: Sizes) -> Inputs:
    """Timesteps that differ by frame, and 5 tokens of an image before the text."""
    frames = sizes.grid[0]
    timestep = torch.rand(sizes.batch, frames) * 1000
    return inputs(sizes) | dict(
        timestep=timestep, r_timestep=timestep / 2, encoder_hidden_states_image=torch.randn(sizes.batch, 5, 20)
    )


def chunk_inputs(sizes: Sizes) -> Inputs:
    """A chunk for every frame. All but the last two are compressed to a quarter of their tokens (rounded down, and so
    at least 2 x 2 where there are any) and are not in the output."""
    frames, rows, columns = sizes.grid
    if frames > 2:
        sizes = replace(sizes, grid=(frames, max(rows, 2), max(columns, 2)))
    return image_inputs(sizes) | dict(encoder_hidden_states_image=None, chunk_partition=[1] * frames)


def step_inputs(sizes: Sizes) -> Inputs:
    """One step of a chunk of `sizes.grid`, after three chunks of one frame: their keys and values are in the cache, of
    the first two compressed.

    The class pads queries to a multiple of 128 and keys by as many, and does not mask these keys.
    """
    frames, rows, columns = sizes.grid
    full, compressed = rows * columns, 2 * (rows // 2) * (columns // 2)
    shape = (2, sizes.batch, 3)
    return inputs(sizes) | dict(
        chunk_partition=[1, 1, 1, frames],
        kv_cache={
            layer: dict(
                full_cache=torch.randn(*shape, full, 12),
                compressed_cache=torch.randn(*shape, compressed, 12),
            )
            for layer in range(2)
        },
        kv_cache_flag=dict(num_cached_chunks=3, is_cache_step=False),
    )


CONFIG = dict(
    patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
)  # fmt: skip
FAR = CONFIG | dict(compressed_patch_size=(1, 4, 4), full_chunk_limit=2)
SEVERAL = Sizes(grid=(3, 3, 5))

CASES = (
    Case(
        name="AnyFlowTransformer3DModel",
        config=CONFIG,
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_anyflow.py; 3 heads instead of 2",
    ),
    Case(
        name="AnyFlowTransformer3DModel: image embeddings",
        config=CONFIG | dict(image_dim=20, deltatime_type="t-r"),
        inputs=image_inputs,
        sizes=SEVERAL,  # timesteps that differ
        source="diffusers 0.42.1, docstring of AnyFlowTransformer3DModel, scaled down",
    ),
    Case(
        name="AnyFlowFARTransformer3DModel",
        config=FAR,
        inputs=chunk_inputs,
        sizes=SEVERAL,  # one chunk compressed, two not
        source="diffusers, tests/models/transformers/test_models_transformer_anyflow_far.py; 3 heads, 2 full chunks",
    ),
    Case(
        name="AnyFlowFARTransformer3DModel: keys from cache",
        config=FAR,
        inputs=step_inputs,
        source="diffusers 0.42.1, pipelines/anyflow/pipeline_anyflow_far.py, scaled down",
    ),
)
