"""Losses are answered at once while they are rare, and never for ever; a device that fails again and again rests."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from parafuse.errors import ConfigError
from parafuse.launch.serve.restarts import Budget, Devices


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rare_losses_are_answered_at_once_for_ever() -> None:
    clock = Clock()
    budget = Budget(limit=5, window_s=300.0, clock=clock)
    for _ in range(1000):  # the rate counts, not the number
        clock.now += 70.0
        assert budget.lost(ready_s=60.0) == 0.0
        assert not budget.alarm


def test_a_crash_loop_slows_down_with_an_alarm_and_ends_with_it() -> None:
    clock = Clock()
    budget = Budget(limit=3, window_s=300.0, first_wait_s=5.0, longest_wait_s=60.0, clock=clock)
    waits: list[float] = []
    for _ in range(12):
        clock.now += 1.0
        waits.append(budget.lost())
        clock.now += waits[-1]
    assert waits == [0, 0, 0, 5, 10, 20, 40, 60, 60, 60, 60, 60]
    assert budget.alarm
    budget.lasted(299.0)
    assert budget.alarm
    budget.lasted(300.0)
    assert not budget.alarm


def test_a_group_that_lasted_starts_the_count_anew() -> None:
    clock = Clock()
    budget = Budget(limit=2, window_s=300.0, clock=clock)
    for _ in range(4):
        budget.lost()
    assert budget.alarm
    clock.now += 1000.0
    assert budget.lost(ready_s=400.0) == 0.0
    assert not budget.alarm


def test_waits_alone_do_not_end_the_alarm() -> None:
    """Else a group that fails at once would have its `limit` of quick starts after every long wait."""
    clock = Clock()
    budget = Budget(limit=2, window_s=100.0, first_wait_s=5.0, longest_wait_s=240.0, clock=clock)
    for _ in range(12):
        clock.now += budget.lost()
    assert budget.lost() == 240.0


@given(st.lists(st.floats(min_value=0.0, max_value=600.0), min_size=1, max_size=60))
def test_starts_are_never_more_than_the_budget_allows(lived_s: list[float]) -> None:
    """In any window there are at most limit + 1 starts, and then those that the waits leave room for."""
    clock = Clock()
    budget = Budget(limit=3, window_s=100.0, first_wait_s=10.0, longest_wait_s=50.0, clock=clock)
    starts: list[float] = []
    for seconds in lived_s:
        starts.append(clock.now)
        clock.now += seconds
        wait_s = budget.lost(ready_s=seconds)
        assert 0.0 <= wait_s <= 50.0
        clock.now += wait_s
    for at in starts:
        assert sum(at <= other < at + 100.0 for other in starts) <= 2 * (3 + 1) + 10


def test_wrong_budgets_are_refused() -> None:
    for options in ({"limit": 0}, {"window_s": 0.0}, {"first_wait_s": 0.0}, {"longest_wait_s": 1.0}):
        with pytest.raises(ConfigError, match="budget"):
            Budget(**options)  # pyright: ignore[reportArgumentType]


def test_a_device_that_fails_again_and_again_is_put_aside_and_comes_back() -> None:
    clock = Clock()
    devices = Devices(["0", "1", "2", "3"], 2, limit=3, window_s=900.0, aside_s=3600.0, clock=clock)
    assert devices.choose() == ["0", "1"]
    assert devices.charge(1) == []
    assert devices.charge(1) == []
    (aside,) = devices.charge(1)
    assert (aside.device, aside.failures) == ("1", 3)
    assert "device 1 is put aside for 60 min" in aside.summary
    assert devices.put_aside == ("1",)
    assert devices.choose() == ["0", "2"]
    clock.now += 3599.0
    assert devices.choose() == ["0", "2"]
    clock.now += 1.0
    assert devices.choose() == ["0", "1"]
    assert devices.put_aside == ()
    assert devices.charge(1) == [], "it has its failures behind it"


def test_rare_failures_put_nothing_aside() -> None:
    clock = Clock()
    devices = Devices(["0", "1"], 1, limit=3, window_s=900.0, clock=clock)
    for _ in range(20):
        devices.choose()
        assert devices.charge(0) == []
        clock.now += 500.0


def test_devices_that_are_all_needed_stay() -> None:
    devices = Devices(["0", "1"], 2, limit=2)
    devices.choose()
    assert devices.charge(0) == devices.charge(0) == devices.charge(0) == []
    spare = Devices(["0", "1", "2"], 2, limit=1)
    spare.choose()
    assert [one.device for one in spare.charge(0)] == ["0"]
    assert spare.choose() == ["1", "2"]
    assert spare.charge(0) == [], "no third one is left"
    assert spare.choose() == ["1", "2"]


def test_a_rank_with_several_devices_is_charged_for_all_of_them() -> None:
    devices = Devices(list("abcdef"), 4, per_rank=2, limit=1)
    assert devices.choose() == list("abcd")
    assert [one.device for one in devices.charge(1)] == ["c", "d"]
    assert devices.choose() == list("abef")


def test_a_cpu_has_nothing_to_put_aside() -> None:
    devices = Devices((), 2)
    assert devices.choose() == []
    for _ in range(10):
        assert devices.charge(0) == []
    assert devices.put_aside == ()


def test_wrong_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="need 3 devices; this machine has 2"):
        Devices(["0", "1"], 3)
    with pytest.raises(ConfigError, match="twice"):
        Devices(["0", "0"], 1)
