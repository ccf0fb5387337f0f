"""HunyuanVideo, HunyuanVideo 1.5, FramePack and HunyuanImage."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, picture, video


def video_inputs(sizes: Sizes, *, channels: int = 4) -> Inputs:
    return dict(
        hidden_states=video(sizes, channels, 2),
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        encoder_attention_mask=legible(sizes).float(),
        pooled_projections=torch.randn(sizes.batch, 8),
        guidance=torch.full((sizes.batch,), 6000.0),
    )


def concat_inputs(sizes: Sizes) -> Inputs:
    """Noise, picture and its mask along the channels; no guidance, as the pipeline."""
    return video_inputs(sizes, channels=9) | dict(guidance=None)


def framepack_inputs(sizes: Sizes) -> Inputs:
    """Frame indices as the pipeline: start picture, history at a quarter, at half, at full size, then the noise."""
    frames, rows, columns = sizes.grid
    start, quarter, half, full, noise = torch.arange(0, 8 + frames).split([1, 4, 2, 1, frames])

    def history(count: int) -> Tensor:
        return torch.randn(sizes.batch, 4, count, 2 * rows, 2 * columns)

    return video_inputs(sizes) | dict(
        image_embeds=torch.randn(sizes.batch, 5, 16),
        indices_latents=noise,
        latents_clean=history(2),
        indices_latents_clean=torch.cat([start, full]),
        latents_history_2x=history(2),
        indices_latents_history_2x=half,
        latents_history_4x=history(4),
        indices_latents_history_4x=quarter,
    )


def video15_inputs(sizes: Sizes) -> Inputs:
    """Text to video: the picture's embeddings are zeros, and the model masks them."""
    return dict(
        hidden_states=video(sizes, 9, 1),
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        encoder_attention_mask=legible(sizes).float(),
        encoder_hidden_states_2=torch.randn(sizes.batch, 4, 8),
        encoder_attention_mask_2=legible(sizes, text=4).float(),
        image_embeds=torch.zeros(sizes.batch, 3, 12),
    )


def video15_picture_inputs(sizes: Sizes) -> Inputs:
    return video15_inputs(sizes) | dict(image_embeds=torch.randn(sizes.batch, 3, 12))


def image_inputs(sizes: Sizes) -> Inputs:
    """No second text, as for a prompt without quoted words."""
    return dict(
        hidden_states=picture(sizes, 4, 1),
        timestep=torch.rand(sizes.batch) * 1000,
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        encoder_attention_mask=legible(sizes).long(),
    )


def image_distilled_inputs(sizes: Sizes) -> Inputs:
    """The distilled model: text to be drawn, guidance and a second time."""
    return image_inputs(sizes) | dict(
        timestep_r=torch.rand(sizes.batch) * 1000,
        encoder_hidden_states_2=torch.randn(sizes.batch, 4, 8),
        encoder_attention_mask_2=legible(sizes, text=4).long(),
        guidance=torch.full((sizes.batch,), 3500.0),
    )


VIDEO = dict(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=10, num_layers=2, num_single_layers=2,
    num_refiner_layers=2, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
    pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), image_condition_type=None,
)  # fmt: skip
VIDEO15 = dict(
    in_channels=9, out_channels=4, num_attention_heads=3, attention_head_dim=8, num_layers=2, num_refiner_layers=2,
    mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
    rope_axes_dim=(2, 2, 4), target_size=16, task_type="i2v",
)  # fmt: skip
IMAGE = dict(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=8, num_layers=2, num_single_layers=2,
    num_refiner_layers=2, patch_size=(1, 1), text_embed_dim=16, rope_axes_dim=(4, 4),
)  # fmt: skip
VIDEO_TEST = "diffusers, tests/models/transformers/test_models_transformer_hunyuan_video.py"
IMAGE_TEST = (
    "diffusers, tests/pipelines/hunyuan_image_21/test_hunyuanimage.py; 3 heads instead of 4, 2 blocks of each kind"
)
VIDEO15_TEST = "diffusers, tests/models/transformers/test_models_transformer_hunyuan_1_5.py"

CASES = (
    Case(
        name="HunyuanVideoTransformer3DModel",
        config=VIDEO,
        inputs=video_inputs,
        source=f"{VIDEO_TEST}; 3 heads instead of 2, 2 blocks of each kind, the published patch size",
    ),
    Case(
        name="HunyuanVideoTransformer3DModel: image to video by channels",
        config=VIDEO | dict(in_channels=9, guidance_embeds=False, image_condition_type="latent_concat"),
        inputs=concat_inputs,
        source=f"{VIDEO_TEST} (latent concat); 3 heads instead of 2, 2 blocks of each kind, the published patch size",
    ),
    Case(
        name="HunyuanVideoTransformer3DModel: image to video by first frame",
        config=VIDEO | dict(image_condition_type="token_replace"),
        inputs=video_inputs,
        source=f"{VIDEO_TEST} (token replace); 3 heads instead of 2, 2 blocks of each kind, the published patch size",
        sizes=Sizes(grid=(3, 3, 5)),  # the first frame's tokens have their own modulation
    ),
    Case(
        name="HunyuanVideoFramepackTransformer3DModel",
        config=VIDEO | dict(has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
        inputs=framepack_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_hunyuan_video_framepack.py; "
        "3 heads instead of 2, 2 blocks of each kind",
    ),
    Case(
        name="HunyuanVideo15Transformer3DModel",
        config=VIDEO15,
        inputs=video15_inputs,
        source=f"{VIDEO15_TEST}; 3 heads instead of 2, channels of noise, picture and mask",
    ),
    Case(
        name="HunyuanVideo15Transformer3DModel: image to video",
        config=VIDEO15,
        inputs=video15_picture_inputs,
        source=f"{VIDEO15_TEST}; 3 heads instead of 2, channels of noise, picture and mask",
    ),
    Case(
        name="HunyuanImageTransformer2DModel",
        config=IMAGE,
        inputs=image_inputs,
        source=IMAGE_TEST,
    ),
    Case(
        name="HunyuanImageTransformer2DModel: distilled, two texts",
        config=IMAGE | dict(text_embed_2_dim=8, guidance_embeds=True, use_meanflow=True),
        inputs=image_distilled_inputs,
        source=f"{IMAGE_TEST}, the options of the distilled model",
    ),
)
