"""An engine with a cache paints without it when told to: bitwise what one without a cache paints, in every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import parafuse
from tests.dist.ranks import run_ranks

CALL: dict[str, Any] = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 6, "width": 32, "height": 32}


def pictures(cache: str | None, degrees: dict[str, int], on: list[bool]) -> list[np.ndarray]:
    """A picture for each way that the cache is switched. Without degrees, on one rank."""
    config = parafuse.Config(cache=cache, parallel=parafuse.Parallel(**degrees))
    engine = parafuse.Engine.from_pretrained("emoji", config, alone=not degrees)
    found = list[np.ndarray]()
    for each in on:
        engine.use_cache(each)
        found.append(np.asarray(engine(**CALL).images[0]))
        assert ("off" in engine.receipt["cache"]) is (not each and cache is not None)
    engine.close()
    return found


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("cache", ["first-block:0.9,warmup_steps=1", "fora", "taylorseer", "pab", "fastercache"])
def test_bitwise_on_one_rank(cache: str) -> None:
    [plain] = pictures(None, {}, [True])
    cached, off, again = pictures(cache, {}, [True, False, True])
    assert not np.array_equal(cached, plain)  # the cache does something here
    assert np.array_equal(off, plain)
    assert np.array_equal(again, cached)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize(
    ("cache", "degrees"), [("first-block:0.9,warmup_steps=1,branches=joint", {"cfg": 2}), ("fora", {"ulysses": 2})]
)
def test_bitwise_on_two_ranks(cache: str, degrees: dict[str, int]) -> None:
    plain = run_ranks(pictures, 2, None, degrees, [True])
    for rank, (cached, off) in enumerate(run_ranks(pictures, 2, cache, degrees, [True, False])):
        assert not np.array_equal(cached, plain[rank][0])
        assert np.array_equal(off, plain[rank][0])
