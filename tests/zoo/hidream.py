"""HiDream-I1."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import picture


def hidream_inputs(sizes: Sizes) -> Inputs:
    """Llama's embeddings have the layers in front: (L, B, T, C)."""
    return dict(
        hidden_states=picture(sizes, 4, 2),
        timesteps=torch.rand(sizes.batch) * 1000,
        encoder_hidden_states_t5=torch.randn(sizes.batch, sizes.text, 8),
        encoder_hidden_states_llama3=torch.randn(3, sizes.batch, sizes.text, 4),
        pooled_embeds=torch.randn(sizes.batch, 8),
    )


CONFIG = dict(
    patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8,
    num_attention_heads=3, caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=4, num_activated_experts=2,
    axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=(0, 1, 2, 2),
)  # fmt: skip
SOURCE = (
    "diffusers, tests/models/transformers/test_models_transformer_hidream.py; 3 heads instead of 4, 2 blocks of each "
    "kind, 2 of 4 experts as published"
)

CASES = (
    Case(
        # A picture that is not square is padded to max_resolution: 64 tokens whatever the grid.
        name="HiDreamImageTransformer2DModel",
        config=CONFIG,
        inputs=hidream_inputs,
        source=SOURCE,
    ),
    Case(
        name="HiDreamImageTransformer2DModel: square",
        config=CONFIG,
        inputs=hidream_inputs,
        source=SOURCE,
        sizes=Sizes(grid=(1, 5, 5)),
    ),
)
