"""SANA-WM, the world model of Sana-Video, and its refiner."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible


def cameras(sizes: Sizes) -> Tensor:
    """(batch, frames, 20) of a camera that moves forward: a flat 4 x 4 pose, then fx, fy, cx and cy."""
    frames, rows, columns = sizes.grid
    pose = torch.eye(4).repeat(sizes.batch, frames, 1, 1)
    pose[..., 2, 3] = torch.arange(frames) * 0.1
    lens = torch.tensor([columns, rows, columns / 2, rows / 2]).expand(sizes.batch, frames, 4)
    return torch.cat([pose.flatten(2), lens], 2)


def sana_wm_inputs(sizes: Sizes) -> Inputs:
    """A timestep for every frame, 0 for the first, which is given. One word alone is not possible."""
    sizes = replace(sizes, text=max(sizes.text, 2))
    timestep = torch.randint(1, 1000, (sizes.batch, 1, 1)).float().repeat(1, 1, sizes.grid[0])
    timestep[:, :, 0] = 0
    return dict(
        hidden_states=torch.randn(sizes.batch, 4, *sizes.grid),
        timestep=timestep,
        encoder_hidden_states=torch.randn(sizes.batch, 1, sizes.text, 20),
        mask=legible(sizes).long(),
        camera_conditions=cameras(sizes),
        chunk_plucker=torch.randn(sizes.batch, 8, *sizes.grid),
    )


def rotary(sizes: Sizes, rope_type: str, *, first: int, frames: int) -> tuple[Tensor, Tensor]:
    """As build_rotary_emb_for_absolute_positions of the refiner, whose caller makes it."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed

    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(
        dim=48, base_num_frames=20, modality="video", double_precision=False, rope_type=rope_type, num_attention_heads=3
    )
    _, rows, columns = sizes.grid
    coordinates = rope.prepare_video_coords(
        sizes.batch, first + frames, rows, columns, device=torch.device("cpu"), fps=24.0
    )
    return rope(coordinates[:, :, first * rows * columns :], device="cpu")


def refiner_inputs(sizes: Sizes, rope_type: str = "interleaved", first: int = 0) -> Inputs:
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        timestep=torch.rand(sizes.batch, sizes.image) * 1000,
        video_rotary_emb=rotary(sizes, rope_type, first=first, frames=sizes.grid[0]),
        encoder_attention_mask=legible(sizes).long(),
    )


def cached_inputs(sizes: Sizes) -> Inputs:
    """Keys and values of two earlier frames come from a cache: one without its rotation yet, one with."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    frame = sizes.grid[1] * sizes.grid[2]
    cache = SanaWMRefinerKVCache(2)
    for layer in cache.layer_caches:
        layer.store_sink(*torch.randn(2, sizes.batch, frame, 48))
        layer.store_history(*torch.randn(2, sizes.batch, frame, 48))
    cache.sink_pe = rotary(sizes, "split", first=0, frames=1)
    return refiner_inputs(sizes, "split", first=2) | dict(kv_cache=cache, kv_cache_mode="inject")


REFINER = dict(
    in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=3, attention_head_dim=16,
    cross_attention_dim=48, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=3,
    audio_attention_head_dim=4, audio_cross_attention_dim=12, num_layers=2, qk_norm="rms_norm_across_heads",
    caption_channels=20, rope_double_precision=False,
)  # fmt: skip

CASES = (
    Case(
        name="SanaWMTransformer3DModel",
        rounding="rounds queries, keys and values of its softmax attention to bf16 (transformer_sana_wm.py)",
        config=dict(
            in_channels=4, num_layers=3, hidden_size=48, num_attention_heads=3, patch_size=(1, 1, 1),
            softmax_every_n=2, linear_head_dim=16, t_kernel_size=3, conv_kernel_size=4, caption_channels=20,
            mlp_ratio=2.0, chunk_plucker_channels=8, chunk_plucker_post_attn_blocks=3,
        ),
        inputs=sana_wm_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_sana_wm.py; 3 heads, 3 layers",
        sizes=Sizes(grid=(3, 3, 5)),  # a recurrence over frames
    ),
    Case(
        name="SanaWMLTX2RefinerTransformer3DModel",
        config=REFINER,
        inputs=refiner_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_sana_wm_refiner.py; 3 heads instead of 2",
    ),
    Case(
        name="SanaWMLTX2RefinerTransformer3DModel: cached frames",
        config=REFINER | dict(rope_type="split", gated_attn=True),
        inputs=cached_inputs,
        source="as above; called as pipelines/sana_wm/refiner.py does while it denoises, cache of random values",
    ),
)  # fmt: skip
