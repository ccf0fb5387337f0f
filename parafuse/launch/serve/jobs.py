"""Jobs, and what a store of them can do.

A job that was accepted is stored, and ends once: done, failed or cancelled."""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import Struct

from parafuse.errors import ParafuseError
from parafuse.launch.serve.messages import Adapter, Coding

MAX_TRIES = 2
"""A job whose ranks are lost is tried again once, then failed by name."""
PREFIXES = {"image": "img_", "edit": "edit_", "video": "video_", "decode": "dec_", "encode": "enc_"}
"""Kind of a request -> how ids of its jobs begin."""


class State(enum.StrEnum):
    """Where a job is."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()
    CANCELLED = enum.auto()

    @property
    def is_over(self) -> bool:
        return self in (State.DONE, State.FAILED, State.CANCELLED)


class JobRequest(Struct, frozen=True, kw_only=True):
    """What is to be painted, checked, in the pipeline's own keywords; or what the autoencoder is to do."""

    kind: str
    """image, edit, video; decode, encode, of the autoencoder."""
    prompt: str
    negative_prompt: str | None = None
    seed: int
    num_outputs: int = 1
    settings: dict[str, Any] = {}
    """Keywords of the pipeline's call: width, height, num_inference_steps, guidance, num_frames, ..."""
    images: dict[str, tuple[str, ...]] = {}
    """Keyword -> files in the store's folder of inputs."""
    coding: Coding | None = None
    """Of decode and encode, which have neither prompt nor seed."""
    lora: tuple[Adapter, ...] = ()
    cache: bool = True
    previews: int = 0
    format: str = "png"
    frames_per_second: int = 16
    asked: dict[str, Any] = {}
    """What of the client's own words its answers repeat: size, quality, seconds, model."""


class JobError(Struct, frozen=True, kw_only=True):
    """Why a job failed."""

    kind: str
    """invalid, memory, unsupported, deadline, lost, internal."""
    message: str


class Job(Struct, frozen=True, kw_only=True):
    """A job as the store has it. Times are Unix seconds."""

    id: str
    owner: str
    """Id of the key that made it."""
    request: JobRequest
    state: State = State.QUEUED
    priority: int = 0
    """Higher goes first, from -10 to 10."""
    created_s: float
    deadline_s: float | None = None
    started_s: float | None = None
    finished_s: float | None = None
    expires_s: float | None = None
    """When its result is taken away."""
    tries: int = 0
    cancel_asked: bool = False
    error: JobError | None = None
    folder: str = ""
    """Of its outputs, in the store's folder of results."""
    files: tuple[str, ...] = ()
    receipt: str = ""
    """JSON. Holds the prompt: for its owner only."""
    rank_seconds: float = 0.0
    """Seconds times ranks that it took, lost tries included: GPU-seconds."""
    idempotency_key: str | None = None
    webhook: str | None = None
    progress: float = 0.0


class QueueFullError(ParafuseError):
    """No more jobs are taken now."""

    def __init__(self, message: str, *, of_key: bool = False):
        super().__init__(message)
        self.of_key = of_key
        """Whether it is this key's own share that is full."""


class IdempotencyError(ParafuseError):
    """The same idempotency key came with another request."""


class StaleError(ParafuseError):
    """A supervisor that is not (or no longer) in charge of a job wanted to change it."""


class JobGoneError(ParafuseError):
    """A job that was over has been deleted: there is nothing more to be said of it."""


class StoreError(ParafuseError, OSError):
    """The store cannot be read or written now: a full disk, a damaged file. Nothing was half done."""


class StoreBusyError(StoreError):
    """Another process holds the store for too long (it may be stopped); the same call may be made again."""


class FileError(ParafuseError):
    """A job names a file that is not there, or that it may not name. Trying again does not help."""


def new_id(kind: str) -> str:
    """Id for a new job: its prefix, the time (sorts by milliseconds within a prefix), and 128 random bits."""
    return f"{PREFIXES[kind]}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(16)}"


