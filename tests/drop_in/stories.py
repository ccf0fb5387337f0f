"""What a user does with a pipeline, one thing after the other: told to plain diffusers, and to others on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import parafuse
from parafuse.engine.verify import relative_error
from tests.guided.cells import seeded, tensors

EXACT = 1e-5
SHOWS = 1e-2
"""The least that a change must change a picture by, or its test could not fail."""


def nothing(_: Any) -> None:
    """The pipeline as it is."""


@dataclass(frozen=True)
class Chapter:
    """One thing done to a pipeline, and a picture painted after it."""

    name: str
    change: Callable[[Any], Any] = nothing
    call: dict[str, Any] = field(default_factory=dict[str, Any])
    """Keywords of the pipeline's call beside those of the story."""
    like: str | None = None
    """An earlier chapter whose picture this one's must be; None: of none before."""
    is_told_before: bool = True
    """Also with parafuse put on after it."""


@dataclass(frozen=True)
class Story:
    build: Callable[[], Any]
    call: dict[str, Any]
    chapters: tuple[Chapter, ...]


@dataclass
class Told:
    """One chapter as one rank saw it: errors against plain diffusers, or their refusals as text."""

    under: float | str = ""
    """The change was made while parafuse was on."""
    before: float | str = 0.0
    """Parafuse was put on after it."""
    is_restored: bool = True
    """The picture after `remove()` is plain diffusers' bit for bit."""
    nearest: float = 1.0
    """Difference of plain diffusers' picture from the most similar earlier one; from `like`, where that is given."""
    shared: int = 0
    """Exchanges of the ranks' work in the request that was made under parafuse."""

    def faults(self, chapter: Chapter) -> list[str]:
        found = [
            f"{name}: {value}"
            for name, value in (("under", self.under), ("before", self.before))
            if isinstance(value, str) or not value <= EXACT
        ]
        if not self.is_restored:
            found.append("not restored")
        if chapter.like is None and not self.nearest > SHOWS:
            found.append(f"changes nothing ({self.nearest:.1e})")
        if chapter.like is not None and not self.nearest <= EXACT:
            found.append(f"is not as in {chapter.like!r} ({self.nearest:.1e})")
        if not self.shared:
            found.append("nothing was shared")
        return found


def paint(run: Any, call: dict[str, Any]) -> list[torch.Tensor]:
    return tensors(run(**seeded(call)))


def error_of(run: Any, call: dict[str, Any], want: list[torch.Tensor]) -> float | str:
    """Or its error as text: ranks that raise would end the processes of all tests."""
    try:
        return relative_error(paint(run, call), want)
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


def tell(story: Story, degrees: dict[str, int]) -> dict[str, Told]:
    """The story on the ranks at hand, by chapter."""
    config = parafuse.Config(parallel=parafuse.Parallel(**degrees))
    plain, under, before = story.build(), story.build(), story.build()
    found: dict[str, Told] = {}
    wants: dict[str, list[torch.Tensor]] = {}
    with parafuse.Engine.from_pipeline(under, config) as engine:
        for chapter in story.chapters:
            call, told = story.call | chapter.call, Told()
            for pipeline in (plain, under, before):
                chapter.change(pipeline)
            want = paint(plain, call)
            apart = {name: relative_error(want, other) for name, other in wants.items()}
            told.nearest = apart[chapter.like] if chapter.like else min(apart.values(), default=1.0)
            sent = shared(engine)
            told.under = error_of(engine, call, want)
            told.shared = shared(engine) - sent
            if chapter.is_told_before:
                with parafuse.Engine.from_pipeline(before, config) as other:
                    told.before = error_of(other, call, want)
                told.is_restored = all(map(torch.equal, paint(before, call), want))
            wants[chapter.name], found[chapter.name] = want, told
    last = story.chapters[-1]
    found[last.name].is_restored &= all(map(torch.equal, paint(under, story.call | last.call), wants[last.name]))
    return found


def shared(engine: parafuse.Engine) -> int:
    """Exchanges of attention so far, and calls whose branches or samples were spread."""
    parts = (*engine.handle.guidance.values(), *engine.handle.data.values())
    spread = sum(one.seen["cut"] + one.seen["together"] for one in parts)
    sent = engine.handle.exchanged()
    return spread + sum(count.calls for name, count in sent.items() if name.endswith(("all_to_all", "ring")))


def faults(story: Story, told: list[dict[str, Told]]) -> dict[str, list[str]]:
    """By chapter, what any rank found wrong."""
    return {
        chapter.name: wrong
        for chapter in story.chapters
        if (wrong := sorted({fault for rank in told for fault in rank[chapter.name].faults(chapter)}))
    }
