"""The embedded model's pictures: the same on every layout as with plain diffusers, within 1 of 255."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parafuse
from tests.dist.ranks import run_ranks

MODEL = Path(parafuse.__file__).parent / "models" / "emoji"
CALLS: list[dict[str, Any]] = [
    {"prompt": "a red apple"},
    {"prompt": ["a rocket", ""], "width": 96, "height": 72},  # batch 2, 108 tokens: 4 ranks get 27, 3 ranks 36
    {"prompt": "сова " * 400, "width": 40, "height": 56, "true_cfg_scale": 1.0},  # 35 tokens, no guidance, cut text
]
STEPS = {"num_inference_steps": 2}
LAYOUTS = [(2, 1), (3, 1), (4, 1), (2, 2), (3, 3), (4, 4), (4, 2)]


def paint(call: dict[str, Any]) -> np.ndarray:
    """With plain diffusers and the model's own defaults."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    defaults = json.loads((MODEL / "parafuse.json").read_text())["call"] | STEPS
    if isinstance(call["prompt"], list):
        defaults["negative_prompt"] = [""] * len(call["prompt"])
    images = pipeline(**(defaults | call), generator=torch.Generator().manual_seed(7), return_dict=False)[0]
    return np.stack([np.asarray(image) for image in images]).astype(int)


def paint_on_rank(ring: int, calls: list[dict[str, Any]]) -> list[np.ndarray]:
    engine = parafuse.Engine.from_pretrained("emoji", parafuse.Config(parallel=parafuse.Parallel(ring=ring)))
    outputs = [engine(**call, **STEPS, seed=7) for call in calls]
    engine.close()
    return [np.stack([np.asarray(image) for image in output.images]).astype(int) for output in outputs]


@pytest.fixture(scope="module")
def plain() -> list[np.ndarray]:
    return [paint(call) for call in CALLS]


@pytest.mark.parametrize(("world_size", "ring"), LAYOUTS)
def test_the_picture_does_not_depend_on_the_layout(world_size: int, ring: int, plain: list[np.ndarray]) -> None:
    for rank, painted in enumerate(run_ranks(paint_on_rank, world_size, ring, CALLS, timeout_s=180)):
        for call, mine, expected in zip(CALLS, painted, plain, strict=True):
            assert mine.shape == expected.shape
            assert np.abs(mine - expected).max() <= 1, f"rank {rank}: {call}"


def test_one_rank_is_bitwise_diffusers(plain: list[np.ndarray]) -> None:
    engine = parafuse.Engine.from_pretrained("emoji", parafuse.Config())
    for call, expected in zip(CALLS, plain, strict=True):
        images = engine(**call, **STEPS, seed=7).images
        assert np.array_equal(np.stack([np.asarray(image) for image in images]).astype(int), expected)
    assert engine.handle.applied == []
    assert "forward" not in vars(engine.pipeline.transformer)


def test_the_comparison_can_fail(plain: list[np.ndarray]) -> None:
    """Negative control: another seed is another picture."""
    engine = parafuse.Engine.from_pretrained("emoji", parafuse.Config())
    image = engine(**CALLS[0], **STEPS, seed=8).images[0]
    assert np.abs(np.asarray(image).astype(int) - plain[0][0]).max() > 1
