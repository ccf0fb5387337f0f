"""Z-Image: one sample is one entry of a list, without a batch dim; the model pads its tokens to multiples of 32."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models import Inputs, Sizes
from tests.zoo.case import Case


def latents(sizes: Sizes) -> Tensor:
    """(channels, frames, height, width)"""
    frames, rows, columns = sizes.grid
    return torch.randn(4, frames, 2 * rows, 2 * columns)


def z_image_inputs(sizes: Sizes) -> Inputs:
    """Instead of a mask, the last sample's text is a third shorter."""
    short = sizes.text - sizes.text // 3
    return dict(
        x=[latents(sizes) for _ in range(sizes.batch)],
        t=torch.rand(sizes.batch),
        cap_feats=[torch.randn(sizes.text if i < sizes.batch - 1 else short, 20) for i in range(sizes.batch)],
    )


def omni_inputs(sizes: Sizes) -> Inputs:
    """A condition image and its SigLIP features for each sample, the text in pieces around it."""
    text = z_image_inputs(sizes)["cap_feats"]
    return dict(
        x=[[latents(sizes), latents(sizes)] for _ in range(sizes.batch)],
        t=torch.rand(sizes.batch),
        cap_feats=[[torch.randn(2, 20), x, torch.randn(1, 20)] for x in text],
        siglip_feats=[[torch.randn(3, 2, 12), None] for _ in range(sizes.batch)],
        image_noise_mask=[[0, 1]] * sizes.batch,
    )


def control_inputs(sizes: Sizes) -> Inputs:
    """Residuals after the first and the last layer, for the padded tokens of image and text together."""
    inputs = z_image_inputs(sizes)
    text = max(len(x) for x in inputs["cap_feats"])
    tokens = sum(32 * -(-n // 32) for n in (sizes.image, text))
    return inputs | dict(controlnet_block_samples={i: torch.randn(sizes.batch, tokens, 36) for i in (0, 2)})


Z_IMAGE = dict(
    all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=36, n_layers=2, n_refiner_layers=2, n_heads=3,
    n_kv_heads=3, qk_norm=True, cap_feat_dim=20, rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 4, 4],
    axes_lens=[1024, 64, 64],
)  # fmt: skip
Z_IMAGE_SIZES = Sizes(text=37)  # the samples' padded lengths differ, so that there is a mask

CASES = (
    Case(
        name="ZImageTransformer2DModel",
        config=Z_IMAGE,
        inputs=z_image_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_z_image.py; 3 heads, 2 layers each",
        sizes=Z_IMAGE_SIZES,
    ),
    Case(
        name="ZImageTransformer2DModel: omni",
        config=Z_IMAGE | dict(siglip_feat_dim=12),
        inputs=omni_inputs,
        source="as above; called as pipelines/z_image/pipeline_z_image_omni.py does",
        sizes=Z_IMAGE_SIZES,
    ),
    Case(
        name="ZImageTransformer2DModel: control residuals",
        config=Z_IMAGE | dict(n_layers=3),
        inputs=control_inputs,
        source="as above, 3 layers; residuals as diffusers.ZImageControlNetModel returns them",
        sizes=Z_IMAGE_SIZES,
    ),
)
