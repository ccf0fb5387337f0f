"""Calls of the embedded model that overlap, and what they give."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from diffusers import FluxPipeline

from parafuse import Config, Engine
from tests.vae.after_decode import LATE

SMALL = {"num_inference_steps": 2, "width": 64, "height": 64}
PROMPTS = ("a red apple", "a rocket", "a cat", LATE)
OVERLAPS, FIRST = "decoded while the next request could denoise", "none: it is the first of its kind"


def calls(**more: Any) -> list[dict[str, Any]]:
    return [dict(prompt=prompt, seed=seed, **SMALL, **more) for seed, prompt in enumerate(PROMPTS)]


def pixels(output: Any) -> np.ndarray:
    return np.asarray(output.images[0]).astype(int)


@functools.cache
def components() -> dict[str, Any]:
    return Engine.from_pretrained("emoji").pipeline.components


@contextmanager
def engine_of(kind: type = FluxPipeline, config: Config | None = None) -> Iterator[Engine]:
    """Of the embedded model, in this process."""
    pipeline: Any = kind(**components())
    pipeline.set_progress_bar_config(disable=True)
    with Engine.from_pipeline(pipeline, config) as engine:
        yield engine


def warm(engine: Engine, asked: list[dict[str, Any]]) -> None:
    """The first ones tell how blocks are split, and which branches there are."""
    for _ in engine.map(asked[:2]):
        pass
    for one in asked[:2]:
        engine(**one)


def pictures(engine: Engine, asked: list[dict[str, Any]]) -> tuple[list[bool], list[str], list[Any]]:
    """Of several calls: whether each is bitwise that of a call by itself; what receipts say; what was sent."""
    warm(engine, asked)
    want = [(pixels(engine(**one)), engine.receipt["exchanged"]) for one in asked]
    found = [(pixels(output), dict(engine.receipt)) for output in engine.map(asked)]
    same = [
        bool((a == b).all()) and sent == receipt["exchanged"]
        for (a, sent), (b, receipt) in zip(want, found, strict=True)
    ]
    assert [receipt["seed"] for _, receipt in found] == [one["seed"] for one in asked]
    return same, [receipt["overlap"] for _, receipt in found], list(found[-1][1]["exchanged"])


def check(same: list[bool], words: list[str]) -> None:
    assert same == [True] * len(PROMPTS)
    assert words == [OVERLAPS] * len(PROMPTS)
