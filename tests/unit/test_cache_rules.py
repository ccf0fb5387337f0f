"""The rules of TeaCache, MagCache and DeepCache, and how caches are written as texts. Pure: no model runs."""

from __future__ import annotations

import math

import pytest

from parafuse import Config, DeepCache, MagCache, TeaCache
from parafuse.cache import CalibratedCache, StackCache, cache_of
from parafuse.calibration import Curves
from parafuse.engine.caches.choose import rule_of
from parafuse.engine.caches.mag import Magnitude, ratio_at
from parafuse.engine.caches.rules import Interval, Moment, Rule, Sample, is_bound
from parafuse.engine.caches.tea import Accumulated, rescaled
from parafuse.errors import ConfigError


def curves(*ratios: tuple[float, ...], polynomial: tuple[float, ...] = (0.0, 1.0)) -> Curves:
    return Curves("Net 01", polynomial, (0.1, 0.5), ratios or ((1.0,),))


def decided(rule: Rule, cache: StackCache, changes: list[float], place: int = 0) -> str:
    """A letter for each step, where every step but those that the cache binds is the rule's."""
    sample, letters = Sample(), ""
    for step, change in enumerate(changes):
        moment = Moment(step, len(changes), place)
        weighed = rule.weigh(moment, change, sample)
        skips = not is_bound(cache, moment, sample) and rule.may_skip(moment, weighed)
        sample = Sample(weighed.skips + 1, weighed.level, weighed.magnitude) if skips else Sample()
        letters += "s" if skips else "c"
    return letters


def test_teacache_computes_when_changes_have_added_up() -> None:
    cache = TeaCache(0.25, warmup_steps=1, final_steps=1)
    assert decided(rule_of(cache), cache, [9.0, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1]) == "cssc" + "scc"


def test_teacache_reaching_the_threshold_computes() -> None:
    cache = TeaCache(0.5, warmup_steps=0, final_steps=0)
    assert decided(rule_of(cache), cache, [0.25, 0.25, 0.25]) == "scs"
    assert decided(rule_of(TeaCache(0.0)), TeaCache(0.0, warmup_steps=0, final_steps=0), [0.0] * 3) == "ccc"


def test_the_polynomial_rescales_what_was_measured() -> None:
    found = curves(polynomial=(0.5, 0.0, 2.0))
    assert rescaled(found, 0.3) == pytest.approx(0.5 + 2 * 0.09)
    cache = TeaCache(0.7, warmup_steps=0, final_steps=0)
    assert decided(Accumulated(0.7, found), cache, [0.3, 0.3]) == "sc"  # 0.68, then 1.36
    assert decided(Accumulated(0.7), cache, [0.3, 0.3]) == "ss"


@pytest.mark.parametrize(("change", "as_if"), [(0.05, 0.1), (1.0, 0.5), (0.0, 0.1)])
def test_outside_of_what_was_measured_changes_count_in_proportion(change: float, as_if: float) -> None:
    found = curves(polynomial=(3.0, -40.0, 200.0, -200.0, 7.0))
    assert rescaled(found, change) == pytest.approx(rescaled(found, as_if) * change / as_if)


def test_a_polynomial_below_zero_counts_as_no_change() -> None:
    assert rescaled(curves(polynomial=(-1.0,)), 0.3) == 0.0


def test_magcache_adds_up_the_drift_of_the_size() -> None:
    found = curves((1.0, 0.9, 0.9, 0.9, 0.9, 0.9))
    cache = MagCache(0.3, calibration="x.json", warmup_steps=1, final_steps=0)
    # drifts: 0.1, then 0.1 + 0.19 = 0.29, then + 0.271; computed, and from 1 again
    assert decided(rule_of(cache, found), cache, [0.0] * 6) == "csscss"


def test_magcache_skips_no_more_in_a_row_than_it_may() -> None:
    cache = MagCache(9.0, calibration="x.json", warmup_steps=2, final_steps=1, max_consecutive_skips=3)
    assert decided(Magnitude(9.0, curves((1.0,) * 10)), cache, [0.0] * 10) == "ccssscsssc"


def test_magcache_takes_the_ratios_of_the_branch() -> None:
    found = curves((1.0,) * 4, (0.5,) * 4)
    cache = MagCache(0.3, calibration="x.json", warmup_steps=0, final_steps=0, max_consecutive_skips=None)
    assert decided(Magnitude(0.3, found), cache, [0.0] * 4, place=0) == "ssss"
    assert decided(Magnitude(0.3, found), cache, [0.0] * 4, place=1) == "cccc"
    assert decided(Magnitude(0.3, found), cache, [0.0] * 4, place=7) == "ssss"  # the file has no such branch


@pytest.mark.parametrize("steps", [3, 5, 9, 17, 30])
def test_for_another_number_of_steps_the_whole_run_drifts_as_much(steps: int) -> None:
    ratios = (1.0, 1.2, 1.1, 0.9, 0.8, 0.95, 0.7, 0.9, 1.05)
    product = math.prod(ratio_at(curves(ratios), Moment(step, steps)) for step in range(1, steps))
    assert product == pytest.approx(math.prod(ratios[1:]))


def test_a_step_that_spans_two_has_the_product_of_their_ratios() -> None:
    ratios = (1.0, 1.2, 1.1, 0.9, 0.8)
    assert ratio_at(curves(ratios), Moment(1, 3)) == pytest.approx(1.2 * 1.1)
    assert [ratio_at(curves(ratios), Moment(step, 5)) for step in range(5)] == list(ratios)
    assert ratio_at(curves(ratios), Moment(2, None)) == 1.1


def test_deepcache_computes_every_nth_step() -> None:
    cache = DeepCache(3, 1, warmup_steps=2, final_steps=1)
    assert rule_of(cache) == Interval(3, 2)
    assert cache.leading == 1
    assert decided(rule_of(cache), cache, [0.0] * 9) == "ccsscsscc"


@pytest.mark.parametrize(
    "text",
    [
        "teacache",
        "teacache:0.2",
        "teacache:0.2,calibration=a folder/x.json",
        "teacache:0.2,x.json,warmup_steps=5,order=1",
        "magcache:0.1,calibration=x.json,max_consecutive_skips=none",
        "deepcache:3",
        "deepcache:3,branch=2",
    ],
)
def test_a_text_makes_the_same_cache_again(text: str) -> None:
    cache = cache_of(text)
    assert cache_of(str(cache)) == cache
    assert Config(cache=text).cache == cache


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("magcache:0.1", "calibration=None: needs a file; write one with parafuse calibrate"),
        ("magcache:0.1,calibration=none", "calibration=None: needs a file"),
        ("teacache:0.1,calibration=", "calibration='': must be the name of a file without commas"),
        ("teacache:-1", "threshold=-1.0: must be a number of at least 0"),
        ("teacache:0.1,calibration=x,0.3", "'0.3' has no name"),
        ("deepcache:0", "every=0: must be a whole number of at least 1"),
        ("deepcache:3,branch=-1", "branch=-1: must be a whole number of at least 0"),
        ("deepcache:3,0,1", "'1' has no name"),
        ("teacach:0.1", "did you mean 'teacache'"),
    ],
)
def test_wrong_texts_are_refused(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        cache_of(text)


def test_a_file_name_with_a_comma_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"calibration='a,b\.json': must be the name of a file without commas"):
        TeaCache(calibration="a,b.json")
    with pytest.raises(ConfigError, match="calibration=3: must be the name of a file"):
        TeaCache(calibration=3)  # pyright: ignore[reportArgumentType]
    assert issubclass(TeaCache, CalibratedCache)
