"""Which job goes next: properties over random queues, keys, priorities and lengths, and what goes together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parafuse.launch.serve.jobs import Job, JobRequest, State
from parafuse.launch.serve.messages import Adapter
from parafuse.launch.serve.schedule import Choice, Policy, SecondsOf, Shares, choose, together, wait_s

POLICY = Policy(batch=4)
NUMBERS = itertools.count()


def job(owner: str = "a", *, created_s: float = 0.0, steps: int = 4, name: str = "", **more: object) -> Job:
    request = JobRequest(kind="image", prompt="an apple", seed=1, settings={"num_inference_steps": steps})
    request = msgspec.structs.replace(request, **{k: more.pop(k) for k in list(more) if k in request.__struct_fields__})
    return Job(id=name or f"job-{next(NUMBERS):05}", owner=owner, request=request, created_s=created_s, **more)  # pyright: ignore[reportArgumentType]


def seconds(request: JobRequest, size: int) -> float:
    """One pass in which a second job costs half of what the first does."""
    return request.settings["num_inference_steps"] * (1 + 0.5 * (size - 1))


class Machine:
    """Serves one call after another; a clock that only calls move."""

    def __init__(self, policy: Policy = POLICY, seconds_of: SecondsOf | None = None):
        self.policy, self.seconds_of = policy, seconds_of
        self.now, self.shares, self.queue = 0.0, Shares(), list[Job]()
        self.got: dict[str, float] = {}
        self.late: list[Job] = []

    def step(self) -> Choice:
        choice = choose(self.queue, self.shares, self.now, policy=self.policy, seconds_of=self.seconds_of)
        self.late = [one for one in self.queue if one.deadline_s is not None and one.deadline_s <= self.now]
        gone = {one.id for one in (*choice.jobs, *self.late)}  # the store ends those that are late
        self.queue = [one for one in self.queue if one.id not in gone]
        self.shares = choice.shares
        if choice.jobs:
            took = seconds(choice.jobs[0].request, len(choice.jobs))
            self.now += took
            self.shares = self.shares.charged(choice.jobs, took, self.now)
            for one in choice.jobs:
                self.got[one.owner] = self.got.get(one.owner, 0.0) + took / len(choice.jobs)
        return choice


JOBS = st.builds(
    lambda owner, steps, priority, created, left: job(
        owner, steps=steps, priority=priority, created_s=float(created), deadline_s=left and created + left
    ),
    st.sampled_from("abcd"), st.integers(1, 90), st.integers(-10, 10), st.integers(0, 50),
    st.one_of(st.none(), st.integers(1, 400)),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.lists(JOBS, max_size=25))
def test_something_goes_whenever_something_waits_and_every_job_goes_once(queued: list[Job]) -> None:
    machine = Machine(seconds_of=seconds)
    machine.queue, machine.now = list(queued), 50.0
    seen: list[str] = []
    while machine.queue:
        now = machine.now
        choice = machine.step()
        assert choice.jobs or machine.late
        assert not any(one.deadline_s is not None and one.deadline_s <= now for one in choice.jobs)
        assert len({together(one.request) for one in choice.jobs}) <= 1
        seen += [one.id for one in (*choice.jobs, *machine.late)]
    assert sorted(seen) == sorted(one.id for one in queued)


@settings(deadline=None, max_examples=100)
@given(st.lists(JOBS, min_size=1, max_size=20), st.randoms())
def test_the_same_is_chosen_in_whatever_order_the_queue_comes(queued: list[Job], chance: object) -> None:
    other = list(queued)
    chance.shuffle(other)  # pyright: ignore[reportAttributeAccessIssue]
    shares = Shares(had={"a": 3.0, "c": 1.0}, waiting=frozenset("abc"), taken_s={0: 7.0})
    one, two = (choose(q, shares, 60.0, policy=POLICY, seconds_of=seconds) for q in (queued, other))
    assert one.jobs == two.jobs
    assert one.shares == two.shares


def least_waits(age_s: float, low: int, rivals: list[int], steps: int) -> float:
    """Seconds until one job of low priority goes, while rivals of other priorities always wait anew."""
    machine = Machine(Policy(age_s=age_s))
    poor = job("poor", priority=low, steps=1)
    machine.queue = [poor]
    while poor in machine.queue:
        waiting = {one.priority for one in machine.queue}
        machine.queue += [
            job(f"key {p}", priority=p, steps=steps, created_s=machine.now) for p in rivals if p not in waiting
        ]
        before = machine.now
        machine.step()
        assert machine.now < 50_000, "it starves"
        if poor not in machine.queue:
            return before
    raise AssertionError


@settings(deadline=None, max_examples=80)
@given(st.floats(5, 90), st.integers(-10, 9), st.sets(st.integers(-10, 10), min_size=1, max_size=5), st.integers(1, 60))
def test_a_priority_waits_no_longer_than_is_stated(age_s: float, low: int, rivals: set[int], steps: int) -> None:
    rivals -= {low}
    span = max([abs(low - one) for one in rivals], default=0)
    # the call that runs when the time is up, and then one of each other priority
    assert least_waits(age_s, low, sorted(rivals), steps) <= (span + 1) * age_s + (len(rivals) + 1) * steps


def test_without_ageing_the_lowest_priority_starves() -> None:
    with pytest.raises(AssertionError, match="starves"):
        least_waits(1e9, -10, [10], 10)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(1, 90), min_size=40, max_size=40),
    st.lists(st.integers(1, 90), min_size=40, max_size=40),
    st.integers(1, 8),
)
def test_two_keys_that_wait_get_seconds_that_differ_by_at_most_a_call_of_each(
    ones: list[int], twos: list[int], ahead: int
) -> None:
    machine = Machine()
    machine.queue = [job("a", steps=n) for n in ones]
    for _ in range(ahead):  # what one has had before the other came counts for nothing
        machine.step()
    machine.queue += [job("b", steps=n, created_s=machine.now) for n in twos]
    machine.got = {"a": 0.0, "b": 0.0}
    while {"a", "b"} <= {one.owner for one in machine.queue}:
        machine.step()
        assert abs(machine.got["a"] - machine.got["b"]) <= max(ones) + max(twos)


def test_a_key_with_many_jobs_does_not_keep_out_one_with_one() -> None:
    machine = Machine()
    machine.queue = [job("many", steps=20) for _ in range(200)]
    for _ in range(50):
        machine.step()
    machine.queue.append(job("one", steps=20, created_s=machine.now))
    assert "one" in {machine.step().jobs[0].owner for _ in range(2)}


def test_a_key_that_was_away_makes_up_for_nothing() -> None:
    machine = Machine()
    machine.queue = [job("a", steps=10) for _ in range(60)] + [job("b", steps=10)]
    for _ in range(30):
        machine.step()
    machine.queue += [job("b", steps=10, created_s=machine.now) for _ in range(20)]
    turns = [machine.step().jobs[0].owner for _ in range(10)]
    assert turns.count("a") in (4, 5, 6)


def test_a_key_that_asks_for_one_at_a_time_is_charged_for_what_it_had() -> None:
    machine = Machine()
    machine.queue = [job("a", steps=10) for _ in range(60)]
    for turn in range(30):
        machine.step()
        if turn % 2 and not any(one.owner == "b" for one in machine.queue):
            machine.queue.append(job("b", steps=80, created_s=machine.now))
    assert machine.got["b"] <= machine.got["a"] + 80 + 10


def test_a_weight_gives_a_key_more() -> None:
    machine, shares = Machine(), Shares()
    machine.queue = [job(owner, steps=10) for owner in "ab" for _ in range(40)]
    turns = []
    for _ in range(30):
        choice = choose(machine.queue, shares, 0.0, policy=POLICY)
        machine.queue.remove(choice.jobs[0])
        shares = choice.shares.charged(choice.jobs, 10.0, 0.0, {"a": 2.0})
        turns.append(choice.jobs[0].owner)
    assert 19 <= turns.count("a") <= 21


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from([0, 5]), st.integers(1, 300)), min_size=30, max_size=60
    )
)
def test_keys_that_owe_much_still_take_turns(asked: list[tuple[str, int, int]]) -> None:
    machine = Machine(dataclasses.replace(POLICY, most_debt=50.0))
    machine.queue = [job(owner, priority=priority, steps=steps) for owner, priority, steps in asked]
    machine.queue += [job("low", steps=1) for _ in range(10)]
    poor = [job(owner, steps=1) for owner in "xyz"]
    machine.queue += poor
    turns = list(served(machine))
    assert max(turns.index(one.id) for one in poor) < len(turns) - 1
    assert len(turns) == len(asked) + 13


def test_keys_that_owe_the_most_take_turns() -> None:
    shares, turns, queued = Shares(), "", [job(owner) for owner in "abc" for _ in range(9)] + [job("low", priority=-10)]
    for turn in range(6):
        shares = dataclasses.replace(shares, had={"a": 50.0, "b": 50.0, "c": 50.0, "low": 0.0})  # all at `most_debt`
        choice = choose(queued, shares, 1.0 + turn, policy=POLICY)
        shares, turns = choice.shares, turns + choice.jobs[0].owner
    assert turns == "abcabc"


def served(machine: Machine) -> Iterator[str]:
    while machine.queue:
        yield from (one.id for one in machine.step().jobs)


def test_of_one_key_what_is_due_first_goes_first() -> None:
    later, sooner, none = (
        job("a", name="later", created_s=3, deadline_s=500),
        job("a", name="sooner", created_s=4, deadline_s=90),
        job("a", name="none", created_s=1),
    )
    machine = Machine()
    machine.queue = [none, later, sooner]
    assert list(served(machine)) == ["sooner", "later", "none"]


def test_a_job_without_deadline_is_not_kept_waiting_by_those_with_one() -> None:
    machine = Machine(Policy(patience_s=100))
    machine.queue = [job("a", name="none", steps=10)]
    turns: list[str] = []
    while "none" not in turns:
        machine.queue.append(job("a", steps=10, created_s=machine.now, deadline_s=machine.now + 40))
        turns += [one.id for one in machine.step().jobs]
        assert len(turns) < 30, "it starves"


def test_cancelled_and_running_ones_are_left_alone() -> None:
    queued = [job(cancel_asked=True), job(state=State.RUNNING)]
    assert choose(queued, Shares(), 1.0, policy=POLICY) == Choice(jobs=(), shares=Shares())


# what goes together


def batch(queued: list[Job], seconds_of: SecondsOf = seconds, most: int = 4) -> list[str]:
    return [one.id for one in choose(queued, Shares(), 10.0, policy=Policy(batch=most), seconds_of=seconds_of).jobs]


def test_as_many_go_together_as_gain_most() -> None:
    queued = [job(name=f"j{i}") for i in range(6)]
    assert batch(queued) == ["j0", "j1", "j2", "j3"]
    assert batch(queued, most=2) == ["j0", "j1"]
    assert batch(queued, most=1) == ["j0"]
    assert batch(queued, lambda _, size: {1: 1.0, 2: 1.2, 3: 3.2, 4: 4.0}[size]) == ["j0", "j1"]
    assert batch(queued, lambda _, size: size * 0.99) == ["j0"], "a gain of nothing is none"
    assert batch(queued, lambda _, size: None) == ["j0"], "not known"
    assert batch(queued, lambda _, size: 1.0 if size == 1 else None) == ["j0"]


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 5},
        {"num_outputs": 2},
        {"negative_prompt": "blur"},
        {"lora": (Adapter(name="ink"),)},
        {"cache": False},
        {"previews": 2},
        {"format": "jpeg"},
        {"kind": "video"},
        {"images": {"image": ("x.png",)}},
    ],
)
def test_what_differs_in_settings_does_not_go_together(other: dict[str, object]) -> None:
    assert batch([job(name="j0"), job(name="j1", created_s=1, **other)]) == ["j0"]  # pyright: ignore[reportArgumentType]


def test_pictures_that_were_sent_never_go_together() -> None:
    edits = [job(images={"image": ("x.png",)}) for _ in range(3)]
    assert len(batch(edits)) == 1


def test_prompts_seeds_keys_and_priorities_may_differ() -> None:
    queued = [job("a", prompt="one", seed=3), job("b", prompt="two", seed=4, priority=-3)]
    assert len(batch(queued)) == 2


def test_company_is_taken_from_keys_in_turn() -> None:
    queued = [job("a", name=f"a{i}") for i in range(5)] + [job("b", name=f"b{i}", created_s=5) for i in range(5)]
    assert sorted(batch(queued)) == ["a0", "a1", "b0", "b1"]


def test_company_does_not_make_the_first_late() -> None:
    queued = [job(name="j0", deadline_s=15.0), job(name="j1"), job(name="j2")]
    assert batch(queued) == ["j0"], "alone it takes 4 s of 5, with another 6"


def test_company_that_rides_does_not_hold_up_others_of_its_priority() -> None:
    machine = Machine(Policy(batch=4, age_s=20), seconds_of=seconds)
    poor = job("poor", priority=-10, steps=7)
    machine.queue = [poor]
    for _ in range(400):
        machine.queue += [
            job("rich", priority=10, created_s=machine.now),
            job("rider", priority=-10, created_s=machine.now),
        ]
        if poor in machine.step().jobs:
            return
    raise AssertionError("it starves")


def test_what_must_go_alone_goes_alone_and_of_a_key_no_more_than_may_run() -> None:
    queued = [job("a", name=f"a{i}") for i in range(4)] + [job("b", name="b0", created_s=5)]

    def names(**more: Any) -> list[str]:
        found = choose(queued, Shares(), 10.0, policy=POLICY, seconds_of=seconds, **more)
        return sorted(one.id for one in found.jobs)

    assert names() == ["a0", "a1", "a2", "b0"]
    assert names(alone={"a0"}) == ["a0"]
    assert names(alone={"a1"}) == ["a0", "a2", "a3", "b0"]
    assert names(most_of_key={"a": 2}) == ["a0", "a1", "b0"]
    assert names(most_of_key={"a": 0}) == ["b0"]


# how long a job waits


def test_a_wait_counts_own_jobs_and_as_much_of_each_other_key() -> None:
    mine = job("a", created_s=9)
    queued = [job("a", steps=10), job("a", steps=20), *(job("b", steps=50) for _ in range(9)), job("c", steps=5), mine]
    assert wait_s(mine, queued, seconds, running_left_s=3) == 3 + 30 + 30 + 5
    assert wait_s(job("new", created_s=9), queued, seconds) == 0, "a key that comes anew does not wait behind others"
    assert (
        wait_s(mine, [*queued, job("b", steps=7, priority=1), job("b", steps=9, priority=-1)], seconds)
        == 30 + 30 + 5 + 7
    )
    assert wait_s(mine, queued, lambda request, size: None, running_left_s=1) == 1
