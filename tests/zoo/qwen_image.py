"""Qwen-Image 1 and 2.1."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible


def qwen_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 16),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        encoder_hidden_states_mask=legible(sizes).long(),
        timestep=torch.rand(sizes.batch),
        img_shapes=[[sizes.grid]] * sizes.batch,
    )


def edit_inputs(sizes: Sizes) -> Inputs:
    """A second image of one frame after the first, which the model modulates with the timestep 0."""
    _, rows, columns = sizes.grid
    return qwen_inputs(sizes) | dict(
        hidden_states=torch.randn(sizes.batch, sizes.image + rows * columns, 16),
        img_shapes=[[sizes.grid, (1, rows, columns)]] * sizes.batch,
    )


def control_inputs(sizes: Sizes) -> Inputs:
    """Two residuals for three blocks; no text is masked, so there is no mask."""
    residuals = [torch.randn(sizes.batch, sizes.image, 48) for _ in range(2)]
    return qwen_inputs(sizes) | dict(controlnet_block_samples=residuals, encoder_hidden_states_mask=None)


def even(sizes: Sizes) -> tuple[int, int, int]:
    """The grid that Qwen-Image 2.1 can do: no frames, and tokens in groups of 2 x 2."""
    frames, rows, columns = sizes.grid
    return 1, frames * rows + frames * rows % 2, columns + columns % 2


def qwen21_inputs(sizes: Sizes) -> Inputs:
    _, rows, columns = even(sizes)
    slots = torch.zeros(sizes.batch, sizes.text + rows * columns // 4, dtype=torch.bool)
    slots[:, sizes.text :] = True
    return dict(
        hidden_states=torch.randn(sizes.batch, rows * columns, 4),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 8),
        encoder_hidden_states_mask=legible(sizes, first=False).long(),
        timestep=torch.rand(sizes.batch),
        img_shapes=[[even(sizes)]] * sizes.batch,
        img_mask=slots,
    )


def qwen21_edit_inputs(sizes: Sizes) -> Inputs:
    """A condition image of 2 x 4 tokens in 2 places of the text, which has 3 words more."""
    _, rows, columns = even(sizes)
    text = torch.randn(sizes.batch, sizes.text + 5, 8)
    mask = torch.cat([torch.ones(sizes.batch, 5, dtype=torch.long), legible(sizes, first=False).long()], 1)
    slots = torch.zeros(sizes.batch, sizes.text + 5 + rows * columns // 4, dtype=torch.bool)
    slots[:, [1, 2]] = True
    slots[:, sizes.text + 5 :] = True
    return qwen21_inputs(sizes) | dict(
        hidden_states=torch.randn(sizes.batch, 8 + rows * columns, 4),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, 2, 4), even(sizes)]] * sizes.batch,
        img_mask=slots,
    )


def qwen21_cached_inputs(sizes: Sizes) -> Inputs:
    """As all steps but the first: keys and values of the text come from the cache, only image tokens are computed."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(2)
    for layer in cache.layer_caches:
        layer.store(*torch.randn(2, sizes.batch, sizes.text, 3, 16))
    return qwen21_inputs(sizes) | dict(kv_cache=cache, kv_cache_mode="cached")


QWEN = dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=3,
    joint_attention_dim=20, axes_dims_rope=(8, 4, 4),
)  # fmt: skip
QWEN21 = dict(
    patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
    context_in_dim=8, mlp_ratio=2, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
QWEN21_SIZES = Sizes(grid=(1, 2, 14))  # rows and columns are even

CASES = (
    Case(
        name="QwenImageTransformer2DModel",
        config=QWEN | dict(num_layers=2),
        inputs=qwen_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_qwenimage.py; 3 heads instead of 4",
    ),
    Case(
        name="QwenImageTransformer2DModel: edit with two timesteps",
        config=QWEN | dict(num_layers=2, zero_cond_t=True),
        inputs=edit_inputs,
        source="as above, zero_cond_t of Qwen/Qwen-Image-Edit-2511; called as pipeline_qwenimage_edit_plus.py does",
    ),
    Case(
        name="QwenImageTransformer2DModel: control residuals",
        config=QWEN,
        inputs=control_inputs,
        source="as above, 3 layers; residuals as diffusers.QwenImageControlNetModel returns them",
    ),
    Case(
        name="QwenImage21Transformer2DModel",
        config=QWEN21,
        inputs=qwen21_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_qwenimage21.py; 3 heads instead of 2",
        sizes=QWEN21_SIZES,
    ),
    Case(
        name="QwenImage21Transformer2DModel: edit",
        config=QWEN21,
        inputs=qwen21_edit_inputs,
        source="as above; a condition image as pipelines/qwenimage21/pipeline_qwenimage21.py passes it",
        sizes=QWEN21_SIZES,
    ),
    Case(
        name="QwenImage21Transformer2DModel: cached text",
        config=QWEN21,
        inputs=qwen21_cached_inputs,
        source="as above; use_kv_cache of pipelines/qwenimage21/pipeline_qwenimage21.py, cache of random values",
        sizes=QWEN21_SIZES,
    ),
)
