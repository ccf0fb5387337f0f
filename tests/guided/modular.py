"""A pipeline of blocks, whose guidance is a component that says which branches there are."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import finished
from tests.guided.sdxl import build as build_sdxl
from tests.guided.sdxl import call_text


def build() -> Any:
    """The components of Stable Diffusion XL, in blocks."""
    names = "unet vae scheduler text_encoder tokenizer text_encoder_2 tokenizer_2".split()
    components = {name: x for name, x in build_sdxl().components.items() if name in names}
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    _hush(blocks)
    pipeline = blocks.init_pipeline()
    pipeline.update_components(**components, guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0))
    return finished(pipeline)


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


CASES = [
    Guided(
        name="Modular Stable Diffusion XL",
        build=build,
        call=call,
        source="as Stable Diffusion XL; diffusers, tests/modular_pipelines/stable_diffusion_xl",
    ),
]
