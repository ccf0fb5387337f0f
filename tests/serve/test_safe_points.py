"""All ranks leave a request at the same step boundary, whenever it is told to stop, and the engine goes on."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import parafuse
from parafuse.engine.safe_points import Boundary, SafePoints, StoppedError
from parafuse.errors import ConfigError
from tests.dist.ranks import RankFailure, run_ranks
from tests.guided import sd3, stable_diffusion
from tests.guided.parts import prompts

CALL: dict[str, Any] = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 8, "width": 32, "height": 32}
SLACK = 2
"""Boundaries between the word and the way out at most: one is decided already, at the next one it is heard."""


class Alone(SafePoints):
    """The safeguard off: each rank decides for itself."""

    def passes(self, boundary: int) -> None:
        reason = self._asked()
        if reason:
            raise StoppedError(reason, boundary)


class Asked:
    """Says stop once `moment` has come: a step of this rank, and seconds within it."""

    def __init__(self, step: int, seconds: float):
        self.step, self.seconds, self.at = step, seconds, 0
        self.reason = ""

    def seen(self, boundary: Boundary) -> None:
        self.at = boundary.step
        if boundary.step == self.step:
            threading.Timer(self.seconds, self.say).start()

    def say(self) -> None:
        self.reason, self.said_at = "the client is gone", self.at


def picture(engine: parafuse.Engine, **more: Any) -> Tensor:
    return torch.from_numpy(np.asarray(engine(**CALL | more).images[0]).astype(int))


def stopped(engine: parafuse.Engine, points: SafePoints, seen: Any) -> StoppedError:
    with pytest.raises(StoppedError) as raised, points.request(engine.pipeline, CALL, seen) as keywords:
        engine(**keywords)
    return raised.value


def leaves_at_random(config: dict[str, Any], degrees: dict[str, int], seed: int, kind: type[SafePoints]) -> list[int]:
    """The boundaries at which three requests were left; the last rank leads. Ranks are of different speed."""
    engine = parafuse.Engine.from_pretrained("emoji", parafuse.Config(parallel=parafuse.Parallel(**degrees), **config))
    before, world, own = picture(engine), engine.world, random.Random(f"{seed} {engine.rank}")
    same, left, now = random.Random(seed), list[int](), [Asked(0, 0.0)]
    points = kind(world, world.size - 1, lambda: now[0].reason)
    for _ in range(3):
        later = 2 * (world.size - 1 - world.rank)  # the word comes to each rank at another time
        asked = Asked(same.randint(1, 3) + later, same.random() * 0.05)

        def seen(boundary: Boundary, asked: Asked = asked) -> None:
            time.sleep(own.random() * 0.03)
            asked.seen(boundary)

        now[0] = asked
        error = stopped(engine, points, seen)
        left.append(error.boundary)
        assert error.boundary <= (asked.said_at if world.rank == world.size - 1 else 8) + SLACK
        assert not world.broken
    assert torch.equal(picture(engine), before)  # bitwise that of before
    engine.close()
    return left


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize(
    ("size", "degrees", "config"),
    [
        (2, {"ulysses": 2}, {}),
        (3, {"ring": 3}, {}),
        (2, {"cfg": 2}, {"cache": "first-block:0.1"}),
    ],
)
def test_all_ranks_leave_at_the_same_boundary(size: int, degrees: dict[str, int], config: dict[str, Any]) -> None:
    results = run_ranks(leaves_at_random, size, config, degrees, 11, SafePoints)
    assert len(results[0]) == 3
    assert results == [results[0]] * size


def test_ranks_that_decide_alone_leave_apart() -> None:
    with pytest.raises(RankFailure):
        run_ranks(leaves_at_random, 2, {"timeout_s": 6.0}, {"ulysses": 2}, 11, Alone, timeout_s=60.0)


def after_a_stop(config: dict[str, Any], degrees: dict[str, int]) -> bool:
    """Whether a picture after a request that was left is that of before, and of a fresh engine."""
    engine = parafuse.Engine.from_pretrained("emoji", parafuse.Config(parallel=parafuse.Parallel(**degrees), **config))
    fresh = picture(engine)
    points = SafePoints(engine.world, 0, lambda: "no time left")
    assert stopped(engine, points, lambda _: None).boundary == 1
    again = picture(engine)
    engine.close()
    return torch.equal(again, fresh)


@pytest.mark.parametrize(
    ("degrees", "config"),
    [
        ({"cfg": 2}, {}),
        ({"ulysses": 2}, {"cache": "taylorseer"}),
        ({"ulysses": 2}, {"offload": "group:to=disk"}),
        ({"data": 2}, {"cache": "pab"}),
    ],
)
def test_the_next_picture_is_right(degrees: dict[str, int], config: dict[str, Any]) -> None:
    assert run_ranks(after_a_stop, 2, config, degrees) == [True, True]


def test_a_pipeline_without_the_callback_is_left_at_its_schedulers_steps() -> None:
    pipeline = stable_diffusion.build(diffusers.DDIMScheduler())
    kind = type(pipeline)
    bare = type(kind.__name__, (kind,), {"__call__": _without_callback})
    pipeline.__class__ = bare
    engine = parafuse.Engine.from_pipeline(pipeline, alone=True)
    call = prompts(1) | {"height": 16, "width": 16, "num_inference_steps": 6, "output_type": "latent"}
    plain, steps = engine(**call, seed=3).images, list[Boundary]()
    asked = [""]
    points = SafePoints(engine.world, 0, lambda: asked[0])
    with points.request(engine.pipeline, call, steps.append) as keywords:
        assert "callback_on_step_end" not in keywords
        counted = engine(**keywords, seed=3).images
    assert torch.equal(counted, plain)
    assert [one.step for one in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0].num_steps == 6
    assert steps[-1].latents is not None
    assert torch.equal(steps[-1].latents, plain)

    def late(boundary: Boundary) -> None:
        asked[0] = "enough" if boundary.step == 3 else ""

    with (
        pytest.raises(StoppedError, match="stopped after step 4: enough"),
        points.request(engine.pipeline, call, late) as keywords,
    ):
        engine(**keywords, seed=3)
    assert "step" not in vars(engine.pipeline.scheduler)
    assert torch.equal(engine(**call, seed=3).images, plain)


def _without_callback(self: Any, prompt: Any = None, negative_prompt: Any = None, generator: Any = None,
                      height: int = 16, width: int = 16, num_inference_steps: int = 2,
                      output_type: str = "latent") -> Any:  # fmt: skip
    given = {name: value for name, value in locals().items() if name != "self"}
    return diffusers.StableDiffusionPipeline.__call__(self, **given)


def test_a_callback_of_the_user_is_refused() -> None:
    pipeline = sd3.build()
    points = SafePoints(parafuse.Engine.from_pipeline(pipeline, alone=True).world, 0, lambda: "")
    with (
        pytest.raises(ConfigError, match="leave it out"),
        points.request(pipeline, {"callback_on_step_end": print}, lambda _: None),
    ):
        pass
