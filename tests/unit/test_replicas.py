"""The part of a call that is one replica's: rows of arguments, rows of noise, and outputs joined again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from parafuse.engine.noise import shared_noise
from parafuse.engine.replicas import merged, share_of
from parafuse.errors import ConfigError


def rows(call: dict[str, Any], degree: int) -> list[dict[str, Any]]:
    return [share_of(call, degree, replica).call for replica in range(degree)]


def test_prompts_are_spread_in_order_and_unevenly() -> None:
    found = rows({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y", "z"], "width": 8, "sigmas": [1, 2, 3]}, 2)
    assert [call["prompt"] for call in found] == [["a", "b"], ["c"]]
    assert [call["negative_prompt"] for call in found] == [["x", "y"], ["z"]]
    assert all(call["sigmas"] == [1, 2, 3] and call["width"] == 8 for call in found)
    assert share_of({"prompt": ["a"]}, 3, 2).is_idle


def test_pictures_of_one_prompt_and_of_several() -> None:
    found = rows({"prompt": "a", "negative_prompt": "x", "num_images_per_prompt": 3}, 2)
    assert found[0] == {"prompt": ["a", "a"], "negative_prompt": ["x", "x"], "num_images_per_prompt": 1}
    assert found[1] == {"prompt": "a", "negative_prompt": "x", "num_images_per_prompt": 1}
    several = rows({"prompt": ["a", "b"], "num_videos_per_prompt": 2}, 3)
    assert [call["prompt"] for call in several] == [["a", "a"], ["b"], ["b"]]


def test_embeddings_latents_generators_and_pictures() -> None:
    embeds, latents = torch.arange(6).view(2, 3), torch.arange(4).view(4, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    call = {"prompt_embeds": embeds, "latents": latents, "generator": generators, "num_images_per_prompt": 2}
    first, second = rows(call | {"image": ["p", "q"], "mask_image": "m"}, 2)
    assert first["prompt_embeds"].tolist() == [[0, 1, 2]] * 2
    assert second["prompt_embeds"].tolist() == [[3, 4, 5]] * 2
    assert (first["latents"].flatten().tolist(), second["latents"].flatten().tolist()) == ([0, 1], [2, 3])
    assert (first["generator"], second["generator"]) == (generators[:2], generators[2:])
    assert (first["image"], second["image"], first["mask_image"]) == (["p", "p"], ["q", "q"], "m")


def test_lengths_added_up_are_those_of_the_chosen_prompts() -> None:
    call = {"prompt_embeds": torch.zeros(3, 2), "prompt_cu_seqlens": torch.tensor([0, 5, 7, 10], dtype=torch.int32)}
    found = [part["prompt_cu_seqlens"] for part in rows(call, 2)]
    assert [x.tolist() for x in found] == [[0, 5, 7], [0, 3]]
    assert found[0].dtype == torch.int32


def test_lengths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="negative_prompt: 2 given for 3 prompts and 3 pictures"):
        share_of({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, 2, 0)


class Denoiser(nn.Module):
    def forward(self) -> int:
        return len(_get_current_function_mode_stack())


def paint(call: dict[str, Any], denoiser: Denoiser) -> list[torch.Tensor]:
    """As a pipeline draws: for the pictures it encodes (one for all, or each), for the start, and for a step."""
    generator, count = call["generator"], len(call["prompt"]) * call.get("num_images_per_prompt", 1)
    pictures = call.get("image")
    found = []
    if pictures is not None:
        rows = count if call["repeat"] else len(pictures) if isinstance(pictures, list) else 1
        found.append(torch.randn((rows, 3, 2), generator=generator, dtype=torch.float32))
    found.append(torch.randn((count, 3, 2), generator=generator))
    assert denoiser() == 0
    found += [torch.randn(size=(count, 5), generator=generator), torch.randn(count, 5, generator=generator)]
    return [*found, torch.randn(7, 5, generator=generator)]


@pytest.mark.parametrize("degree", [2, 3, 6])
@pytest.mark.parametrize("given", [None, "one", "one, repeated", "each"])
def test_noise_is_that_of_the_whole_batch(degree: int, given: str | None) -> None:
    """Three prompts, two pictures each: six rows; pictures for all, or for each prompt."""
    total, denoiser = 6, Denoiser()
    pictures: Any = {None: None, "each": ["p", "q", "r"]}.get(given, "p")
    call = {
        "prompt": ["a", "b", "c"],
        "num_images_per_prompt": 2,
        "image": pictures,
        "repeat": given == "one, repeated",
    }
    whole = paint(call | {"generator": torch.Generator().manual_seed(0)}, denoiser)
    parts = []
    for replica in range(degree):
        own = call | {"generator": torch.Generator().manual_seed(0)}
        share = share_of(own, degree, replica)
        with shared_noise(share, lambda values: paint(values, denoiser), own, [denoiser]):
            parts.append(paint(share.call, denoiser))
    assert "forward" not in vars(denoiser)
    assert len(_get_current_function_mode_stack()) == 0
    numbers = range(len(whole) - 1)
    for number in numbers:
        joined, want = torch.cat([part[number] for part in parts]), whole[number]
        if len(want) == 1:
            want = want.expand(len(joined), *want.shape[1:])
        elif len(want) == 3:
            want = want.repeat_interleave(2, 0)
        assert len(joined) in (total, degree)
        assert torch.equal(joined, want)
    assert all(torch.equal(part[-1], whole[-1]) for part in parts)


@dataclass
class Output:
    images: Any
    flags: list[bool] | None = None


def test_outputs_are_joined_in_order() -> None:
    found = merged([Output(["a", "b"], [True, False]), Output(["c"], [True])])
    assert found == Output(["a", "b", "c"], [True, False, True])
    arrays = merged([(np.zeros((2, 3)), torch.zeros(2)), (np.ones((1, 3)), torch.ones(1))])
    assert arrays[0].tolist() == [[0] * 3, [0] * 3, [1] * 3]
    assert arrays[1].tolist() == [0, 0, 1]
    assert merged([Output("x", None)]) == Output("x", None)
