"""GLM-Image."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, picture

LAYERS, HEADS, HEAD_SIZE = 2, 3, 8


def glm_inputs(sizes: Sizes) -> Inputs:
    """A prior token for every image token; the pipeline drops all of them in the unconditional call."""
    frames, rows, columns = sizes.grid
    return dict(
        hidden_states=picture(sizes, 4, 2),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        prior_token_id=torch.randint(0, 64, (sizes.batch, sizes.image)),
        prior_token_drop=torch.zeros(sizes.batch, sizes.image, dtype=torch.bool),
        timestep=torch.rand(sizes.batch) * 1000,
        target_size=torch.tensor([[16.0 * frames * rows, 16.0 * columns]]).repeat(sizes.batch, 1),
        crop_coords=torch.zeros(sizes.batch, 2),
    )


def glm_mask_inputs(sizes: Sizes) -> Inputs:
    """The mask that the class takes and the pipeline does not give; the model makes floats of it."""
    return glm_inputs(sizes) | dict(attention_mask=legible(sizes).float())


def glm_edit_inputs(sizes: Sizes) -> Inputs:
    """Keys and values of a picture of 11 tokens, as an earlier call of the model has written them."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    caches = GlmImageKVCache(num_layers=LAYERS)
    for _ in range(sizes.batch):
        for layer in range(LAYERS):
            caches[layer].store(torch.randn(1, 11, HEADS, HEAD_SIZE), torch.randn(1, 11, HEADS, HEAD_SIZE))
        caches.next_sample()
    caches.set_mode("read")
    return glm_inputs(sizes) | dict(kv_caches=caches)


CONFIG = dict(
    patch_size=2, in_channels=4, out_channels=4, num_layers=LAYERS, attention_head_dim=HEAD_SIZE,
    num_attention_heads=HEADS, text_embed_dim=32, time_embed_dim=16, condition_dim=8,
    prior_vq_quantizer_codebook_size=64,
)  # fmt: skip
SOURCE = "diffusers, tests/models/transformers/test_models_transformer_glm_image.py; 3 heads and 2 blocks"

CASES = (
    Case(name="GlmImageTransformer2DModel", config=CONFIG, inputs=glm_inputs, source=SOURCE),
    Case(name="GlmImageTransformer2DModel: text mask", config=CONFIG, inputs=glm_mask_inputs, source=SOURCE),
    Case(name="GlmImageTransformer2DModel: image edit", config=CONFIG, inputs=glm_edit_inputs, source=SOURCE),
)
