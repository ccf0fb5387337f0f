"""A rank that lives and gets nowhere is found within its limit; one that works is left alone, however long it takes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from parafuse.errors import ConfigError
from parafuse.launch.serve.messages import Beat
from parafuse.launch.serve.watchdog import Limit, Watchdog

LIMITS = {
    "denoising": Limit(floor_s=10.0, unseen_s=100.0),
    "decoding": Limit(floor_s=20.0, unseen_s=200.0),
    "loading": Limit(floor_s=600.0, unseen_s=1800.0),
}


class Ranks:
    """Ranks that beat twice a second of a clock that the test moves."""

    def __init__(self, number: int = 2, **options: float):
        self.now = 1000.0
        self.dog = Watchdog(LIMITS, clock=lambda: self.now, **options)
        self.dog.begin()
        self.moves = dict.fromkeys(range(number), 0)
        for rank in self.moves:
            self.dog.hello(rank)

    def run(self, seconds: float, phase: str, *, moves_each_s: float = 0.5, stuck: int = -1, silent: int = -1):
        """The first stall, if one is seen meanwhile."""
        end, next_move = self.now + seconds, self.now
        while self.now < end:
            self.now += 0.5
            is_move = self.now >= next_move
            next_move += moves_each_s if is_move else 0.0
            for rank in self.moves:
                self.moves[rank] += is_move and rank not in (stuck, silent)
                if rank != silent:
                    self.dog.beat(Beat(rank=rank, phase=phase, moves=self.moves[rank]))
            found = self.dog.stalled()
            if found is not None:
                return found
        return None


def test_who_moves_is_left_alone() -> None:
    ranks = Ranks()
    for phase in ("loading", "idle", "encoding", "denoising", "decoding", "writing"):
        assert ranks.run(400.0, phase, moves_each_s=5.0) is None


def test_a_rank_that_beats_and_does_not_move_is_stalled() -> None:
    ranks = Ranks(3)
    assert ranks.run(30.0, "denoising", moves_each_s=1.0) is None
    found = ranks.run(60.0, "denoising", stuck=1)
    assert found is not None
    assert (found.rank, found.phase, found.beats, found.limit_s) == (1, "denoising", True, 10.0)
    assert 10.0 < found.seconds <= 11.5
    assert found.summary.startswith("rank 1 has made no progress for 10.")
    assert "denoising" in found.summary


def test_all_ranks_of_a_stuck_exchange_are_found_and_the_first_to_stop_is_named() -> None:
    ranks = Ranks(2)
    ranks.run(10.0, "denoising")
    ranks.run(2.0, "denoising", stuck=0)  # rank 1 gets on to the exchange, then waits there
    found = ranks.run(60.0, "denoising", moves_each_s=1000.0)
    assert found is not None
    assert found.rank == 0


def test_a_stopped_rank_is_found_sooner_and_named_before_those_that_wait_for_it() -> None:
    ranks = Ranks(2, silent_s=4.0)
    ranks.run(10.0, "denoising")
    found = ranks.run(60.0, "denoising", moves_each_s=1000.0, silent=1)
    assert found is not None
    assert (found.rank, found.beats, found.limit_s) == (1, False, 4.0)
    assert found.seconds < 6
    assert "no sign of life" in found.summary


def test_a_silent_rank_is_named_before_one_that_has_waited_longer_for_it() -> None:
    ranks = Ranks(2, silent_s=8.0)
    ranks.run(10.0, "denoising")
    ranks.run(2.0, "denoising", stuck=0)
    found = ranks.run(60.0, "denoising", stuck=0, silent=1)
    assert found is not None
    assert (found.rank, found.beats) == (1, False)
    assert ranks.now - 1010.0 > LIMITS["denoising"].floor_s, "both are beyond their limits"


def test_loading_may_hold_the_interpreter_for_a_while() -> None:
    ranks = Ranks(2, silent_s=4.0, heavy_silent_s=60.0)
    ranks.run(5.0, "loading")
    assert ranks.run(50.0, "loading", silent=0) is None
    found = ranks.run(30.0, "loading", silent=0)
    assert found is not None
    assert found.rank == 0


def test_limits_follow_what_is_known() -> None:
    ranks = Ranks(1)
    dog = ranks.dog
    dog.call("large")
    assert dog.limit_s("denoising") == 100.0  # nothing is known: generous
    dog.call("large", {"denoising": 1.0})
    assert dog.limit_s("denoising") == 10.0  # the floor
    dog.call("large", {"denoising": 7.0})
    assert dog.limit_s("denoising") == 28.0
    assert dog.limit_s("decoding") == 200.0
    assert dog.limit_s("idle") == 15.0
    dog.call("large")
    ranks.run(40.0, "denoising", moves_each_s=8.0)
    assert dog.limit_s("denoising") == pytest.approx(32.0, abs=2.0)
    dog.call("small")
    assert dog.limit_s("denoising") == 100.0  # of other sizes nothing is known
    ranks.run(20.0, "denoising", moves_each_s=0.5)
    assert dog.limit_s("denoising") == 10.0
    dog.call("large")
    assert dog.limit_s("denoising") == pytest.approx(32.0, abs=2.0)


def test_what_is_remembered_is_bounded() -> None:
    ranks = Ranks(1)
    for number in range(3 * Watchdog.KINDS):
        ranks.dog.call(f"kind {number}")
    assert len(ranks.dog._seen) <= Watchdog.KINDS + 1
    ranks.dog.call("one")
    ranks.run(200.0, "denoising")
    assert len(ranks.dog._seen["one"].lately_s["denoising"]) == Watchdog.KEPT


def test_slow_waits_are_forgotten() -> None:
    ranks = Ranks(1)
    ranks.dog.call("one")
    ranks.run(30.0, "denoising", moves_each_s=9.0)
    assert ranks.dog.limit_s("denoising") > 30
    ranks.run(Watchdog.KEPT * 1.0, "denoising", moves_each_s=0.5)
    assert ranks.dog.limit_s("denoising") == 10.0


def test_time_in_which_the_supervisor_was_stopped_counts_for_nobody() -> None:
    ranks = Ranks(2)
    ranks.run(10.0, "denoising")
    ranks.now += 500.0
    assert ranks.dog.stalled() is None
    assert ranks.run(5.0, "denoising") is None
    ranks.now += 500.0
    ranks.dog.beat(Beat(rank=0, phase="denoising", moves=ranks.moves[0]))  # beats may be read before it looks
    assert ranks.dog.stalled() is None
    assert ranks.dog.limit_s("denoising") == 10.0, "nor is it learned"
    found = ranks.run(60.0, "denoising", silent=1)
    assert found is not None
    assert found.rank == 1


def test_a_rank_that_never_beats_is_found() -> None:
    ranks = Ranks(1)
    while ranks.dog.stalled() is None:
        ranks.now += 0.5
        assert ranks.now < 1000 + 130
    assert ranks.now > 1000 + 119


def test_a_new_group_starts_afresh_and_keeps_what_was_seen() -> None:
    ranks = Ranks(2)
    ranks.dog.call("one")
    ranks.run(20.0, "denoising", moves_each_s=5.0)
    ranks.now += 1.0
    ranks.dog.begin()
    assert ranks.dog.stalled() is None
    ranks.dog.call("one")
    assert ranks.dog.limit_s("denoising") == pytest.approx(20.0, abs=2.0)


@pytest.mark.parametrize("options", [{"factor": 0.5}, {"silent_s": 0.0}, {"silent_s": 5.0, "heavy_silent_s": 1.0}])
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="watchdog"):
        Watchdog(**options)  # pyright: ignore[reportArgumentType]


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="decoding"):
        Watchdog({"decoding": Limit(floor_s=2.0, unseen_s=1.0)})


@settings(max_examples=30)
@given(st.lists(st.floats(min_value=0.5, max_value=40.0), min_size=5, max_size=30), st.floats(0.5, 30.0))
def test_every_stall_is_found_and_no_steady_work_is(steps_s: list[float], predicted_s: float) -> None:
    """Steps of any lengths up to twice the slowest before them pass; one that never ends is found within its limit."""
    ranks = Ranks(1)
    ranks.dog.call("one", {"denoising": predicted_s})
    slowest = predicted_s
    for drawn_s in steps_s:
        step_s = min(drawn_s, 2 * slowest)
        slowest = max(slowest, step_s)
        assert ranks.run(step_s, "denoising", moves_each_s=10_000.0) is None
    limit_s = ranks.dog.limit_s("denoising")
    found = ranks.run(10 * limit_s, "denoising", stuck=0)
    assert found is not None
    assert found.seconds <= limit_s + 1.0
