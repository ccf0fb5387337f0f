"""Wan 2.1 and 2.2, VACE, Animate and Animate 2."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import video


def wan_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=video(sizes, 4, 2),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
    )


def per_token_inputs(sizes: Sizes) -> Inputs:
    """A timestep for every token, 0 for those of the first frame: Wan 2.2 TI2V 5B with an image."""
    timestep = torch.randint(1, 1000, (sizes.batch, 1)).repeat(1, sizes.image)
    timestep[:, : sizes.image // sizes.grid[0]] = 0
    return wan_inputs(sizes) | dict(timestep=timestep)


def image_to_video_inputs(sizes: Sizes) -> Inputs:
    """Image tokens before the text in the cross-attention, which takes the last 512 of both as text."""
    return wan_inputs(sizes) | dict(
        hidden_states=video(sizes, 12, 2),
        encoder_hidden_states=torch.randn(sizes.batch, 512, 16),
        encoder_hidden_states_image=torch.randn(sizes.batch, 5, 20),
    )


def vace_inputs(sizes: Sizes) -> Inputs:
    return wan_inputs(sizes) | dict(
        control_hidden_states=video(sizes, 12, 2),
        control_hidden_states_scale=torch.tensor([1.0, 0.5]),
    )


def animate_inputs(sizes: Sizes) -> Inputs:
    """The pose has a frame less than the latents, so these have at least 2; 4 frames of the face per latent frame."""
    frames, rows, columns = sizes.grid
    frames = max(frames, 2)
    return dict(
        hidden_states=video(sizes, 12, 2),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        encoder_hidden_states_image=torch.randn(sizes.batch, 5, 20),
        pose_hidden_states=torch.randn(sizes.batch, 4, frames - 1, 2 * rows, 2 * columns),
        face_pixel_values=torch.randn(sizes.batch, 3, 4 * (frames - 2) + 1, 16, 16),
    )


def animate_2_inputs(sizes: Sizes) -> Inputs:
    """The pass over the driving video, which fills the cache; samples are entries of lists."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    frames, rows, columns = sizes.grid
    return dict(
        hidden_states=[torch.randn(4, frames, 2 * rows, 2 * columns) for _ in range(sizes.batch)],
        timestep=torch.full((sizes.batch,), 999.0),
        encoder_hidden_states=[torch.randn(min(sizes.text, 16), 16) for _ in range(sizes.batch)],
        encoder_hidden_states_image=torch.randn(sizes.batch, 5, 1280),
        condition_latents=[torch.randn(8, frames, 2 * rows, 2 * columns) for _ in range(sizes.batch)],
        kv_cache=WanAnimate2KVCache(2),
        kv_cache_mode="extract",
        seq_len=sizes.image,
        offset_grid_sizes=torch.tensor([sizes.grid] * sizes.batch),
    )


def animate_2_cached_inputs(sizes: Sizes) -> Inputs:
    """A denoising step: a frame more than the driving video, whose keys and values are in the cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    frames, rows, columns = sizes.grid
    inputs = animate_2_inputs(Sizes(grid=(frames + 1, rows, columns), text=sizes.text, batch=sizes.batch))
    del inputs["offset_grid_sizes"]
    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(*torch.randn(2, sizes.batch, sizes.image, 3, 16))
    return inputs | dict(
        timestep=torch.randint(0, 1000, (sizes.batch,)).float(),
        kv_cache=cache,
        kv_cache_mode="cached",
        reference_grid_sizes=torch.tensor([sizes.grid] * sizes.batch),
        origin_len=4 * frames - 3,
        origin_area=[16 * rows, 16 * columns],
    )


WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
)  # fmt: skip
ANIMATE_2 = dict(
    patch_size=(1, 2, 2), text_len=16, in_dim=12, dim=48, ffn_dim=64, freq_dim=32, text_dim=16, out_dim=4, num_heads=3,
    num_layers=2, cross_attn_norm=True, use_img_emb=True,
)  # fmt: skip

CASES = (
    Case(
        name="WanTransformer3DModel",
        config=WAN,
        inputs=wan_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_wan.py; 3 heads instead of 2",
    ),
    Case(
        name="WanTransformer3DModel: per-token timesteps",
        config=WAN,
        inputs=per_token_inputs,
        source="as above, called as pipelines/wan/pipeline_wan_i2v.py does with expand_timesteps",
    ),
    Case(
        name="WanTransformer3DModel: image to video",
        config=WAN | dict(in_channels=12, image_dim=20, added_kv_proj_dim=36),
        inputs=image_to_video_inputs,
        source="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers scaled down; 5 image tokens instead of 257",
        sizes=Sizes(text=512),  # WanAttnProcessor has this length hardcoded
    ),
    Case(
        name="WanVACETransformer3DModel",
        config=WAN | dict(num_layers=3, vace_layers=[0, 2], vace_in_channels=12),
        inputs=vace_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_wan_vace.py; 3 heads, 3 layers",
    ),
    Case(
        name="WanAnimateTransformer3DModel",
        config=WAN
        | dict(
            in_channels=12, latent_channels=4, image_dim=20, motion_encoder_size=16, motion_style_dim=2, motion_dim=4,
            motion_encoder_dim=16, motion_encoder_channel_sizes={"4": 2, "8": 2, "16": 2}, face_encoder_num_heads=2,
            face_encoder_hidden_dim=16, inject_face_latents_blocks=1,
        ),
        inputs=animate_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_wan_animate.py; 3 heads, 2 face adapters",
        sizes=Sizes(grid=(3, 3, 5)),  # at least 2 frames
    ),
    Case(
        name="WanAnimate2Transformer3DModel",
        config=ANIMATE_2,
        inputs=animate_2_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_wan_animate_2.py; 3 heads instead of 4",
    ),
)  # fmt: skip

SLOW = (
    Case(
        name="WanAnimate2Transformer3DModel: cached reference",
        config=ANIMATE_2,
        inputs=animate_2_cached_inputs,
        source="as above (get_dummy_generation_inputs); a cache of random values",
    ),
)
"""Not in CASES: the mask of this one's flex attention is compiled, which takes 10 seconds in every process."""
