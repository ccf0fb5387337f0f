"""What is refused before anything is stored, with which status, and with which way out."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parafuse.launch.serve.admission import DAY_S, Limits, Load, Refusal, admit, day_began
from parafuse.launch.serve.messages import Estimated

LIMITS = Limits(max_queued=10, max_queued_of_key=4, rank_seconds_a_day=1000.0)
NOON = 20_000 * DAY_S + DAY_S / 2


def load(**more: object) -> Load:
    return Load(**{"now_s": NOON, **more})


def asked(load: Load, seconds: float | None = 20.0, *, left_s: float | None = None, **more: object) -> Refusal | None:
    estimated = Estimated(number=1, seconds=seconds, source="predicted")
    estimated = msgspec.structs.replace(estimated, **more)
    return admit(
        load, LIMITS, estimated=estimated, num_ranks=2, deadline_s=None if left_s is None else load.now_s + left_s
    )


def refused(*args: object, **more: object) -> Refusal:
    found = asked(*args, **more)  # pyright: ignore[reportArgumentType]
    assert found is not None
    assert "\n" not in found.message
    assert found.message.endswith(".")
    assert found.retry_after_s is None or found.retry_after_s >= 1
    return found


def test_what_can_be_done_is_taken() -> None:
    assert asked(load()) is None
    assert asked(load(queued=9, queued_of_key=3, spent_of_key=900, wait_s=70), left_s=100, peak_bytes=5) is None
    assert admit(load(), LIMITS, estimated=None, num_ranks=2) is None
    assert admit(load(), LIMITS, estimated=None, num_ranks=2, deadline_s=NOON + 1) is None, "not known refuses nothing"


@pytest.mark.parametrize(("queued", "of_key", "whose"), [(10, 0, "server"), (9, 4, "key")])
def test_a_full_queue(queued: int, of_key: int, whose: str) -> None:
    found = refused(load(queued=queued, queued_of_key=of_key, wait_s=30, next_s=2.5))
    assert (found.status, found.retry_after_s, found.estimate_s) == (429, 3, 50)
    assert f"of this {whose} is full" in found.message


def test_a_day_s_seconds() -> None:
    assert asked(load(spent_of_key=500, pledged_of_key=460)) is None
    found = refused(load(spent_of_key=500, pledged_of_key=461))
    assert (found.status, found.retry_after_s) == (429, DAY_S / 2)
    assert "500 GPU-seconds of 1000 a day, 461 more" in found.message
    assert refused(load(spent_of_key=1000), None).status == 429, "also where nothing is known of what it takes"
    assert refused(load(), 501.0).retry_after_s is None, "no day has so much"
    unlimited = Limits(max_queued=10, max_queued_of_key=4)
    assert admit(load(spent_of_key=1e9), unlimited, estimated=None, num_ranks=2) is None


def test_a_day_begins_at_midnight() -> None:
    assert day_began(NOON) == 20_000 * DAY_S == day_began(20_000 * DAY_S)


def test_a_deadline_that_cannot_be_made() -> None:
    assert asked(load(wait_s=79), left_s=100) is None
    found = refused(load(wait_s=100), left_s=100)
    assert (found.status, found.retry_after_s, found.estimate_s) == (429, 20, 120)
    assert "in 100 s cannot be made: it would be done in about 120 s" in found.message
    alone = refused(load(wait_s=100), left_s=19)
    assert (alone.retry_after_s, alone.estimate_s) == (None, 20)
    assert "20 s by itself" in alone.message
    assert refused(load(), None, left_s=-1).status == 429, "one that has passed"
    assert refused(load(wait_s=31), None, left_s=30).retry_after_s == 1


def test_memory_that_is_not_there() -> None:
    assert asked(load(), peak_bytes=80_000_000_000, capacity_bytes=80_000_000_000) is None
    found = refused(load(), peak_bytes=81_000_000_000, capacity_bytes=80_000_000_000)
    assert (found.status, found.retry_after_s) == (413, None)
    assert "81.0 GB of a device's memory (predicted), and 80.0 GB are there" in found.message
    assert asked(load(), peak_bytes=81, capacity_bytes=None) is None


@pytest.mark.parametrize(
    ("state", "seconds", "status"),
    [
        ("ready", 0, None), ("starting", 119, None), ("restarting", 119, None), ("starting", 121, 503),
        ("restarting", 121, 503), ("broken", 0, 503), ("draining", 0, 503),
    ],
)  # fmt: skip
def test_a_server_that_is_not_ready(state: str, seconds: float, status: int | None) -> None:
    found = asked(load(state=state, not_ready_s=seconds, why="rank 1 died"))
    assert (found and found.status) == status
    if found is not None:
        assert found.retry_after_s is not None


def test_the_worst_is_said_first() -> None:
    everything = load(state="broken", queued=99, queued_of_key=99, spent_of_key=1e6, wait_s=1e6)
    assert refused(everything, left_s=1, peak_bytes=2, capacity_bytes=1).status == 503
    assert refused(load(queued=99), left_s=1, peak_bytes=2, capacity_bytes=1).status == 413


NUMBERS = st.floats(0, 1e6, allow_nan=False)


@settings(deadline=None, max_examples=200)
@given(NUMBERS, st.one_of(st.none(), NUMBERS), st.one_of(st.none(), NUMBERS), st.integers(0, 12), NUMBERS)
def test_more_load_never_takes_what_less_load_refuses(
    wait: float, seconds: float | None, left: float | None, queued: int, spent: float
) -> None:
    light = asked(load(wait_s=wait, queued=queued, spent_of_key=spent), seconds, left_s=left)
    heavy = asked(load(wait_s=wait * 2, queued=queued + 1, spent_of_key=spent * 2), seconds, left_s=left)
    assert light is None or heavy is not None
