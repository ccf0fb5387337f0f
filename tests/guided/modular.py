"""A pipeline of blocks, whose guidance is a component that says which branches there are."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import finished
from tests.guided.sdxl import build as build_sdxl
from tests.guided.sdxl import call_text
from tests.guided.wan import build as build_wan_21
from tests.guided.wan import call as call_wan_21


def build() -> Any:
    """The components of Stable Diffusion XL, in blocks."""
    names = "unet vae scheduler text_encoder tokenizer text_encoder_2 tokenizer_2".split()
    components = {name: x for name, x in build_sdxl().components.items() if name in names}
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    _hush(blocks)
    pipeline = blocks.init_pipeline()
    pipeline.update_components(**components, guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0))
    return finished(pipeline)


def build_wan() -> Any:
    """The components of Wan 2.1, in blocks, which want a mean for each of the VAE's channels."""
    components = build_wan_21().components
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    vae.load_state_dict(components["vae"].state_dict())
    names = "transformer scheduler text_encoder tokenizer".split()
    pipeline = diffusers.WanBlocks().init_pipeline()
    pipeline.update_components(
        **{name: components[name] for name in names},
        vae=vae.eval().requires_grad_(False),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
    )
    _hush(pipeline.blocks)
    return pipeline


def _hush(blocks: Any) -> None:
    """The pipeline passes this on to its own blocks, but not to the loop, which is a block of one of them."""
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        _hush(block)


def call(count: int) -> dict[str, Any]:
    values = call_text(count) | dict(output="latents", output_type="pt")
    del values["guidance_scale"]  # the guider's
    return values


def call_wan(count: int) -> dict[str, Any]:
    values = call_wan_21(count) | dict(output="latents")
    del values["guidance_scale"], values["output_type"]
    return values


CASES = [
    Guided(
        name="Modular Stable Diffusion XL",
        build=build,
        call=call,
        source="as Stable Diffusion XL; diffusers, tests/modular_pipelines/stable_diffusion_xl",
    ),
]