class JobStore(Protocol):
    """Where jobs live. Calls block for some milliseconds, and may come from several threads and processes."""

    def accept(
        self, job: Job, *, request_hash: str = "", max_queued: int | None = None, max_queued_of_key: int | None = None
    ) -> Job:
        """Stores a new job, on disk when this returns. With an idempotency key that its owner has used: the job that
        stands (IdempotencyError where `request_hash` differs). Raises QueueFullError, decided in one transaction."""
        ...

    def get(self, job: str, owner: str | None = None) -> Job | None:
        """None also for another owner's."""
        ...

    def of_owner(self, owner: str, *, kind: str | None = None, limit: int = 20, after: str | None = None) -> list[Job]:
        """Newest first; `after`: those older than this one."""
        ...

    def ask_cancel(self, job: str, owner: str | None = None) -> Job | None:
        """A queued job is cancelled here and now, a running one is marked; one that is over stays as it is."""
        ...

    def delete(self, job: str, owner: str | None = None) -> bool:
        """Takes away a job that is over, and its files. False: none such."""
        ...

    def discard_inputs(self, names: Sequence[str]) -> None:
        """Takes away those that no job names: of a request that was given up."""
        ...

    def begin_epoch(self, *, alone: bool = True) -> int:
        """A supervisor takes charge, `alone` or beside those that are: the number that it gives with its changes.
        `alone` ends the charge of all others, as `end_epoch` does."""
        ...

    def end_epoch(self, epoch: int) -> list[Job]:
        """A supervisor is no longer in charge: from then on its changes raise StaleError. The jobs that it left running
        are queued again, or failed as lost when they have had MAX_TRIES, or cancelled where that was asked: those."""
        ...

    def epochs(self) -> list[int]:
        """Of the supervisors that are in charge, the eldest first."""
        ...

    def queued(self, limit: int = 1000) -> list[Job]:
        """By priority, then oldest first."""
        ...

    def claim(self, jobs: Sequence[str], epoch: int) -> list[Job]:
        """Those of them that were still queued, now running, one more try counted. Only the supervisor that has claimed
        a job may change it while it runs."""
        ...

    def give_back(self, job: str, epoch: int, why: str, *, rank_seconds: float = 0.0) -> Job:
        """Its ranks were lost: queued again, or failed as lost after MAX_TRIES, or cancelled where that was asked."""
        ...

    def unclaim(self, job: str, epoch: int) -> Job:
        """As if it had not been claimed: no try is counted (a server that drains)."""
        ...

    def commit(
        self, job: str, epoch: int, *, folder: str, files: Sequence[str], receipt: str, rank_seconds: float,
        keep_s: float,
    ) -> Job:  # fmt: skip
        """Running -> done, with its outputs; at most once. This and the methods below raise JobGoneError for a job that
        was over, and has been deleted."""
        ...

    def fail(self, job: str, epoch: int, error: JobError, *, rank_seconds: float = 0.0, keep_s: float) -> Job:
        """Running or queued -> failed."""
        ...

    def fail_late(self, epoch: int, *, keep_s: float) -> list[Job]:
        """Queued jobs whose deadline has passed -> failed."""
        ...

    def cancelled(self, job: str, epoch: int, *, rank_seconds: float = 0.0, keep_s: float) -> Job:
        """Running -> cancelled."""
        ...

    def note_progress(self, job: str, epoch: int, progress: float) -> None:
        """From 0 to 1, of a running job."""
        ...

    def running(self) -> list[Job]:
        """Those that are running, with `cancel_asked` as it is now."""
        ...

    def counts(self) -> dict[State, int]:
        """Jobs in each state. Looks at all of them."""
        ...

    def num_queued(self, owner: str | None = None) -> int:
        """Jobs that wait, of all keys or of one."""
        ...

    def spent(self, owner: str, since_s: float) -> float:
        """Rank-seconds of an owner's jobs that ended since."""
        ...

    def sweep(self, now_s: float, *, max_bytes: int) -> int:
        """Takes away what has expired, then the oldest results until `max_bytes` are kept, and folders that belong to
        no job; returns how many jobs went."""
        ...

    def due_webhooks(self, now_s: float, limit: int = 20) -> list[Job]:
        """Jobs that are over, whose webhook was not delivered yet and is due."""
        ...

    def webhook_tried(self, job: str, *, delivered: bool, next_s: float | None) -> None:
        """`next_s`: when to try again; None: never."""
        ...
