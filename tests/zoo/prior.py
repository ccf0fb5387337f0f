"""The priors of Kandinsky 2 (one image token at the end of the text) and of Shap-E (many tokens, no text)."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible

TEXT = 13
TOKENS = 35


def prior_inputs(sizes: Sizes) -> Inputs:
    """The number of words is a part of the configuration, and there is one image token."""
    sizes = Sizes(text=TEXT, batch=sizes.batch)
    return dict(
        hidden_states=torch.randn(sizes.batch, 12),
        timestep=torch.tensor(7),
        proj_embedding=torch.randn(sizes.batch, 12),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 12),
        attention_mask=legible(sizes, first=False),
    )


def shap_e_inputs(sizes: Sizes) -> Inputs:
    """The number of tokens is a part of the configuration."""
    return dict(
        hidden_states=torch.randn(sizes.batch, TOKENS, 12),
        timestep=torch.tensor(7),
        proj_embedding=torch.randn(sizes.batch, 10),
    )


CASES = (
    Case(
        name="PriorTransformer",
        config=dict(
            num_attention_heads=3, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=TEXT,
            additional_embeddings=4,
        ),
        inputs=prior_inputs,
        source="diffusers, tests/models/transformers/test_models_prior.py; 3 heads, 13 words",
        sizes=Sizes(grid=(1, 1, 1), text=TEXT),  # no others
    ),
    Case(
        name="PriorTransformer: Shap-E",
        config=dict(
            num_attention_heads=3, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=TOKENS,
            additional_embeddings=0, time_embed_act_fn="gelu", norm_in_type="layer", embedding_proj_norm_type="layer",
            encoder_hid_proj_type=None, added_emb_type=None, time_embed_dim=96, embedding_proj_dim=10,
            clip_embed_dim=24,
        ),
        inputs=shap_e_inputs,
        source="diffusers, tests/pipelines/shap_e/test_shap_e_img2img.py; 3 heads, 2 layers, 35 tokens",
        sizes=Sizes(grid=(1, 5, 7)),  # no others; no text
    ),
)  # fmt: skip
