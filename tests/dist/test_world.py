"""Ranks say what they run before they run it, and end a request together: by name, and in bounded time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch
import torch.distributed as dist

from parafuse.parallel import world as world_module
from parafuse.parallel.ranks import free_port
from parafuse.parallel.world import World
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import attempt

SOON_S = 3.0
LATER_S = 40.0


@contextmanager
def worlds(port: int, timeout_s: float = LATER_S, *, settle_s: float = SOON_S) -> Iterator[World]:
    """A world whose ranks talk through a TCPStore, as under a launcher; short deadlines."""
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0)
    with (
        patch.object(World, "store", new_callable=PropertyMock, return_value=store),
        patch.object(world_module, "SETTLE_S", settle_s),
    ):
        yield World(torch.device("cpu"), timeout_s, joined_here=False)
    dist.barrier()  # the store lives on rank 0


def timed(function: Any, *args: Any) -> tuple[Any, float]:
    begun = time.monotonic()
    return attempt(function, *args), time.monotonic() - begun


def agreeing(port: int, values: list[str], times: int) -> list[Any]:
    with worlds(port) as world:
        return [attempt(world.agree, "a plan", {"": values[world.rank]}) for _ in range(times)]


def test_ranks_that_say_the_same_agree_again_and_again() -> None:
    assert run_ranks(agreeing, 3, free_port(), ["x"] * 3, 5) == [[None] * 5] * 3


class SlowStore:
    """A store that takes its time for every question."""

    def __init__(self, store: dist.Store):
        self.slow = store

    def __getattr__(self, name: str) -> Any:
        time.sleep(0.05 if name in ("check", "get", "wait") else 0.0)
        return getattr(self.slow, name)


def agreeing_slowly(port: int, times: int) -> list[Any]:
    with worlds(port, LATER_S / 4) as world:
        store: Any = SlowStore(world.store) if world.rank == 2 else world.store
        with patch.object(World, "store", new_callable=PropertyMock, return_value=store):
            return [attempt(world.agree, "a plan", {"": str(number)}) for number in range(times)]


def test_a_rank_that_reads_late_still_finds_what_the_others_said() -> None:
    """Old keys are deleted, but not before everyone has read them."""
    assert run_ranks(agreeing_slowly, 3, free_port(), 4) == [[None] * 4] * 3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (["a", "b", "a"], "rank 1 was"),
        (["a", "a", "b"], "rank 2 was"),
        (["a", "b", "c"], "ranks 1, 2 were"),
        (["", "a", ""], "rank 1 was"),
    ],
)
def test_ranks_that_differ_are_named_on_every_rank(values: list[str], named: str) -> None:
    for texts in run_ranks(agreeing, 3, free_port(), values, 1):
        kind, _, message = texts[0].partition(": ")
        assert kind == "RankMismatchError"
        assert message.startswith(f"{named} given a plan other than rank 0's.")
        assert "same arguments" in message


def agreeing_on_names(port: int) -> Any:
    with worlds(port) as world:
        mine = {"steps": "4", "seed": str(world.rank), "prompt": '"x"'} | ({"width": "64"} if world.rank else {})
        return attempt(world.agree, "arguments", mine)


def test_what_differs_is_named() -> None:
    for text in run_ranks(agreeing_on_names, 2, free_port()):
        assert "rank 1 was given arguments other than rank 0's: seed is 0 on rank 0, 1 on rank 1. Start" in text


def silent(port: int, quiet: list[int]) -> tuple[Any, float]:
    with worlds(port) as world:
        return (None, 0.0) if world.rank in quiet else timed(world.agree, "a request", {"": "x"}, SOON_S)


@pytest.mark.parametrize(("quiet", "named"), [([2], "rank 2 did"), ([0], "rank 0 did"), ([1, 2], "ranks 1, 2 did")])
def test_silent_ranks_are_named_in_time(quiet: list[int], named: str) -> None:
    for rank, (text, seconds) in enumerate(run_ranks(silent, 3, free_port(), quiet)):
        if rank not in quiet:
            assert text.startswith(f"RankError: {named} not report a request within")
            assert seconds < LATER_S / 4


def two_engines(port: int) -> list[Any]:
    """Topics of two worlds do not meet, whichever is asked first."""
    with worlds(port) as first:
        second = World(torch.device("cpu"), LATER_S, joined_here=False)
        order = [first, second] if first.rank == 0 else [second, first]
        for world in order:  # written first, read afterwards: agree would wait for the other order
            world.store.set(f"{world.name}/met/{world.rank}", "yes")
        return [
            first.name != second.name,
            attempt(first.agree, "a plan", {"": "1"}),
            attempt(second.agree, "a plan", {"": "2"}),
        ]


def test_two_engines_have_keys_of_their_own() -> None:
    assert run_ranks(two_engines, 2, free_port()) == [[True, None, None]] * 2


def sharing(port: int) -> list[int]:
    with worlds(port) as world:
        out = []
        for number in range(4):
            out.append(world.share("seed", lambda number=number: 100 * world.rank + number))
            world.agree("a seed", {"": str(out[-1])})
        return out


def test_rank_0_shares_its_number() -> None:
    assert run_ranks(sharing, 3, free_port()) == [[0, 1, 2, 3]] * 3


class Fault(Exception):
    """Raised on purpose."""


def request(world: World, fault: BaseException | None) -> None:
    with world.request():
        if fault is not None:
            raise fault


def requests(port: int, faults: list[BaseException | None]) -> dict[str, Any]:
    """One request with a fault on some ranks, then one without where the world is whole."""
    with worlds(port) as world:
        try:
            text, seconds = timed(request, world, faults[world.rank])
        except KeyboardInterrupt:
            text, seconds = "KeyboardInterrupt", 0.0
        broken = world.broken
        again = "not tried" if broken else attempt(request, world, None)
        dist.barrier()
        return {"text": text, "seconds": seconds, "broken": broken, "again": again}


def test_a_request_without_fault_ends_well_everywhere() -> None:
    for found in run_ranks(requests, 3, free_port(), [None] * 3):
        assert (found["text"], found["broken"], found["again"]) == (None, False, None)


def test_the_same_fault_on_all_ranks_keeps_the_world_usable() -> None:
    faults: list[BaseException | None] = [Fault("too big"), Fault("too big"), Fault("too big")]
    for found in run_ranks(requests, 3, free_port(), faults):
        assert (found["text"], found["broken"], found["again"]) == ("Fault: too big", False, None)


def test_a_fault_on_one_rank_ends_the_request_on_all_by_name() -> None:
    found = run_ranks(requests, 3, free_port(), [None, Fault("out of memory"), None])
    assert [f["broken"] for f in found] == [True] * 3
    assert found[1]["text"] == "Fault: out of memory"
    for rank in (0, 2):
        assert found[rank]["text"] == "RankError: rank 1 failed: Fault: out of memory"
    assert all(f["seconds"] < LATER_S / 4 for f in found)


def test_faults_on_two_of_three_ranks_name_both() -> None:
    found = run_ranks(requests, 3, free_port(), [Fault("a"), None, Fault("b")])
    assert [f["broken"] for f in found] == [True] * 3
    assert found[1]["text"] == "RankError: rank 0 failed: Fault: a; rank 2 failed: Fault: b"
    assert found[0]["text"] == "RankError: rank 2 failed: Fault: b"


def test_an_interrupt_waits_for_nobody_and_is_told() -> None:
    found = run_ranks(requests, 3, free_port(), [None, None, KeyboardInterrupt()])
    assert found[2]["text"] == "KeyboardInterrupt"
    assert [f["broken"] for f in found] == [True] * 3
    assert found[0]["text"].startswith("RankError: rank 2 failed: KeyboardInterrupt")


def left_alone(port: int) -> tuple[Any, float, bool]:
    """Rank 1 never ends its request (it hangs); rank 0 fails, rank 2 does not."""
    with worlds(port, timeout_s=2.0) as world:
        if world.rank == 1:
            time.sleep(3.0)
            return None, 0.0, False
        text, seconds = timed(request, world, Fault("lost") if world.rank == 0 else None)
        return text, seconds, world.broken


def test_a_rank_that_hangs_holds_nobody_beyond_the_deadline() -> None:
    found = run_ranks(left_alone, 3, free_port())
    assert found[0][0] == "Fault: lost"
    assert found[0][1] < LATER_S / 4  # SETTLE_S, not the job's timeout
    assert found[2][0] == "RankError: rank 0 failed: Fault: lost"
    assert found[2][1] < 4.0
    assert found[0][2]
    assert found[2][2]


def failing_late(port: int) -> tuple[str, bool]:
    """Rank 1 fails and gives up on rank 0, which is in an exchange until it fails too, by another error."""
    with worlds(port, settle_s=0.2) as world:

        def late() -> None:
            with world.request():
                if world.rank == 0:
                    time.sleep(1.0)
                    raise RuntimeError("Connection closed by peer")
                raise ValueError("in a callback")

        found = attempt(late), world.broken
        dist.barrier()
        return found


def test_a_rank_that_fails_late_hears_that_the_others_gave_up() -> None:
    (first, first_broken), (second, second_broken) = run_ranks(failing_late, 2, free_port())
    assert first == "RankError: rank 1 failed: ValueError: in a callback"
    assert second == "ValueError: in a callback"
    assert first_broken
    assert second_broken


def test_one_rank_needs_no_store() -> None:
    world = World(torch.device("cpu"), 1.0, joined_here=False, alone=True)
    world.agree("a plan", {"": "x"})
    assert world.share("seed", lambda: 7) == 7
    with pytest.raises(Fault), world.request():
        raise Fault
    assert not world.broken
