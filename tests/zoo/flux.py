"""FLUX.1, FLUX.2 and FLUX.3."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import Inputs, Sizes, flux_inputs
from tests.zoo.case import Case, Prepared


def flux_control_inputs(sizes: Sizes) -> Inputs:
    """Residuals of a ControlNet that is shallower than the model: two for three blocks."""
    residuals = [torch.randn(sizes.batch, sizes.image, 48) for _ in range(4)]
    return flux_inputs(sizes) | dict(
        guidance=torch.full((sizes.batch,), 3.5),
        controlnet_block_samples=residuals[:2],
        controlnet_single_block_samples=residuals[2:],
    )


def flux_image_prompt_inputs(sizes: Sizes) -> Inputs:
    """One image for each of two adapters."""
    images = [torch.randn(sizes.batch, 1, 20), torch.randn(sizes.batch, 1, 12)]
    return flux_inputs(sizes) | dict(joint_attention_kwargs=dict(ip_adapter_image_embeds=images))


def load_image_adapters(model: Any) -> None:
    """What `load_ip_adapter` leaves behind, with random weights: adapters of 4 and 3 tokens at scales 1 and 0.7."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    for block in model.transformer_blocks:
        processor: Any = FluxIPAdapterAttnProcessor(hidden_size=48, cross_attention_dim=32, num_tokens=(4, 3))
        processor.scale = [1.0, 0.7]
        block.attn.set_processor(processor)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(20, 32, 4), ImageProjection(12, 32, 3)])


def flux2_inputs(sizes: Sizes) -> Inputs:
    """The ids are whole numbers with a batch dim, as the pipeline passes them; of them only the first row is read."""
    image, text = flux2_positions(sizes.grid), F.pad(torch.arange(sizes.text)[:, None], (3, 0))
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        timestep=torch.rand(sizes.batch),
        guidance=torch.full((sizes.batch,), 4.0),
        img_ids=image.expand(sizes.batch, -1, -1),
        txt_ids=text.expand(sizes.batch, -1, -1),
    )


def flux2_positions(grid: tuple[int, int, int], time: int = 0) -> Tensor:
    """(S, 4) of (time, row, column, 0); frames go on downwards."""
    frames, rows, columns = grid
    place = torch.cartesian_prod(torch.arange(frames * rows), torch.arange(columns))
    return F.pad(F.pad(place, (1, 1)), (0, 0)) + torch.tensor([time, 0, 0, 0])


def flux2_extract_inputs(sizes: Sizes) -> Inputs:
    """First step with a reference image of one row, whose tokens come before the others."""
    columns = sizes.grid[2]
    inputs = flux2_inputs(sizes)
    reference = flux2_positions((1, 1, columns), time=10).expand(sizes.batch, -1, -1)
    return inputs | dict(
        hidden_states=torch.cat([torch.randn(sizes.batch, columns, 4), inputs["hidden_states"]], dim=1),
        img_ids=torch.cat([reference, inputs["img_ids"]], dim=1),
        guidance=None,
        kv_cache_mode="extract",
        num_ref_tokens=columns,
    )


def flux2_cached_inputs(sizes: Sizes) -> Inputs:
    """A later step: every layer adds the reference's keys and values, 5 tokens here, from the cache."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    cache = Flux2KVCache(2, 2)
    cache.num_ref_tokens = 5
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        layer.store(torch.randn(sizes.batch, 5, 3, 16), torch.randn(sizes.batch, 5, 3, 16))
    return flux2_inputs(sizes) | dict(guidance=None, kv_cache=cache, kv_cache_mode="cached")


def keep_references(model: Any) -> None:
    """As Flux2KleinKVPipeline does."""
    from diffusers.models.transformers import transformer_flux2

    for block in model.transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())


def flux3_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        timestep=torch.rand(sizes.batch),
        img_ids=flux2_positions(sizes.grid),
        txt_ids=F.pad(torch.arange(sizes.text)[:, None], (3, 0)),
    )


def flux3_edit_inputs(sizes: Sizes) -> Inputs:
    """A reference image of one row more than a third of the image's rows."""
    frames, rows, columns = sizes.grid
    grid = (1, frames * rows // 3 + 1, columns)
    return flux3_inputs(sizes) | dict(
        image_cond_hidden_states=torch.randn(sizes.batch, grid[1] * columns, 6),
        image_cond_ids=flux2_positions(grid, time=10),
        target_timestep=torch.rand(sizes.batch),
    )


FLUX = dict(
    patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=3, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
FLUX2 = dict(
    patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=3, joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
)  # fmt: skip
FLUX3 = dict(
    in_channels=4, cond_in_channels=6, num_layers=2, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=3, joint_attention_dim=32, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
)  # fmt: skip

CASES = (
    Case(
        name="FluxTransformer2DModel",
        config=FLUX,
        inputs=flux_inputs,
        source="diffusers 0.42.1, tests/models/transformers/test_models_transformer_flux.py; 3 heads instead of 2",
    ),
    Case(
        name="FluxTransformer2DModel: control residuals",
        config=FLUX | dict(num_layers=3, num_single_layers=3, guidance_embeds=True),
        inputs=flux_control_inputs,
        source="diffusers 0.42.1, pipelines/flux/pipeline_flux_controlnet.py; FLUX.1-dev scaled down",
    ),
    Prepared(
        name="FluxTransformer2DModel: image prompt",
        config=FLUX,
        inputs=flux_image_prompt_inputs,
        prepare=load_image_adapters,
        source="diffusers 0.42.1, loaders/transformer_flux.py; adapters scaled down",
    ),
    Case(
        name="Flux2Transformer2DModel",
        config=FLUX2,
        inputs=flux2_inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_flux2.py; 3 heads instead of 2",
    ),
    Prepared(
        name="Flux2Transformer2DModel: reference to cache",
        config=FLUX2 | dict(guidance_embeds=False),
        inputs=flux2_extract_inputs,
        prepare=keep_references,
        source="diffusers 0.42.1, pipelines/flux2/pipeline_flux2_klein_kv.py; FLUX.2-klein scaled down",
    ),
    Prepared(
        name="Flux2Transformer2DModel: reference from cache",
        config=FLUX2 | dict(guidance_embeds=False),
        inputs=flux2_cached_inputs,
        prepare=keep_references,
        source="diffusers 0.42.1, pipelines/flux2/pipeline_flux2_klein_kv.py; FLUX.2-klein scaled down",
    ),
    Case(
        name="Flux3Transformer2DModel",
        config=FLUX3,
        inputs=flux3_inputs,
        source="diffusers 0.42.1, docstring of Flux3Transformer2DModel, scaled down",
    ),
    Case(
        name="Flux3Transformer2DModel: image to image",
        config=FLUX3 | dict(flow_map=True),
        inputs=flux3_edit_inputs,
        source="diffusers 0.42.1, docstring of Flux3Transformer2DModel, scaled down; step-distilled",
    ),
)
