"""A key's GPU-seconds of a day: who asks for more is refused, and what was let in waits."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from parafuse.launch.serve.admission import Refusal
from parafuse.launch.serve.choosing import most_of_key
from parafuse.launch.serve.http.admitting import Admission
from parafuse.launch.serve.jobs import Job
from parafuse.launch.serve.keys import Key, Keys, make_key
from parafuse.launch.serve.messages import Estimated, Status
from parafuse.launch.serve.settings import Serving
from tests.serve.stores import a_job, open_store


def _key(**limits: float) -> Key:
    return msgspec.structs.replace(msgspec.json.decode(make_key()[1], type=Key), id="anna", **limits)


def test_what_runs_and_what_waits_is_pledged(tmp_path: Path) -> None:
    store, key = open_store(tmp_path, clock=time.time), _key(rank_seconds_per_day=20.0)
    admission = Admission(Serving(), store, lambda: 0.0)

    def ask(job: Job) -> Refusal | None:
        return admission(job, key, Status(state="ready"), Estimated(number=1, seconds=8.0))

    first, second, third = (a_job(created_s=time.time()) for _ in range(3))
    assert ask(first) is None
    epoch = store.begin_epoch()
    store.claim([store.accept(first).id], epoch)
    assert ask(second) is None
    store.accept(second)
    refusal = ask(third)
    assert refusal is not None
    assert refusal.status == 429
    assert "16 more" in refusal.message


def test_jobs_of_a_key_that_has_had_its_day_wait(tmp_path: Path) -> None:
    """Also where nobody knew what they would take."""
    store = open_store(tmp_path, clock=time.time)
    keys = Keys(
        (
            _key(rank_seconds_per_day=20.0),
            msgspec.structs.replace(_key(max_running=3), id="ben", hash="sha256:" + "1" * 64),
        )
    )
    epoch = store.begin_epoch()
    for spent in (12.0, 9.0):
        assert most_of_key(keys, store, time.time()) == {"ben": 3}
        job = store.accept(a_job()).id
        store.claim([job], epoch)
        store.cancelled(job, epoch, rank_seconds=spent, keep_s=1.0)
    assert most_of_key(keys, store, time.time()) == {"anna": 0, "ben": 3}
    assert most_of_key(keys, store, time.time() + 86400) == {"ben": 3}


def test_jobs_that_other_supervisors_run_count(tmp_path: Path) -> None:
    store, keys = open_store(tmp_path, clock=time.time), Keys((_key(max_running=2),))
    other = store.begin_epoch(alone=False)
    jobs = [store.accept(a_job()).id for _ in range(3)]
    for left in (2, 1, 0):
        assert most_of_key(keys, store, time.time()) == {"anna": left}
        store.claim([jobs.pop()], other)
    assert most_of_key(keys, store, time.time()) == {"anna": 0}
