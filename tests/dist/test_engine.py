"""An engine in a plain process: it starts the other ranks itself, and nothing hangs when one of them fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import parafuse
from parafuse.errors import ConfigError, MemoryLimitError, RankError

TWO = parafuse.Config(parallel=parafuse.Parallel(ulysses=2))
STEPS = {"num_inference_steps": 3, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def engine() -> Iterator[parafuse.Engine]:
    with parafuse.Engine.from_pretrained("emoji", TWO, ranks=2) as made:
        yield made


def picture(engine: parafuse.Engine, seed: int = 7) -> np.ndarray:
    return np.asarray(engine("a red apple", seed=seed, **STEPS).images[0]).astype(int)


def test_paints_what_one_rank_paints(engine: parafuse.Engine) -> None:
    alone = parafuse.Engine.from_pretrained("emoji")
    assert np.abs(picture(engine) - picture(alone)).max() <= 1
    assert engine.receipt["plan"]["degrees"]["ulysses"] == 2
    assert engine.receipt["applied"] == ["sequence parallel (ulysses 2) on transformer: 12 blocks"]
    # two branches x three steps x twelve blocks x one exchange in, one out; other gathers come once, from the probe
    assert engine.receipt["exchanged"]["ulysses.all_to_all"]["calls"] == 2 * 3 * 12 * 2
    assert len(engine.receipt["timings_s"]["steps"]) == 2


def test_the_class_is_not_touched(engine: parafuse.Engine) -> None:
    picture(engine)
    from diffusers import FluxTransformer2DModel

    assert "forward" in vars(engine.pipeline.transformer)
    assert "parafuse" not in FluxTransformer2DModel.forward.__module__


def test_a_wrong_call_changes_nothing(engine: parafuse.Engine) -> None:
    before = picture(engine)
    with pytest.raises(ConfigError, match=r"height=63: must be a multiple of 8 .* 56 or 64"):
        engine("a red apple", height=63)
    with pytest.raises(ConfigError, match="unknown key 'hieght'; did you mean 'height'"):
        engine("a red apple", hieght=64)
    with pytest.raises(ConfigError, match="num_inference_steps=0"):
        engine("a red apple", num_inference_steps=0)
    with pytest.raises(ConfigError, match="leave one out"):
        engine("a red apple", seed=1, generator=torch.Generator())
    assert np.array_equal(picture(engine), before)


def test_an_error_on_all_ranks_leaves_the_engine_usable(engine: parafuse.Engine) -> None:
    before = picture(engine)
    with pytest.raises(ConfigError, match=r"check_inputs|Cannot forward both"):
        engine("x", prompt_embeds=torch.zeros(1, 16, 128), pooled_prompt_embeds=torch.zeros(1, 128), seed=1)
    with pytest.raises(RuntimeError):  # found in the middle of the transformer: embeddings of the wrong width
        engine(
            prompt_embeds=torch.zeros(1, 16, 7), pooled_prompt_embeds=torch.zeros(1, 128), negative_prompt=None,
            true_cfg_scale=1.0, seed=1, **STEPS,
        )  # fmt: skip
    assert np.array_equal(picture(engine), before)


def test_a_seed_is_drawn_and_told(engine: parafuse.Engine) -> None:
    first = np.asarray(engine("a rocket", **STEPS).images[0]).astype(int)
    seed = engine.receipt["seed"]
    again = np.asarray(engine("a rocket", seed=seed, **STEPS).images[0]).astype(int)
    assert np.array_equal(first, again)


def test_a_size_that_does_not_fit_is_said_in_a_line() -> None:
    """The CPU's allocator raises a plain RuntimeError."""
    alone = parafuse.Engine.from_pretrained("emoji")
    with pytest.raises(MemoryLimitError, match="out of memory: ask for a smaller size, or more ranks"):
        alone("a red apple", seed=7, num_inference_steps=1, width=8_000_000, height=8_000_000)


def test_two_engines_in_one_process(engine: parafuse.Engine) -> None:
    alone = parafuse.Engine.from_pretrained("emoji")
    mine, theirs = picture(alone), picture(engine)
    assert alone.handle.applied == []
    with pytest.raises(ConfigError, match="another engine of this process has started ranks"):
        parafuse.Engine.from_pretrained("emoji", TWO)
    assert np.array_equal(picture(alone), mine)
    assert np.array_equal(picture(engine), theirs)


def test_a_plan_is_replayed_and_a_killed_rank_fails_in_time(engine: parafuse.Engine, tmp_path: Path) -> None:
    """Last in this file: it closes the shared engine, since a process starts ranks for one engine at a time."""
    expected = picture(engine)
    engine.plan.save(tmp_path / "plan.json")
    plan = parafuse.Plan.load(tmp_path / "plan.json")
    assert plan == engine.plan
    engine.close()
    engine = parafuse.Engine.from_pretrained("emoji", plan=plan)
    assert np.array_equal(picture(engine), expected)
    assert engine._workers is not None
    os.kill(engine._workers._processes.pids[0], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1.*SIGKILL"):
        picture(engine)
    assert time.monotonic() - begun < 20
    with pytest.raises(ConfigError, match="make a new engine"):
        picture(engine)
    engine.close()
