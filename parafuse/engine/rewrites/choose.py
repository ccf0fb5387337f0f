"""Which rewrites a denoiser gets: by name, each that was asked for, or a refusal; `auto`, those that pay here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from parafuse.config import REWRITES
from parafuse.engine.caches.clock import schedulers_of
from parafuse.engine.rewrites import qkv, rope
from parafuse.engine.rewrites.modulation import StepModulation
from parafuse.engine.rewrites.rewrite import Rewrite, Site
from parafuse.engine.rewrites.text import TrimmedText, takes_a_mask
from parafuse.errors import ConfigError

AUTO = "auto"


@dataclass(frozen=True)
class Beside:
    """What else is asked for."""

    compile: bool = False
    quantize: bool = False


@dataclass(frozen=True)
class Kind:
    """One rewrite."""

    make: Callable[[Site], Rewrite]
    why_not: Callable[[nn.Module, Any], str]
    """(denoiser, target of `apply`) -> why it cannot have it; empty where it can, as far as is known before a call."""
    needs_steps: bool = False
    """Whether it must know when a request begins and ends."""
    why_not_auto: Callable[[nn.Module, Beside], str] = lambda *_: ""
    """Why `auto` leaves it off, as far as is known before a call; empty where it may pay."""


def _no_mask(module: nn.Module, _: Any) -> str:
    return "" if takes_a_mask(module) else "takes no mask of its text, so nothing says which tokens are padding"


def _no_schedule(module: nn.Module, target: Any) -> str:
    if not schedulers_of(target):
        return "belongs to no pipeline with a scheduler here, so the timesteps to come are not known; apply it to those"
    return "" if any(type(part) is nn.Linear for part in module.modules()) else "has no linear layers"


def _no_joint_product(module: nn.Module, beside: Beside) -> str:
    return "joins weights, and these are quantized one by one" if beside.quantize else qkv.why_not_auto(module)


KINDS: dict[str, Kind] = {
    "qkv": Kind(
        lambda site: qkv.FusedProjections(site.module),
        lambda module, _: qkv.why_not(module),
        why_not_auto=_no_joint_product,
    ),
    "text": Kind(TrimmedText, _no_mask),
    "modulation": Kind(StepModulation, _no_schedule, needs_steps=True),
    "rope": Kind(
        lambda site: rope.JoinedLast(site.module),
        lambda *_: "",
        why_not_auto=lambda module, beside: rope.why_not_auto(module, compiles=beside.compile),
    ),
}
"""In the order of REWRITES. What decides more than this (which calls can be cut, which layers have values that depend
on the step alone) is told by the first call, where `auto` leaves off what does not pay (docs/rewrites.md)."""


STEPWISE = (AUTO, *(name for name, kind in KINDS.items() if kind.needs_steps))
"""What may need the steps of the pipeline to be counted."""


@dataclass(frozen=True)
class Choice:
    """What one denoiser gets."""

    names: tuple[str, ...] = ()
    by_name: bool = True
    left_off: tuple[str, ...] = ()
    """What was asked for or looked at and is not on it, with the reason."""


def choices(
    names: Sequence[str], modules: Sequence[tuple[str, nn.Module]], target: Any, beside: Beside | None = None
) -> list[Choice]:
    """What each denoiser gets of the rewrites. Raises ConfigError for one asked for by name that none can have."""
    by_name = tuple(names) != (AUTO,)
    asked = [name for name in REWRITES if name in (names if by_name else KINDS)]
    why = {(name, part): _why_not(name, module, target) for name in asked for part, module in modules}
    if not by_name:
        for (name, part), reason in why.items():
            why[name, part] = reason or KINDS[name].why_not_auto(dict(modules)[part], beside or Beside())
    for name in asked if by_name and modules else ():
        if all(why[name, part] for part, _ in modules):
            reasons = "; ".join(f"{part} ({type(module).__name__}) {why[name, part]}" for part, module in modules)
            raise ConfigError(f"rewrites={','.join(names)!r}: {name!r} cannot act here: {reasons}. Leave it out.")
    return [
        Choice(
            names=tuple(name for name in asked if not why[name, part]),
            by_name=by_name,
            left_off=tuple(f"rewrite {name} left off: {why[name, part]}" for name in asked if why[name, part]),
        )
        for part, _ in modules
    ]


def _why_not(name: str, module: nn.Module, target: Any) -> str:
    if name not in KINDS:
        return f"cannot have it: this version has {', '.join(KINDS)}"
    return KINDS[name].why_not(module, target)


def make(choice: Choice, site: Site) -> list[Rewrite]:
    """The rewrites of a denoiser, in the order in which they are put on."""
    site.is_choice = not choice.by_name
    return [KINDS[name].make(site) for name in choice.names]
