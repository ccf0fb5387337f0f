"""What people do with one member of a pipeline, as a function that runs on a plain pipeline and on an engine alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import parafuse

Run = Callable[[Any, Path], Any]
"""Of a pipeline or an engine, and an empty folder; gives what can be seen of the effect."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """The use of one member."""

    run: Run
    raises: str = ""
    """Part of the error that plain diffusers raises too; empty: it raises none."""
    refused: dict[int, str] = field(default_factory=dict[int, str])
    """Number of ranks -> part of the reason for which an engine refuses it."""
    is_read: bool = False
    """Whether it changes nothing, so that it may share a pipeline with others."""
    on: str = ""
    """The pipeline class on which it can be seen; empty: the one at hand."""
    writes: bool = False
    """Whether rank 0 alone does it."""


Scripts = dict[str, Script]


def read(name: str, **more: Any) -> Script:
    """A property or a constant, after a call."""

    def run(x: Any, _: Path) -> Any:
        picture(x)
        return getattr(x, name)

    return Script(run=run, is_read=True, **more)


def bare(x: Any) -> Any:
    """The pipeline itself."""
    return x.pipeline if isinstance(x, parafuse.Engine) else x


def picture(x: Any, **more: Any) -> torch.Tensor:
    """Latents of two prompts."""
    from tests.drop_in.pipelines import CALLS

    call = CALLS[type(bare(x)).__name__] | more
    return x(**call, generator=torch.Generator().manual_seed(3), return_dict=False)[0]


def effect(
    x: Any, act: Callable[[], Any], *, undo: Callable[[], Any] | None = None, call: dict[str, Any] | None = None
) -> list[Any]:
    """Pictures before and after, which differ; and once the act is undone, which is the first one again."""
    more = call or {}
    before = picture(x, **more)
    act()
    seen = [before, picture(x, **more)]
    assert distance(*seen) > 1e-4, "it has no effect"
    if undo is not None:
        undo()
        seen.append(picture(x, **more))
        assert distance(seen[0], seen[2]) < 1e-5, "undoing it does not restore the picture"
    return seen


def unchanged(x: Any, act: Callable[[], Any], seen: Callable[[], Any]) -> list[Any]:
    """For what changes how things are computed, not what comes out: the picture after, and what `seen` sees of it."""
    before_seen, before = seen(), picture(x)
    act()
    after = picture(x)
    assert seen() != before_seen, "it has no effect"
    assert distance(before, after) < 1e-5
    return [seen(), after]


def processors(x: Any) -> list[str]:
    """Classes of the attention processors of all components."""
    parts = [part for part in bare(x).components.values() if isinstance(part, torch.nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    return sorted(type(m.processor).__name__ for m in modules if hasattr(m, "processor"))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the largest value."""
    return float((a - b).abs().max() / b.abs().max())
