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
from diffusers import FirstBlockCacheConfig, FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

import parafuse
from parafuse import Config, Engine, Parallel
from parafuse.engine.overlap.lane import Lane, Pending
from parafuse.engine.overlap.watch import alike
from parafuse.errors import ConfigError, RankError, UnsupportedError
from tests.dist.ranks import close_pools, run_ranks
from tests.vae.after_decode import (
    LATE,
    CallsAfter,
    CallsLate,
    DrawsAfter,
    DrawsBefore,
    Notes,
    SetsProcessors,
    SetsScheduler,
)

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


def on_ranks(degrees: dict[str, int], vae: str, cache: Any) -> Any:
    torch.set_num_threads(1)
    config = Config(parallel=Parallel(**degrees), vae=vae, cache=cache)
    with Engine.from_pretrained("emoji", config) as engine:
        return pictures(engine, calls())


LAYOUTS: list[tuple[dict[str, int], str, Any]] = [
    ({"ulysses": 2}, "replicated", None),
    ({"ulysses": 2}, "sharded", "first-block:0.2"),
    ({"cfg": 2}, "tiled", None),
    ({"data": 2, "ulysses": 1}, "sharded", None),
    ({"ring": 3}, "sharded", None),
]


@pytest.mark.parametrize(("degrees", "vae", "cache"), LAYOUTS, ids=str)
def test_on_several_ranks(degrees: dict[str, int], vae: str, cache: Any) -> None:
    size = max(degrees.values())
    for same, words, sent in run_ranks(on_ranks, size, degrees, vae, cache):
        check(same, words)
        assert any(name.startswith("vae.") for name in sent) is (vae == "sharded")


def test_ranks_that_an_engine_has_started() -> None:
    config = Config(parallel=Parallel(ulysses=2), vae="sharded")
    with Engine.from_pretrained("emoji", config) as engine:
        same, words, sent = pictures(engine, calls())
        check(same, words)
        assert "vae.all_gather" in sent
        other = engine.from_pipe(FluxImg2ImgPipeline)
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        same, words, _ = pictures(other, calls(image=image, strength=0.9))
        check(same, words)
        pending = [engine.submit(**calls()[0]), other.submit(**calls(image=image, strength=0.9)[0])]
        assert all(one.result() for one in pending)


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


def with_replicas() -> list[str]:
    with Engine.from_pretrained("emoji", Config(parallel=Parallel(data=2))) as engine:
        return [engine.receipt["overlap"] for _ in engine.map(calls())]


def test_replicas_that_cut_the_samples_of_a_decode() -> None:
    for words in run_ranks(with_replicas, 2):
        assert all(word.startswith("none: the samples of a decode are cut between replicas") for word in words)


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


def fails_on_rank_1() -> list[str]:
    torch.set_num_threads(1)
    found: list[str] = []
    engine = Engine.from_pretrained("emoji", Config(parallel=Parallel(ulysses=2), vae="sharded", timeout_s=20.0))
    outputs = engine.map(calls())
    found += [str(pixels(next(outputs)).shape) for _ in range(2)]
    if engine.rank == 1:
        engine.pipeline.vae.decoder.conv_out.forward = lambda *_: 1 / 0
    try:
        for _ in outputs:
            found.append("more")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    try:
        engine(**calls()[0])
    except Exception as error:
        found.append(str(error))
    return found


def test_a_rank_that_fails_in_a_decode_ends_it_on_all() -> None:
    try:
        first, second = run_ranks(fails_on_rank_1, 2)
    finally:
        close_pools()  # rank 0 has left an exchange behind
    assert [len(first), len(second)] == [4, 4]
    assert "ZeroDivisionError" in second[2]
    assert first[2].startswith(("RankError", "RuntimeError"))
    assert all("a rank was lost in an earlier request" in found[3] for found in (first, second))


def one_submits() -> str:
    with Engine.from_pretrained("emoji", Config(parallel=Parallel(ulysses=2))) as engine:
        try:
            if engine.rank:
                engine(**calls()[0])
            else:
                engine.submit(**calls()[0]).result()
        except RankError as error:
            return str(error)
    return "nothing"


def test_ranks_that_ask_differently_are_told() -> None:
    for text in run_ranks(one_submits, 2):
        assert "overlaps is true on rank 0, false on rank 1" in text


def other_autoencoders() -> str:
    with Engine.from_pretrained("emoji", Config(parallel=Parallel(ulysses=2))) as engine:
        outputs = engine.map(calls())
        try:
            next(outputs)
            next(outputs)
            engine.pipeline.vae.use_slicing = bool(engine.rank)
            return str(len(list(outputs)))
        except RankError as error:
            return str(error)


def test_autoencoders_that_differ_are_told() -> None:
    assert all("was given an autoencoder other than rank 0's" in text for text in run_ranks(other_autoencoders, 2))


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


def two_engines() -> tuple[list[bool], bool]:
    torch.set_num_threads(1)
    first = Engine.from_pretrained("emoji", Config(parallel=Parallel(ulysses=2), vae="sharded"))
    second = Engine.from_pretrained("emoji", Config(parallel=Parallel(cfg=2), vae="sharded"))
    with first, second:
        both = [first, second] * 2
        asked = [one for one in calls()[:2] for _ in range(2)]
        want = [pixels(engine(**one)) for engine, one in zip(both, asked, strict=True)]
        pending = [engine.submit(**one) for engine, one in zip(both, asked, strict=True)]
        same = [np.array_equal(pixels(one.result()), picture) for one, picture in zip(pending, want, strict=True)]
        pending = [first.submit(**one) for one in calls()[:2]] + [second.submit(**one) for one in calls()[:2]]
        same += [
            np.array_equal(pixels(one.result()), x) for one, x in zip(pending, want[::2] + want[1::2], strict=True)
        ]
        return same, all(one.receipt["overlap"] == OVERLAPS for one in pending)


def test_engines_over_the_same_ranks_share_a_lane() -> None:
    """Else their exchanges would meet in another order on each rank."""
    for same, overlap in run_ranks(two_engines, 2):
        assert all(same)
        assert overlap
