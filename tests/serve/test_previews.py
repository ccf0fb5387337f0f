"""Previews of latents: how near they come to the picture, in every form of latents; and none where nothing fits."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import parafuse
from parafuse.engine.previews import Previews, clean
from parafuse.engine.safe_points import Boundary, SafePoints

NUM_STEPS = 10
SEEN: dict[str, int] = {"a rocket": 2, "a yellow star": 3, "a blue heart": 9}
"""Prompts and seeds that nothing was learned from."""


class Run:
    """What each step of a request has made, and its picture."""

    def __init__(self, engine: parafuse.Engine, prompt: str, seed: int, **more: Any):
        self.steps: list[Tensor] = []
        self.cleaned: list[Tensor] = []
        points = SafePoints(engine.world, 0, lambda: "")
        with points.request(engine.pipeline, {"prompt": prompt, **more}, self.seen) as keywords:
            self.picture = engine(**keywords, seed=seed).images[0]

    def seen(self, boundary: Boundary) -> None:
        assert boundary.latents is not None
        before = self.steps[-1] if self.steps else boundary.latents
        self.cleaned.append(clean(before, boundary.latents, boundary.scheduler) if self.steps else before)
        self.steps.append(boundary.latents.clone())


@pytest.fixture(scope="module")
def engine() -> parafuse.Engine:
    return parafuse.Engine.from_pretrained("emoji")


@pytest.fixture(scope="module")
def learned(engine: parafuse.Engine) -> Previews:
    previews, run = Previews(), Run(engine, "a red apple", 1, num_inference_steps=NUM_STEPS)
    previews.learn(run.steps[-1], [run.picture])
    return previews


def likeness(data: bytes, picture: Image.Image) -> float:
    """Correlation of 16 x 16 pixels."""
    small = [np.asarray(one.convert("RGB").resize((16, 16), Image.Resampling.BOX)) for one in (opened(data), picture)]
    return float(np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1])


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_preview_half_way_is_near_the_picture(engine: parafuse.Engine, learned: Previews) -> None:
    for prompt, seed in SEEN.items():
        run = Run(engine, prompt, seed, num_inference_steps=NUM_STEPS)
        for percent, at_least in ((50, 0.88), (80, 0.92)):
            step = NUM_STEPS * percent // 100 - 1
            [cleaned] = learned.show(run.cleaned[step], run.picture.size)
            [noisy] = learned.show(run.steps[step], run.picture.size)
            assert opened(cleaned).size == (64, 64)
            near, raw = likeness(cleaned, run.picture), likeness(noisy, run.picture)
            print(f"{prompt}, {percent}%: {near:.3f}, without extrapolation {raw:.3f}")
            assert near > at_least
            assert near > raw + 0.02


def test_another_size_than_was_learned(engine: parafuse.Engine, learned: Previews) -> None:
    """A wide picture of the same number of places as a square one has rows of its own length."""
    run = Run(engine, "a rocket", 2, width=256, height=64, num_inference_steps=6)
    [shown] = learned.show(run.cleaned[-1], (256, 64))
    assert opened(shown).size == (256, 64)
    assert likeness(shown, run.picture) > 0.9
    [square] = learned.show(run.cleaned[-1], (128, 128))
    assert likeness(square, run.picture) < likeness(shown, run.picture) - 0.2


def mixed(values_NC: Tensor, seed: int = 0) -> Tensor:
    """Colours of places as 8 channels, linearly."""
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((values_NC - 0.5) @ weights).float()


@pytest.mark.parametrize("kind", ["spatial", "channels first", "frames first", "packed"])
def test_every_form_of_latents(kind: str) -> None:
    frames = np.random.default_rng(3).integers(0, 256, (5, 6, 10, 3), dtype=np.uint8)
    values = torch.from_numpy(frames.astype(np.float64) / 255)
    x_FCHW = mixed(values).permute(0, 3, 1, 2)
    large = [Image.fromarray(frame).resize((80, 48), Image.Resampling.NEAREST) for frame in frames]
    latents, picture = {
        "spatial": (x_FCHW[2:3], large[2]),
        "packed": (x_FCHW[2:3].flatten(2).transpose(1, 2), large[2]),
        "channels first": (x_FCHW.transpose(0, 1)[None], large),
        "frames first": (x_FCHW[None], large),
    }[kind]
    previews = Previews(latent_channels=8)
    assert previews.show(latents, (80, 48)) == []  # nothing is known yet
    previews.learn(latents, [picture])
    [shown] = previews.show(latents, (80, 48))
    found = np.asarray(opened(shown).resize((10, 6), Image.Resampling.BOX)).astype(int)
    assert np.abs(found - frames[2]).mean() < 12  # the middle frame, but for smooth edges
    assert previews.show(torch.cat([latents] * 3), (80, 48)) == [shown] * 3


def test_nothing_is_shown_of_what_does_not_fit() -> None:
    previews, picture = Previews(), Image.new("RGB", (64, 64))
    previews.learn(torch.randn(2, 4, 8, 8), [picture])  # two latents, one picture
    previews.learn(torch.randn(1, 97, 4), [picture])  # a prime number of places
    previews.learn(torch.randn(1, 4), [picture])
    assert previews.show(torch.randn(1, 4, 8, 8), (64, 64)) == []
    previews.learn(torch.randn(1, 4, 8, 8), [picture])
    assert len(previews.show(torch.randn(1, 4, 8, 8), (64, 64))) == 1
    assert previews.show(torch.randn(1, 4, 8, 16), (64, 64)) == []
    assert previews.show(torch.randn(1, 5, 8, 8), (64, 64)) == []


def test_sides_are_within_bounds() -> None:
    for height, width in ((4, 4), (200, 100), (900, 300), (8, 100)):
        previews, latents = Previews(), torch.rand(1, 4, height, width)
        previews.learn(latents, [Image.new("RGB", (width, height))])
        size = opened(previews.show(latents, (width, height))[0]).size
        assert max(size) <= 512
        assert min(size) >= 64 or max(size) == 512  # long pictures are shown whole


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"])
def test_the_clean_picture_is_extrapolated(name: str) -> None:
    """With a denoiser that is right at once, every step tells the picture."""
    import diffusers

    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(8)
    x0, noise = torch.randn(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    is_flow = name.startswith("Flow")
    sigma = scheduler.sigmas[0]
    x = (1 - sigma) * x0 + sigma * noise if is_flow else x0 + sigma * noise
    for t in scheduler.timesteps[:5]:
        if not is_flow:
            scheduler.scale_model_input(x, t)
        after = scheduler.step(noise - x0 if is_flow else noise, t, x).prev_sample
        assert torch.allclose(clean(x, after, scheduler), x0, atol=2e-4)
        assert not torch.allclose(after, x0, atol=1e-2)
        x = after


def test_other_schedulers_show_what_there_is() -> None:
    import diffusers

    for scheduler in (diffusers.DDIMScheduler(), diffusers.EulerAncestralDiscreteScheduler()):
        scheduler.set_timesteps(4)
        after = torch.randn(1, 4, 6, 6)
        assert clean(torch.randn(1, 4, 6, 6), after, scheduler) is after
