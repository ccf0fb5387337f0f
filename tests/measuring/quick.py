"""A measured run whose figures are not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from parafuse.launch.bench import run as run_module
from parafuse.launch.bench.work import Rates


@contextmanager
def quick() -> Iterator[None]:
    """Without the rates of this machine, which take time; on one thread, since other tests use the other cores and
    threads that wait for each other there take ten times as long."""
    with (
        patch.object(run_module, "rates", lambda *_: Rates(1e11, 1e11, 1e10)),
        patch.object(run_module, "cores", lambda: 1),
    ):
        yield
