"""Pictures and words as adapters (IP-Adapter, textual inversion), before parafuse is put on and under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import parafuse
from parafuse.engine.verify import relative_error
from tests import adapters
from tests.dist.ranks import run_ranks
from tests.drop_in.stories import EXACT, Chapter, Story, Told, faults, paint, tell
from tests.guided import flux, sd3, sdxl
from tests.guided.parts import rows

WORD = "<thing>"


def calling(name: str, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda pipeline: getattr(pipeline, name)(*args, **kwargs)


def embedded(count: int, tokens: int, *seeds: int) -> list[Any]:
    """For each adapter what a picture's encoder would give, by row of the batch."""
    return [rows(count, tokens, adapters.IMAGE_WIDTH, seed=seed) for seed in seeds]


def load_for_unet(*seeds: int) -> Callable[[Any], None]:
    def change(pipeline: Any) -> None:
        weights = [adapters.ip_adapter_for_unet(pipeline.unet, seed=seed) for seed in seeds]
        pipeline.load_ip_adapter(weights, subfolder="", weight_name=[""] * len(seeds), image_encoder_folder=None)

    return change


def load_for_flux(*seeds: int) -> Callable[[Any], None]:
    def change(pipeline: Any) -> None:
        weights = [adapters.ip_adapter_for_flux(pipeline.transformer, seed=seed) for seed in seeds]
        pipeline.load_ip_adapter(
            weights, weight_name=[""] * len(seeds), image_encoder_pretrained_model_name_or_path=None
        )

    return change


def load_for_sd3(pipeline: Any) -> None:
    weights = adapters.ip_adapter_for_sd3(pipeline.transformer, seed=1)
    pipeline.load_ip_adapter(weights, weight_name="", image_encoder_folder=None)


def load_word(pipeline: Any) -> None:
    """A word of two vectors, for each of the text encoders."""
    for number, name in enumerate(("", "_2")):
        encoder, tokenizer = getattr(pipeline, f"text_encoder{name}"), getattr(pipeline, f"tokenizer{name}")
        vectors = adapters.inversion(encoder, 2, seed=number)
        pipeline.load_textual_inversion({WORD: vectors}, text_encoder=encoder, tokenizer=tokenizer)


def unload_word(pipeline: Any) -> None:
    for name in ("", "_2"):
        pipeline.unload_textual_inversion(
            text_encoder=getattr(pipeline, f"text_encoder{name}"), tokenizer=getattr(pipeline, f"tokenizer{name}")
        )


ONE_FOR_UNET = dict(ip_adapter_image_embeds=embedded(4, 1, 1))
ONE_FOR_FLUX = dict(ip_adapter_image_embeds=embedded(2, 1, 1), negative_ip_adapter_image_embeds=embedded(2, 1, 3))
NAMED = dict(prompt=[f"a {WORD}", f"{WORD} the cat"])
ONE_FOR_SD3 = dict(ip_adapter_image_embeds=embedded(2, 5, 1)[0])
"""Without it, and with it; for every prompt the same."""

STORIES = {
    "Stable Diffusion XL": Story(
        sdxl.build,
        sdxl.call_text(2) | dict(num_inference_steps=2),
        (
            Chapter("plain", is_told_before=False),
            Chapter("a picture", load_for_unet(1), ONE_FOR_UNET),
            Chapter("less of it", calling("set_ip_adapter_scale", 0.4), ONE_FOR_UNET, is_told_before=False),
            Chapter("two", load_for_unet(1, 2), dict(ip_adapter_image_embeds=embedded(4, 1, 1, 2))),
            Chapter("unloaded", calling("unload_ip_adapter"), like="plain"),
            Chapter("a word that is not known", call=NAMED, is_told_before=False),
            Chapter("a word", load_word, NAMED),
            Chapter("without it", unload_word, NAMED, like="a word that is not known", is_told_before=False),
        ),
    ),
    "FLUX.1": Story(
        lambda: flux.build("FluxPipeline"),
        flux.call(2) | dict(num_inference_steps=2, true_cfg_scale=1.0),
        (
            Chapter("plain", is_told_before=False),
            Chapter("a picture", load_for_flux(1), ONE_FOR_FLUX),
            Chapter("less of it", calling("set_ip_adapter_scale", [0.4, 0.2]), ONE_FOR_FLUX, is_told_before=False),
            Chapter(
                "two",
                load_for_flux(1, 2),
                dict(
                    ip_adapter_image_embeds=embedded(2, 1, 1, 2), negative_ip_adapter_image_embeds=embedded(2, 1, 3, 4)
                ),
                is_told_before=False,
            ),
            Chapter("unloaded", calling("unload_ip_adapter"), like="plain"),
        ),
    ),
    "Stable Diffusion 3": Story(
        sd3.build,
        sd3.call(2) | dict(num_inference_steps=2),
        (
            Chapter("plain", is_told_before=False),
            Chapter("a picture", load_for_sd3, ONE_FOR_SD3),
            Chapter(
                "less of it",
                calling("set_ip_adapter_scale", 0.1),
                ONE_FOR_SD3,
                is_told_before=False,
            ),
            Chapter("unloaded", calling("unload_ip_adapter"), like="plain"),
        ),
    ),
}


def told(name: str, degrees: dict[str, int]) -> dict[str, Told]:
    return tell(STORIES[name], degrees)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("FLUX.1", dict(ulysses=2)),
        ("Stable Diffusion 3", dict(ulysses=2)),
        ("Stable Diffusion 3", dict(cfg=2, ulysses=1)),
        ("Stable Diffusion XL", dict(cfg=2, ulysses=1)),
        ("Stable Diffusion XL", dict(data=2, ulysses=1)),
    ],
)
def test_image_prompts_and_words(name: str, degrees: dict[str, int]) -> None:
    assert faults(STORIES[name], run_ranks(told, 2, name, degrees)) == {}


@pytest.mark.parametrize("name", STORIES)
def test_on_one_rank_all_is_bitwise(name: str) -> None:
    for chapter, one in tell(STORIES[name], dict(ulysses=1)).items():
        assert (one.under, one.before, one.is_restored) == (0.0, 0.0, True), chapter


def with_handles_alone() -> list[tuple[float, bool]]:
    """By chapter, without an engine: (error under the handles, whether it is the picture of a pipeline that never had
    any, once they are off)."""
    story = STORIES["FLUX.1"]
    plain, under = story.build(), story.build()
    config = parafuse.Config(parallel=parafuse.Parallel(ulysses=2))
    found: list[float] = []
    with parafuse.apply(under, config):
        for chapter in story.chapters:
            for pipeline in (plain, under):
                chapter.change(pipeline)
            want, got = (paint(pipeline, story.call | chapter.call) for pipeline in (plain, under))
            found.append(relative_error(got, want))
    restored = all(map(torch.equal, paint(under, story.call), paint(plain, story.call)))
    return [(wrong, restored) for wrong in found]


def test_changes_under_handles_without_an_engine() -> None:
    for found in run_ranks(with_handles_alone, 2):
        assert all(wrong <= EXACT and restored for wrong, restored in found), found
