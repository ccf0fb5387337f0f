"""Jobs and stores for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parafuse.launch.serve.jobs import Job, JobRequest, new_id
from parafuse.launch.serve.sqlite_store import SqliteStore

NOW = 1_800_000_000.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def open_store(folder: Path, **settings: Any) -> SqliteStore:
    return SqliteStore(folder / "jobs.sqlite", folder / "results", folder / "inputs", **settings)


def a_job(owner: str = "anna", *, kind: str = "image", images: tuple[str, ...] = (), **fields: Any) -> Job:
    request = JobRequest(kind=kind, prompt="a cat – ❄️", seed=7, settings={"width": 64, "guidance_scale": 3.5},
                         images={"image": images} if images else {}, asked={"size": "64x64"})  # fmt: skip
    return Job(**{"id": new_id(kind), "owner": owner, "request": request, "created_s": NOW, **fields})


def paint(store: SqliteStore, folder: str, *files: str, data: bytes = b"picture") -> str:
    """What an attempt writes; the folder's name."""
    store.folders.output(folder).mkdir(exist_ok=True)
    for file in files:
        store.folders.output(folder, file).write_bytes(data)
    return folder
