"""The part of a call that is one replica's: rows of arguments, rows of noise, and outputs joined again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from parafuse.engine.replicas import merged, share_of, shared_noise
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


def test_lengths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="negative_prompt: 2 given for 3 prompts and 3 pictures"):
        share_of({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, 2, 0)


class Latents:
    def __init__(self, mean: torch.Tensor):
        self.mean = mean


@dataclass
class Encoded:
    latent_dist: Latents


class Vae(nn.Module):
    def encode(self, x: torch.Tensor) -> Encoded:
        return Encoded(Latents(x[..., :2]))


def drawn(call: dict[str, Any], pictures: int, count: int) -> list[torch.Tensor]:
    """As a pipeline draws: for the pictures it encodes, for the start, and for a step."""
    generator, vae = call["generator"], call["vae"]
    shape = vae.encode(torch.zeros(pictures, 3, 4)).latent_dist.mean.shape
    return [
        torch.randn(shape, generator=generator, dtype=torch.float32),
        torch.randn((count, 3, 2), generator=generator),
        torch.randn(size=(count, 5), generator=generator),
        torch.randn(count, 5, generator=generator),
        torch.randn(7, 5, generator=generator),
    ]


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("given", ["one", "each"])
def test_noise_is_that_of_the_whole_batch(degree: int, given: str) -> None:
    """Three prompts, two pictures each: six rows; pictures for all, or for each prompt."""
    vae, total = Vae(), 6
    pictures: Any = "p" if given == "one" else ["p", "q", "r"]
    call = {"prompt": ["a", "b", "c"], "num_images_per_prompt": 2, "image": pictures, "vae": vae}
    whole = drawn(call | {"generator": torch.Generator().manual_seed(0)}, 1 if given == "one" else 3, total)
    parts = []
    for replica in range(degree):
        share = share_of(call | {"generator": torch.Generator().manual_seed(0)}, degree, replica)
        with shared_noise(share, [], vae):
            parts.append(drawn(share.call, 1 if given == "one" else share.count, share.count))
    assert "encode" not in vars(vae)
    for number in (1, 2, 3):
        assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])
    for part in parts:
        assert torch.equal(part[4], whole[4])
    encoded = torch.cat([part[0] for part in parts])
    if given == "one":
        assert all(torch.equal(part[0], whole[0]) for part in parts)
    else:
        assert torch.equal(encoded, whole[0].repeat_interleave(2, 0))


def test_the_denoiser_runs_without_the_watch_on_noise() -> None:
    from torch.overrides import _get_current_function_mode_stack

    class Denoiser(nn.Module):
        def forward(self) -> int:
            return len(_get_current_function_mode_stack())

    denoiser = Denoiser()
    share = share_of({"prompt": ["a", "b"], "generator": torch.Generator()}, 2, 0)
    with shared_noise(share, [denoiser], None):
        assert (denoiser(), len(_get_current_function_mode_stack())) == (0, 1)
    assert len(_get_current_function_mode_stack()) == 0
    assert "forward" not in vars(denoiser)


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
