"""Transformer2DModel (the transformers of UNets, of VQ-Diffusion and of the first DiTs), TransformerTemporalModel."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, picture


def continuous_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=picture(sizes, 12, 1),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        encoder_attention_mask=legible(sizes).long(),
    )


def discrete_inputs(sizes: Sizes) -> Inputs:
    """At most 64 tokens; VQ-Diffusion has one timestep for all samples, and no mask."""
    return dict(
        hidden_states=torch.randint(0, 17, (sizes.batch, min(sizes.image, 64))),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 20),
        timestep=torch.tensor(7),
    )


def patched_inputs(sizes: Sizes) -> Inputs:
    return continuous_inputs(sizes) | dict(
        hidden_states=picture(sizes, 4, 2),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def temporal_inputs(sizes: Sizes) -> Inputs:
    """Frames attend to frames at the same place."""
    frames, rows, columns = sizes.grid
    return dict(hidden_states=torch.randn(sizes.batch * frames, 12, rows, columns), num_frames=frames)


COMMON = dict(num_attention_heads=3, attention_head_dim=8, num_layers=2, cross_attention_dim=20)

CASES = (
    Case(
        name="Transformer2DModel",
        config=COMMON | dict(in_channels=12, norm_num_groups=4, use_linear_projection=True),
        inputs=continuous_inputs,
        source="diffusers, tests/models/test_layers_utils.py; 3 heads, 2 layers",
    ),
    Case(
        name="Transformer2DModel: discrete",
        config=COMMON
        | dict(num_vector_embeds=17, sample_size=8, num_embeds_ada_norm=100, norm_type="ada_norm", attention_bias=True),
        inputs=discrete_inputs,
        source="diffusers, tests/models/test_layers_utils.py; as microsoft/vq-diffusion-ithq",
    ),
    Case(
        name="Transformer2DModel: patches",
        config=COMMON
        | dict(
            cross_attention_dim=24, in_channels=4, out_channels=8, patch_size=2, sample_size=16, norm_eps=1e-6,
            norm_type="ada_norm_single", num_embeds_ada_norm=1000, norm_elementwise_affine=False, caption_channels=20,
            attention_bias=True, activation_fn="gelu-approximate",
        ),
        inputs=patched_inputs,
        source="as PixArtTransformer2DModel, which took this branch over",
    ),
    Case(
        name="TransformerTemporalModel",
        config=dict(
            num_attention_heads=3, attention_head_dim=8, in_channels=12, num_layers=2, norm_num_groups=4,
            positional_embeddings="sinusoidal", num_positional_embeddings=32,
        ),
        inputs=temporal_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_temporal.py; 3 heads, 2 layers, positions",
        sizes=Sizes(grid=(5, 2, 3)),  # attention is over frames; no text
    ),
)  # fmt: skip
