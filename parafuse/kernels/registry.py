"""Which implementation of attention runs: each says what it can, and why it cannot here.

The one that was asked for runs where it can. `timed` takes the fastest of those that were timed on calls like this one
(`parafuse tune attention`). `torch` is torch's own choice, or the first of torch's kernels that gives a log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parafuse.attention import TIMED, TORCH, Row, Timings
from parafuse.errors import UnsupportedError

TIE = 1.03
"""A backend must be ahead of torch's own choice by more than that, or the choice would be noise."""
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What decides who can compute an attention. q (B, H, S, D), k (B, G, N, D), v (B, G, N, Dv)."""

    device: str
    capability: tuple[int, int] | None
    """CUDA compute capability; None on other devices."""
    dtype: torch.dtype
    head_size: int
    value_size: int
    is_grouped: bool
    """G < H: several query heads share a key head."""
    mask: str
    """"" for none, "bool" or "bias"."""
    is_causal: bool
    is_square: bool
    """S = N."""
    needs_lse: bool
    pairs: int = field(default=0, compare=False)
    """S * N: which timing is nearest."""

    @property
    def is_half(self) -> bool:
        return self.dtype in HALF


Run = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float, bool], tuple[Tensor, "Tensor | None"]]
"""(q, k, v, mask, scale, is_causal) -> (out (B, H, S, Dv), lse (B, H, S) fp32 or None)."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of attention."""

    name: str
    about: str
    """What it is, in a line."""
    has_lse: bool
    """Whether it gives the log-sum-exp, without which a ring cannot merge what its ranks have."""
    takes_masks: bool
    takes_groups: bool = False
    """Whether it takes fewer key heads than query heads; they are repeated for others."""
    lossy: str = ""
    """What it loses; empty: nothing but the order of sums."""
    run: Run
    why_not_here: Callable[[str], str] = lambda device: ""
    """Device type -> why it cannot run there; empty where it can."""
    why_not: Callable[[Facts], str] = lambda facts: ""
    """Why it cannot compute a call; empty where it can."""

    def refusal(self, facts: Facts) -> str:
        """Why it cannot compute a call like this here; empty where it can."""
        if facts.needs_lse and not self.has_lse:
            return "gives no log-sum-exp"
        if facts.mask and not self.takes_masks:
            return "takes no mask"
        return self.why_not_here(facts.device) or self.why_not(facts)


@dataclass(frozen=True)
class Pick:
    """What computes calls like one, and why."""

    backend: Backend
    reason: str
    others: Mapping[str, str]
    """Name -> why it is another one's call."""


class Registry:
    """Backends of attention, in the order in which `torch` tries those that give a log-sum-exp."""

    def __init__(self, backends: tuple[Backend, ...], own: tuple[str, ...]):
        """`own`: names of torch's kernels, the last of which can compute every call."""
        self.backends = {one.name: one for one in backends}
        self.own = own

    def pick(self, facts: Facts, asked: str = TORCH, timings: Timings | None = None) -> Pick:
        """What computes such a call. Raises UnsupportedError for a name that is no backend's."""
        refusals = {name: one.refusal(facts) for name, one in self.backends.items()}
        if asked == TIMED:
            found = self._timed(facts, timings, refusals)
            return found or self._own(facts, refusals, "no call like this was timed")
        if asked == TORCH:
            return self._own(facts, refusals, "")
        if asked not in self.backends:
            raise UnsupportedError(f"attention={asked!r}: there are {', '.join(self.backends)}")
        if refusals[asked]:
            return self._own(facts, refusals, f"{asked} {refusals[asked]}")
        return self._picked(asked, "asked for", refusals, f"{asked} is asked for")

    def _own(self, facts: Facts, refusals: dict[str, str], why: str) -> Pick:
        if not facts.needs_lse and not refusals[TORCH]:
            return self._picked(TORCH, why or "torch chooses", refusals, "torch chooses among its own")
        name = next(name for name in self.own if not refusals[name])
        first = "the first of torch's own that can"
        return self._picked(name, f"{why}; {first}" if why else first, refusals, f"{name} is before it")

    def _timed(self, facts: Facts, timings: Timings | None, refusals: dict[str, str]) -> Pick | None:
        row = timings.nearest(_like(facts), facts.pairs) if timings is not None else None
        able = {name: time for name, time in row.seconds.items() if refusals.get(name) == ""} if row else {}
        lossless = {name: time for name, time in able.items() if not self.backends[name].lossy}
        if row is None or not lossless:
            return None
        name = min(lossless, key=lossless.__getitem__)
        reason = f"the fastest of {len(lossless)} timed on {row.shape}: {1e3 * lossless[name]:.3g} ms"
        if lossless.get(TORCH, math.inf) <= TIE * lossless[name] and name != TORCH:
            name, reason = TORCH, f"none of {len(lossless)} timed on {row.shape} is ahead by {TIE - 1:.0%}"
        slower = {other: f"{1e3 * time:.3g} ms on {row.shape}" for other, time in able.items() if other != name}
        lossy = {other: f"{slower[other]}, but lossy: ask for it" for other in slower if self.backends[other].lossy}
        return self._picked(name, reason, {**refusals, **slower, **lossy}, "not timed")

    def _picked(self, name: str, reason: str, refusals: dict[str, str], why_not: str) -> Pick:
        others = {
            other: refusal or self._why_unasked(other, why_not) for other, refusal in refusals.items() if other != name
        }
        return Pick(self.backends[name], reason, others)

    def _why_unasked(self, name: str, why_not: str) -> str:
        return (
            f"lossy ({self.backends[name].lossy}): only where it is asked for" if self.backends[name].lossy else why_not
        )


def facts_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, needs_lse: bool) -> Facts:
    """Of one call."""
    kind = "" if mask is None else "bool" if mask.dtype == torch.bool else "bias"
    return Facts(
        device=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None,
        dtype=q.dtype,
        head_size=q.shape[-1],
        value_size=v.shape[-1],
        is_grouped=q.shape[1] != k.shape[1],
        mask=kind,
        is_causal=is_causal,
        is_square=q.shape[2] == k.shape[2],
        needs_lse=needs_lse,
        pairs=q.shape[2] * k.shape[2],
    )


def _like(facts: Facts) -> Row:
    """What a timing must have been made with to say something about such a call."""
    return Row(
        dtype=str(facts.dtype).removeprefix("torch."),
        head_size=facts.head_size,
        mask=facts.mask,
        is_causal=facts.is_causal,
        with_lse=facts.needs_lse,
    )
