"""A progress bar over denoising steps, on rank 0 only, through the pipeline's own step callback."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class StepProgress:
    """Context manager; `callback` goes in as `callback_on_step_end` and calls the user's own one after counting."""

    def __init__(self, *, shown: bool, total: int | None, user: Callback | None, skips: Callable[[], tuple[int, int]]):
        self.steps_s: list[float] = []
        """Seconds of each step after the first, from callback to callback."""
        self.is_in_callback = False
        """Whether the user's own runs now."""
        self._last: float | None = None
        self._user = user
        self._skips = skips
        """(skipped, all) decisions of caches so far."""
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("denoising", total=total)

    def callback(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        now = time.perf_counter()
        if self._last is not None:
            self.steps_s.append(now - self._last)
        self._last = now
        if self._bar is not None:
            skipped, of = self._skips()
            text = f"denoising, {skipped} of {of} calls from the cache" if of else "denoising"
            self._bar.update(self._task, completed=step + 1, description=text)
        if self._user is None:
            return tensors
        self.is_in_callback = True
        try:
            return self._user(pipeline, step, timestep, tensors)
        finally:
            self.is_in_callback = False

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
