"""What a replica makes of a store that does not answer, or whose answers are lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from parafuse.errors import ParafuseError
from parafuse.launch.ray_serve import remote_store
from parafuse.launch.ray_serve.remote_store import store_behind
from parafuse.launch.serve.jobs import JobStore, QueueFullError, StaleError, State, StoreBusyError
from parafuse.launch.serve.sqlite_store import SqliteStore
from tests.serve.stores import a_job, open_store, paint


class Handle:
    """A store without a cluster. `loses` says of the n-th call of a method what becomes of it: None: it is answered;
    "before": it never arrives; "after": it is done, and its answer is lost."""

    def __init__(self, store: SqliteStore, loses: Callable[[str, int], str | None]):
        self.store, self.loses, self.asked, self.ask = store, loses, [], self
        self.lost: Exception = ActorUnavailableError("gone", None)

    def remote(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.asked.append(method)
        how = self.loses(method, self.asked.count(method))
        value, error = None, None
        if how != "before":
            try:
                value = getattr(self.store, method)(*args, **kwargs)
            except ParafuseError as raised:
                error = raised

        return Response(None if how is None else self.lost, value, error)


@dataclass
class Response:
    """What a call of a handle returns."""

    lost: Exception | None
    value: Any
    error: ParafuseError | None

    def result(self, timeout_s: float) -> Any:
        if self.lost is not None:
            raise self.lost
        return self.value, self.error


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "AGAIN_S", 0.01)


def over(folder: Path, loses: Callable[[str, int], str | None], **settings: Any) -> tuple[JobStore, Handle]:
    handle = Handle(open_store(folder), loses)
    return store_behind(handle, **settings), handle


def first(how: str) -> Callable[[str, int], str | None]:
    """Of each method the first call is lost, but of claims."""
    return lambda method, number: how if number == 1 and method != "claim" else None


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_job_goes_its_way_though_every_answer_is_lost_once(tmp_path: Path, how: str) -> None:
    store, handle = over(tmp_path, first(how))
    job = store.accept(a_job())
    assert [one.id for one in store.queued()] == [job.id]
    epoch = store.begin_epoch(alone=False)
    store.claim([job.id], epoch)
    paint(handle.store, "f", "0.png")
    store.note_progress(job.id, epoch, 0.5)
    done = store.commit(job.id, epoch, folder="f", files=["0.png"], receipt="", rank_seconds=2.0, keep_s=9.0)
    assert (done.state, done.rank_seconds) == (State.DONE, 2.0)
    assert store.spent("anna", 0.0) == 2.0
    assert handle.asked.count("commit") == 2


def test_an_accepted_job_is_found_and_not_made_twice(tmp_path: Path) -> None:
    store, handle = over(tmp_path, first("after"))
    job = a_job()
    assert store.accept(job).id == job.id
    assert handle.asked == ["accept", "get", "get"]
    assert handle.store.num_queued() == 1


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_claim_whose_answer_is_lost_ends_the_charge(tmp_path: Path, how: str) -> None:
    """It may run, and nobody would know."""
    store, handle = over(tmp_path, lambda method, _: how if method == "claim" else None)
    job, epoch = store.accept(a_job()), store.begin_epoch(alone=False)
    with pytest.raises(StaleError, match="its answer was lost"):
        store.claim([job.id], epoch)
    assert handle.asked.count("claim") == 1
    store.end_epoch(epoch)
    assert [one.id for one in store.queued()] == [job.id]


UNAVAILABLE = DeploymentUnavailableError.__new__(DeploymentUnavailableError)


@pytest.mark.parametrize("lost", [ActorUnavailableError("gone", None), UNAVAILABLE, TimeoutError()])
def test_who_is_never_answered_is_told(tmp_path: Path, lost: Exception) -> None:
    store, handle = over(tmp_path, lambda *_: "before", patience_s=0.05)
    handle.lost = lost
    with pytest.raises(StoreBusyError, match=r"nobody has answered for 0\.05 s"):
        store.num_queued()
    assert len(handle.asked) > 1


def test_what_the_store_raises_comes_through(tmp_path: Path) -> None:
    store, handle = over(tmp_path, lambda *_: None)
    with pytest.raises(QueueFullError) as full:
        store.accept(a_job(), max_queued=0)
    assert not full.value.of_key
    with pytest.raises(AttributeError):
        _ = store.folders  # type: ignore[attr-defined]
    handle.lost = RayTaskError("ask", "trace", ValueError("a fault"))
    handle.loses = lambda *_: "before"
    with pytest.raises(RayTaskError):
        store.num_queued()
    assert handle.asked == ["accept", "num_queued"]
