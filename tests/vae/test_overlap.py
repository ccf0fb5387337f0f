"""A request that decodes while the next one denoises: the same pictures, in the same order, and nothing in between."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline
from PIL import Image

import parafuse
from parafuse import Config
from parafuse.engine.overlap.lane import Lane, Pending
from parafuse.engine.overlap.watch import alike
from parafuse.errors import ConfigError, UnsupportedError
from tests.vae.after_decode import CallsAfter, CallsLate, DrawsAfter, DrawsBefore, Notes, SetsProcessors, SetsScheduler
from tests.vae.overlapping import FIRST, OVERLAPS, PROMPTS, SMALL, calls, check, components, engine_of, pictures, pixels


def test_on_one_rank() -> None:
    with engine_of() as engine:
        same, words, sent = pictures(engine, calls())
        assert not {"decode", "encode"} & set(vars(engine.pipeline.vae))
    check(same, words)
    assert sent == []


def test_the_first_of_a_kind_is_looked_at() -> None:
    with engine_of() as engine:
        words = [engine.receipt["overlap"] for _ in engine.map(calls())]
        assert words[0].startswith(FIRST)
        assert words[1:] == [OVERLAPS] * (len(PROMPTS) - 1)
        parts = components().values()
        assert any(part._forward_pre_hooks for part in parts if isinstance(part, torch.nn.Module))
    assert not any(part._forward_pre_hooks for part in parts if isinstance(part, torch.nn.Module))


class Order:
    """Decodes that wait until another request has made a step, and what begins and ends when."""

    def __init__(self, vae: Any, *, waits: Callable[[int], bool] = lambda _: False):
        self.events: list[str] = []
        self._vae, self._waits, self._stepped = vae, waits, threading.Condition()
        self._steps = self._decodes = 0

    def step(self, *args: Any) -> dict[str, Any]:
        with self._stepped:
            self.events.append("step")
            self._steps += 1
            self._stepped.notify_all()
        return args[-1]

    @contextmanager
    def __call__(self) -> Iterator[Order]:
        with (
            patch.object(self._vae, "decode", self._seen("decode")),
            patch.object(self._vae, "encode", self._seen("encode")),
        ):
            yield self

    def _seen(self, name: str) -> Any:
        original = getattr(self._vae, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            self.events.append(f"{name} begins")
            before, number = self._steps, self._decodes
            self._decodes += name == "decode"
            if name == "decode" and self._waits(number):
                with self._stepped:
                    assert self._stepped.wait_for(lambda: self._steps > before, timeout=60), "nothing overlapped"
            result = original(*args, **kwargs)
            self.events.append(f"{name} ends")
            return result

        return method


def test_a_decode_may_wait_for_the_next_request_to_make_a_step() -> None:
    with engine_of() as engine, Order(engine.pipeline.vae, waits=lambda n: n in (1, 2))() as order:
        found = [pixels(one) for one in engine.map(calls(callback_on_step_end=order.step))]
    assert len(found) == len(PROMPTS)


def apart(events: list[str]) -> bool:
    """Whether no decode or encode begins before the one before it has ended."""
    own = [event for event in events if event != "step"]
    return all(a.split()[0] == b.split()[0] and b.endswith("ends") for a, b in zip(own[::2], own[1::2], strict=True))


def test_decodes_and_encodes_go_one_after_the_other() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    asked = calls(image=image, strength=0.99)
    with engine_of(FluxImg2ImgPipeline) as engine:
        want = [pixels(engine(**one)) for one in asked]
        with Order(engine.pipeline.vae)() as order:
            got = [pixels(one) for one in engine.map(asked)]
    assert all(map(np.array_equal, got, want))
    assert order.events.count("encode begins") == order.events.count("decode begins") == len(PROMPTS)
    assert apart(order.events)


def test_requests_of_other_kinds_do_not_overlap() -> None:
    asked = [one | {"num_inference_steps": 2 + number % 2} for number, one in enumerate(calls() + calls())]
    with engine_of() as engine, Order(engine.pipeline.vae)() as order:
        for _ in engine.map([one | {"callback_on_step_end": order.step} for one in asked]):
            pass
    whole = " ".join(order.events)
    assert whole.count("decode begins decode ends") == len(asked)  # no step in between


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (CallsAfter, "the pipeline calls text_encoder after its first decode"),
        (Notes, "the pipeline changes _number after its first decode"),
        (SetsProcessors, "the pipeline changes transformer after its first decode"),
        (SetsScheduler, "the pipeline changes scheduler after its first decode"),
        (DrawsAfter, "decoding draws noise that comes from no seed"),
        (DrawsBefore, "denoising draws noise that comes from no seed"),
    ],
)
def test_what_a_pipeline_does_after_its_decode_is_found(kind: type, why: str) -> None:
    with engine_of(kind) as engine, Order(engine.pipeline.vae)() as order:
        for _ in engine.map(calls(callback_on_step_end=order.step)):
            assert engine.receipt["overlap"].startswith(f"none: {why}")
    assert " ".join(order.events).count("decode begins decode ends") == len(PROMPTS)


def test_without_a_decode() -> None:
    with engine_of() as engine:
        for _ in engine.map(calls(output_type="latent")):
            assert engine.receipt["overlap"] == "none: the request had no decode"


def test_beside_what_lets_nothing_overlap() -> None:
    with engine_of(config=Config(offload="model:to=disk")) as engine:
        assert [engine.receipt["overlap"] for _ in engine.map(calls())] == [
            "none: weights are offloaded, and components take turns on the device"
        ] * len(PROMPTS)
    with engine_of() as engine:
        engine.pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        try:
            assert all("own cache is on transformer" in engine.receipt["overlap"] for _ in engine.map(calls()))
        finally:
            engine.pipeline.transformer.disable_cache()


def test_what_a_request_shows_for_the_first_time_is_refused() -> None:
    with engine_of(CallsLate) as engine:
        outputs = engine.map(calls())
        assert [pixels(next(outputs)).shape for _ in range(3)] == [(64, 64, 3)] * 3
        with pytest.raises(UnsupportedError, match="text_encoder: was called after a decode"):
            next(outputs)
        assert engine(**calls()[0]).images


def test_previews_are_no_end() -> None:
    """A callback may decode what there is after each step."""

    def preview(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline.vae.decode(torch.zeros(1, pipeline.vae.config.latent_channels, 4, 4))
        return tensors

    with engine_of() as engine, Order(engine.pipeline.vae)() as order:
        same, words, _ = pictures(engine, calls(callback_on_step_end=preview))
    check(same, words)
    assert apart(order.events)


def test_a_callback_that_calls_the_engine_is_told() -> None:
    """It would wait for itself."""
    with engine_of() as engine:

        def calls_back(*args: Any) -> dict[str, Any]:
            engine(**calls()[1])
            return args[-1]

        with pytest.raises(UnsupportedError, match="a callback of a submitted request has called it"):
            engine.submit(**calls(callback_on_step_end=calls_back)[0]).result()
        assert engine(**calls()[0]).images


def test_a_wrong_call_is_told_when_the_one_before_was_given() -> None:
    with engine_of() as engine:
        outputs = engine.map([calls()[0], {"prompt": "x", "num_inference_steps": 0}])
        assert next(outputs).images
        with pytest.raises(ConfigError, match="num_inference_steps=0"):
            next(outputs)
        assert len(list(engine.map(calls()[:1]))) == 1


def test_an_interrupt_while_a_request_waits_to_begin() -> None:
    """Nothing is kept locked."""
    with engine_of() as engine:
        with patch.object(Lane, "begin", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            engine.submit(**calls()[0])
        engine._lane.drain()


def test_autocast_reaches_the_request() -> None:
    with engine_of() as engine, torch.autocast("cpu", torch.bfloat16):
        same, words, _ = pictures(engine, calls())
    check(same, words)


def test_arguments_that_two_calls_may_share() -> None:
    with engine_of() as engine:
        shared = torch.Generator().manual_seed(1)
        asked: list[dict[str, Any]] = [dict(prompt=prompt, generator=shared, **SMALL) for prompt in PROMPTS]
        words = [engine.receipt["overlap"] for _ in engine.map(asked)]
        assert words[1:] == [OVERLAPS] * (len(PROMPTS) - 1)
        unlike = calls(callback_on_step_end=functools.partial(lambda *args: args[-1]))
        for _ in engine.map(unlike):
            assert "callback_on_step_end is no number" in engine.receipt["overlap"]


def test_an_error_comes_at_its_turn() -> None:
    with engine_of() as engine:
        vae: Any = engine.pipeline.vae
        original, numbers = vae.decode, iter(range(9))

        def decode(*args: Any, **kwargs: Any) -> Any:
            if next(numbers) == 2:
                raise ValueError("the third one")
            return original(*args, **kwargs)

        with patch.object(vae, "decode", decode):
            outputs = engine.map(calls())
            assert next(outputs)
            assert next(outputs)
            with pytest.raises(ValueError, match="the third one"):
                next(outputs)
            assert next(numbers) == 4  # the fourth was on its way, and has ended
            assert engine(**calls()[1]).images


def test_other_calls_wait() -> None:
    with engine_of() as engine:
        want = [pixels(engine(**one)) for one in calls()]
        pending = [engine.submit(**one) for one in calls()[:2]]
        assert np.array_equal(pixels(engine(**calls()[2])), want[2])
        assert all(one.done() for one in pending)
        one = engine.submit(**calls()[0])
        engine.vae.enable_slicing()
        assert one.done()
        assert "decode" not in vars(engine.pipeline.vae)
        engine.vae.disable_slicing()
        later = engine.submit(**calls()[3])
    assert np.array_equal(pixels(later.result()), want[3])
    assert later.receipt["seed"] == 3


def test_an_interrupt_ends_what_is_on_its_way() -> None:
    with engine_of() as engine:
        list(engine.map(calls()[:1]))
        long = calls()[1] | {"num_inference_steps": 500}
        steps: list[int] = []

        def count(*args: Any) -> dict[str, Any]:
            steps.append(args[1])
            return args[-1]

        with patch.object(Pending, "result", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            for _ in engine.map([calls()[0], long | {"callback_on_step_end": count}]):
                pass
        assert len(steps) < 250
        with pytest.raises(parafuse.ParafuseError, match="a rank was lost"):
            engine(**calls()[0])


def test_the_command_line(tmp_path: Path) -> None:
    """In processes of its own: the same files with the option and without."""
    argv = [*PROMPTS[:3], "--seed", "3", "--steps", "2", "--width", "64", "--height", "64", "--quiet"]
    for name, more in (("plain", []), ("overlap", ["--overlap"])):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", "parafuse", "generate", *argv, *more, "--out", str(tmp_path / name / "a.png")]
        subprocess.run(command, check=True, timeout=300)
    for number in range(3):
        plain, overlap = (tmp_path / name / f"a-{number}" for name in ("plain", "overlap"))
        images = [np.asarray(Image.open(path.with_suffix(".png"))) for path in (plain, overlap)]
        assert np.array_equal(images[0], images[1])
        words = [json.loads(path.with_suffix(".json").read_text())["overlap"] for path in (plain, overlap)]
        assert words[0] is None
        assert words[1].startswith(OVERLAPS if number else FIRST)


def test_what_makes_requests_alike() -> None:
    x = torch.zeros(1, 3, 8, 8)
    one = dict(prompt="a", negative_prompt=["b"], num_inference_steps=2, image=x, output_type="pil")
    assert alike(one) == alike(one | {"prompt": "c", "negative_prompt": ["d"], "image": x + 1})
    for other in (
        {"num_inference_steps": 3}, {"num_inference_steps": 2.0}, {"output_type": "pt"}, {"prompt": ["a"]},
        {"negative_prompt": ["b", "c"]}, {"image": torch.zeros(1, 3, 8, 16)}, {"image": x.half()}, {"more": None},
    ):  # fmt: skip
        assert alike(one) != alike(one | other), other


def test_kinds_are_forgotten_in_the_end() -> None:
    lane = Lane()
    for number in range(1000):
        lane.learn((number,), "")
    assert len(lane._verdicts) <= 256
