"""Caches as texts, their rules, their forecasts, and the streams that they tell apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from parafuse import Config, Plan
from parafuse.cache import METHODS, Cache, FirstBlockCache, IntervalCache, MaskCache, TaylorSeerCache, cache_of
from parafuse.engine.caches.choose import rule_of
from parafuse.engine.caches.forecast import Residual
from parafuse.engine.caches.rules import Moment, Sample, is_bound
from parafuse.engine.caches.streams import Observer
from parafuse.engine.caches.twin import Twin
from parafuse.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("first-block", FirstBlockCache()),
        ("first-block:0.2", FirstBlockCache(0.2)),
        ("first-block:0.2,warmup_steps=4,max_consecutive_skips=none", FirstBlockCache(0.2, warmup_steps=4)),
        ("first-block:threshold=0.123456789", FirstBlockCache(0.123456789)),
        ("taylorseer:5,order=2", TaylorSeerCache(5, order=2)),
        ("interval:3", IntervalCache(3)),
        ("mask:1101", MaskCache("1101")),
    ],
)
def test_a_text_makes_a_cache_and_a_cache_its_text(text: str, cache: Cache) -> None:
    assert cache_of(text) == cache
    assert cache_of(str(cache)) == cache
    assert Config(cache=text) == Config(cache=cache)
    assert Config.from_dict(Config(cache=text).to_dict()) == Config(cache=cache)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("first", "'first' is no cache; there are "),
        ("first-blok:0.1", "did you mean 'first-block'?"),
        ("first-block:x", "threshold='x': must be a number"),
        ("first-block:-1", "threshold=-1.0: must be a number of at least 0"),
        ("first-block:nan", "must be a number of at least 0"),
        ("first-block:0.1,3", "'3' has no name; first-block takes"),
        ("first-block:treshold=1", "did you mean 'threshold'?"),
        ("first-block:0.1,threshold=2", "threshold is given twice"),
        ("first-block:0.1,order=3", "must be 0, 1 or 2"),
        ("first-block:0.1,max_consecutive_skips=0", "of at least 1, or none"),
        ("first-block:0.1,first_blocks=0", "first_blocks=0: must be a whole number of at least 1"),
        ("first-block:0.1,branches=both", "must be 'separate'"),
        ("interval:1.5", "every='1.5': must be a whole number"),
        ("mask:12", "must be digits 0 and 1"),
        (3, "must be a text such as"),
    ],
)
def test_a_wrong_cache_is_refused_in_one_line(value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(cache=value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_method_is_named_once_and_says_which_models_it_is_for() -> None:
    assert all(name == kind.method and kind.models for name, kind in METHODS.items())


def test_a_plan_holds_the_cache_with_every_field_and_refuses_decisions_without_one() -> None:
    plan = Plan(
        model="emoji", model_id="x", world_size=1, device="cpu", dtype="float32", timeout_s=10.0,
        degrees=dict.fromkeys(("data", "cfg", "pipe", "ring", "ulysses", "tensor"), 1), cache=str(FirstBlockCache()),
    )  # fmt: skip
    assert Plan.from_dict(plan.to_dict()) == plan
    assert cache_of(plan.cache) == FirstBlockCache()
    old = {name: value for name, value in plan.to_dict().items() if name not in ("cache", "replay")}
    assert Plan.from_dict(old).cache == ""
    with pytest.raises(ConfigError, match=r"plan\.replay: holds decisions of a cache, but plan\.cache is empty"):
        Plan.from_dict(old | {"replay": {"transformer": ["c"]}})


def skipped(cache: Any, changes: list[float], total: int | None = None) -> str:
    """What a rule makes of changes by step, a letter each."""
    rule, sample, found = rule_of(cache), Sample(), ""
    for step, change in enumerate(changes):
        moment = Moment(step, total)
        weighed = rule.weigh(moment, change, sample)
        skips = not is_bound(cache, moment, sample) and rule.may_skip(moment, weighed)
        sample = replace(weighed, skips=weighed.skips + 1) if skips else Sample()
        found += "s" if skips else "c"
    return found


def test_rules() -> None:
    none = dict[str, Any](warmup_steps=0, final_steps=0)
    assert skipped(FirstBlockCache(0.1, **none), [0.0, 0.1, 0.09, 0.2]) == "scsc"
    assert skipped(FirstBlockCache(0.0, **none), [0.0, 0.0]) == "cc"
    assert skipped(FirstBlockCache(1.0, warmup_steps=2, final_steps=1), [0.0] * 5, total=5) == "ccssc"
    assert skipped(FirstBlockCache(1.0, warmup_steps=1, final_steps=1), [0.0] * 5) == "cssss"  # no end is known
    assert skipped(FirstBlockCache(1.0, max_consecutive_skips=2, **none), [0.0] * 7) == "sscsscs"
    assert skipped(IntervalCache(3, warmup_steps=2, final_steps=0), [0.0] * 8) == "ccsscssc"
    assert skipped(IntervalCache(1, **none), [0.0] * 3) == "ccc"
    assert skipped(MaskCache("1001", **none), [0.0] * 6) == "csscc" + "c"


def test_a_forecast_of_second_order_continues_a_parabola() -> None:
    """Divided differences of x = 3 + 2 t + t^2 at uneven steps; the series about the last one."""
    residual = Residual(order=1)
    line = torch.tensor([[1.0], [2.0]])
    for step in (0, 2, 3):
        residual.learn(line * (3 + 2 * step), step, [True, True])
    assert torch.allclose(residual.at(7), line * 17)
    curve = Residual(order=2)
    for step in (0, 1, 2):
        curve.learn(line * step**2, step, [True, True])
    # value 4, first difference 3, second difference 2: 4 + 3 * 2 + 2 * 2**2 / 2
    assert torch.allclose(curve.at(4), line * 14)
    assert torch.equal(Residual(0, [line], [5, 5], [1, 1]).at(9), line)


def test_samples_forecast_as_if_they_were_alone() -> None:
    values = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    computed = [[True, True], [True, False], [True, True], [False, True], [True, True]]
    together, alone = Residual(2), [Residual(2), Residual(2)]
    for step, who in enumerate(computed):
        together.learn(values[step], step, who)
        for row, one in enumerate(alone):
            if who[row]:
                one.learn(values[step][row : row + 1], step, [True])
    expected = torch.cat([one.at(7) for one in alone])
    assert torch.allclose(together.at(7), expected)
    together.narrow([1], 2)
    assert torch.allclose(together.at(7), expected[1:])


def test_a_twin_does_everything_on_both_sides() -> None:
    value, base, text = torch.randn(1, 3, 2), torch.randn(1, 3, 2), torch.randn(1, 2, 2)
    twin: Any = Twin(value.clone(), base)
    joined: Any = torch.cat([text, twin], 1)
    assert torch.equal(joined.value, torch.cat([text, value], 1))
    assert torch.equal(joined.base, torch.cat([text, base], 1))
    before = base.clone()
    twin[:, :1] = twin[:, :1] + 1
    twin += 2
    assert torch.allclose(twin.value, value + torch.tensor([3.0, 2.0, 2.0])[:, None])
    assert torch.allclose(twin.base, before + torch.tensor([3.0, 2.0, 2.0])[:, None])
    assert torch.equal(base, before), "what the base was taken from must stay"
    assert (twin.shape, twin.dtype, float(twin.sum())) == (value.shape, value.dtype, float(twin.value.sum()))


class Swapping(nn.Module):
    """Two streams of one shape, given back in the other order."""

    def forward(self, picture: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.tanh(picture + text)
        return text + mixed, picture - mixed


def test_streams_of_one_shape_are_told_apart() -> None:
    block = Swapping()
    args = (torch.randn(2, 5, 4), torch.randn(2, 5, 4))
    leaves, spec = tree_flatten((args, {}))
    seen = Observer().see(block, block.forward, leaves, spec, block(*args))
    assert seen.sources == {0: 1, 1: 0}
    assert seen.main == 1
