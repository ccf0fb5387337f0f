"""Requests that overlap on several ranks: the same pictures as one by one, and errors on all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline

from parafuse import Config, Engine, Parallel
from parafuse.errors import RankError
from tests.dist.ranks import close_pools, run_ranks
from tests.vae.overlapping import OVERLAPS, calls, check, pictures, pixels


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


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize(("degrees", "vae", "cache"), LAYOUTS, ids=str)
def test_on_several_ranks(degrees: dict[str, int], vae: str, cache: Any) -> None:
    size = max(degrees.values())
    for same, words, sent in run_ranks(on_ranks, size, degrees, vae, cache):
        check(same, words)
        assert any(name.startswith("vae.") for name in sent) is (vae == "sharded")


@pytest.mark.whole
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


def with_replicas() -> list[str]:
    with Engine.from_pretrained("emoji", Config(parallel=Parallel(data=2))) as engine:
        return [engine.receipt["overlap"] for _ in engine.map(calls())]


def test_replicas_that_cut_the_samples_of_a_decode() -> None:
    for words in run_ranks(with_replicas, 2):
        assert all(word.startswith("none: the samples of a decode are cut between replicas") for word in words)


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
