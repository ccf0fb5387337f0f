"""LoRA by diffusers' own calls, before parafuse is put on and under it: every picture is plain diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests import adapters
from tests.dist.ranks import run_ranks
from tests.drop_in.stories import Chapter, Story, Told, faults, tell
from tests.guided import flux, sd3, sdxl, wan


def load(names: tuple[str, ...], adapter: str, instead_of: str | None = None) -> Callable[[Any], None]:
    """Loads a LoRA of 3 ranks for a half of the layers, or of 5 for others, as adapter `a` or `b`."""

    def change(pipeline: Any) -> None:
        settings = dict(rank=3, seed=1, every=2) if adapter == "a" else dict(rank=5, seed=2, every=4)
        weights = adapters.lora(pipeline, names, **settings)
        pipeline.load_lora_weights(weights, adapter_name=instead_of or adapter, hotswap=instead_of is not None)

    return change


def story(build: Callable[[], Any], call: dict[str, Any], names: tuple[str, ...], scale: str) -> Story:
    """`names`: components with LoRA, the denoiser first; `scale`: the keyword that scales it in one call."""
    denoiser = names[0]

    def call_of(name: str, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return lambda pipeline: getattr(pipeline, name)(*args, **kwargs)

    def hot(pipeline: Any) -> None:
        pipeline.enable_lora_hotswap(target_rank=6)
        load((denoiser,), "a")(pipeline)

    def fuse_for_good(pipeline: Any) -> None:
        pipeline.fuse_lora(components=[denoiser], lora_scale=0.5)
        pipeline.unload_lora_weights()

    chapters = (
        Chapter("plain", is_told_before=False),
        Chapter("loaded", load(names, "a"), is_told_before=False),
        Chapter("two", lambda p: (load((denoiser,), "b")(p), p.set_adapters(["a", "b"], [0.7, -0.4]))),
        Chapter("scaled in the call", call={scale: {"scale": 0.3}}, is_told_before=False),
        Chapter("off", call_of("disable_lora"), like="plain", is_told_before=False),
        Chapter("on", call_of("enable_lora"), like="two", is_told_before=False),
        Chapter("fused", call_of("fuse_lora", components=[denoiser], lora_scale=0.8, adapter_names=["a"])),
        Chapter("unfused", call_of("unfuse_lora", components=[denoiser]), is_told_before=False),
        Chapter("one is deleted", call_of("delete_adapters", "b"), like="fused", is_told_before=False),
        Chapter("unloaded", call_of("unload_lora_weights"), like="plain"),
        Chapter("to be swapped", hot, like="loaded" if names == (denoiser,) else None, is_told_before=False),
        Chapter("swapped", load((denoiser,), "b", instead_of="a")),
        Chapter("fused for good", fuse_for_good, is_told_before=False),
    )
    return Story(build, call | dict(num_inference_steps=2), chapters)


STORIES = {
    "FLUX.1": story(
        lambda: flux.build("FluxPipeline"),
        flux.call(2) | dict(true_cfg_scale=1.0),
        ("transformer",),
        "joint_attention_kwargs",
    ),
    "Stable Diffusion 3": story(sd3.build, sd3.call(2), ("transformer", "text_encoder"), "joint_attention_kwargs"),
    "Wan 2.1": story(wan.build, wan.call(2), ("transformer",), "attention_kwargs"),
    "Stable Diffusion XL": story(sdxl.build, sdxl.call_text(2), ("unet", "text_encoder"), "cross_attention_kwargs"),
}


AT_LENGTH = (("FLUX.1", "ulysses"), ("Stable Diffusion XL", "cfg"))
"""In these layouts; the others are told the chapters of `IN_BRIEF`."""
IN_BRIEF = ("plain", "loaded", "two", "scaled in the call", "unloaded")


def chosen(name: str, degrees: dict[str, int]) -> Story:
    at_length = (name, next(iter(degrees))) in AT_LENGTH
    story = STORIES[name]
    return replace(story, chapters=tuple(c for c in story.chapters if at_length or c.name in IN_BRIEF))


def told(name: str, degrees: dict[str, int]) -> dict[str, Told]:
    return tell(chosen(name, degrees), degrees)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize(
    ("name", "degrees", "ranks"),
    [
        ("FLUX.1", dict(ulysses=2), 2),
        ("Stable Diffusion 3", dict(ulysses=3), 3),
        ("Wan 2.1", dict(cfg=2, ulysses=1), 2),
        ("Wan 2.1", dict(ring=2, ulysses=1), 2),
        ("Stable Diffusion XL", dict(cfg=2, ulysses=1), 2),
        ("Stable Diffusion XL", dict(data=2, ulysses=1), 2),
    ],
)
def test_lora(name: str, degrees: dict[str, int], ranks: int) -> None:
    assert faults(chosen(name, degrees), run_ranks(told, ranks, name, degrees)) == {}
