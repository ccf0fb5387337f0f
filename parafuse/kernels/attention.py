"""Attention by the backend that was chosen for a denoiser.

Shapes: q (B, H, S, D), k and v (B, G, N, D), mask broadcastable to (B, H, S, N), out (B, H, S, D), lse (B, H, S) fp32.
A row whose keys are all masked has lse = -inf and out = 0.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from parafuse.attention import TIMED, TORCH, Attention, Timings
from parafuse.errors import UnsupportedError
from parafuse.kernels.backends import REGISTRY, attention_math, torch_choice
from parafuse.kernels.registry import Backend, Facts, Pick, facts_of

__all__ = ["Call", "Choice", "attention", "attention_lse", "attention_math", "choice_of"]


@dataclass(frozen=True)
class Call:
    """The other arguments of one scaled-dot-product attention."""

    mask: Tensor | None = None
    """Over the whole sequence in the model's order: broadcastable to (B, H, N, N)."""
    scale: float | None = None
    is_causal: bool = False


@dataclass
class Ran:
    """Calls of one kind."""

    facts: Facts | None
    pick: Pick
    number: int = 0


MOST_PICKS = 256
"""Kinds of calls whose backend is kept in mind."""


@dataclass(eq=False)
class Choice:
    """The backend that a denoiser's attention was to run with, and which ones ran."""

    asked: str = TORCH
    timings: Timings | None = None
    key: str = ""
    """By which operators find it: they can carry only a name."""
    sparse: Any = None
    """What leaves pairs of tokens out, where something does: `parallel.sparse.SparseAttention`."""
    picks: dict[Any, Pick] = field(default_factory=dict[Any, Pick])
    """By the facts of a call; with timings by its number of pairs too."""
    calls: dict[Any, Ran] = field(default_factory=dict[Any, "Ran"])

    @classmethod
    def named(cls, attention: Attention, name: str) -> Choice:
        """One that operators find by `name`, or by that and a number where another engine has one of that name.

        Names are the same from process to process: they stand in compiled graphs that are kept."""
        number = next(n for n in range(1, len(_CHOICES) + 2) if _numbered(name, n) not in _CHOICES)
        one = cls(attention.backend if attention.acts else TORCH, attention.timings, _numbered(name, number))
        _CHOICES[one.key] = one
        return one

    @property
    def acts(self) -> bool:
        """Whether torch by itself would not do the same."""
        return self.asked != TORCH

    def pick(self, facts: Facts, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Backend:
        """Which backend computes a call, the same one every time."""
        key = (facts, facts.pairs) if self.asked == TIMED else facts  # timings are of a size
        found = self.picks.get(key)
        if found is None:
            found = REGISTRY.pick(facts, self.asked, self.timings)
            if found.backend.name == TORCH:
                found = replace(found, reason=f"{found.reason}: {torch_choice(q, k, v, call.mask, call.is_causal)}")
            self.picks = {**self.picks, key: found} if len(self.picks) < MOST_PICKS else {key: found}
        self.calls.setdefault(key, Ran(facts, found)).number += 1
        return found.backend

    def begin(self) -> None:
        """Counts anew."""
        self.calls.clear()

    @property
    def is_lossy(self) -> bool:
        return self.asked not in (TORCH, TIMED) and bool(REGISTRY.backends[self.asked].lossy)

    def why_idle(self) -> str:
        """Why the backend that was asked for has computed nothing so far; empty where it has, or none was named."""
        if self.sparse is not None and not self.picks:
            return ""  # all of its attention was sparse, by a kernel of its own
        if self.asked in (TORCH, TIMED) or any(one.backend.name == self.asked for one in self.picks.values()):
            return ""
        reasons = sorted({one.others.get(self.asked, one.reason) for one in self.picks.values()})
        able = sorted({one.backend.name for one in self.picks.values()})
        if reasons:
            return f"it {', or it '.join(reasons)}; {', '.join(able)} can"
        return "no call of scaled_dot_product_attention was met in its blocks; set their attention backend to native"

    def lines(self) -> list[str]:
        """Each backend that ran since `begin`, in words; before the first call, what was asked for."""
        names: dict[tuple[str, str], int] = {}
        for one in self.calls.values():
            what = one.pick.backend.name, one.pick.reason
            names[what] = names.get(what, 0) + one.number
        told = [f"{name} in {number} calls ({why})" for (name, why), number in names.items()]
        return (
            told
            or [f"{one.backend.name} in captured graphs ({one.reason})" for one in self.picks.values()]
            or [self.asked]
        )

    def report(self) -> list[dict[str, object]]:
        """For receipts: each backend that ran since `begin`, why, for how many calls of which kind, and why no other
        one did. Calls in a captured graph are not counted: of such requests, what was captured."""
        ran = self.calls.values() or [Ran(None, pick) for pick in self.picks.values()]
        return [
            {
                "backend": one.pick.backend.name,
                "reason": one.pick.reason,
                "calls": one.number,
                "for": _said(one.facts) if one.facts else "captured graphs",
                "others": dict(one.pick.others),
            }
            for one in ran
        ]


_CHOICES: weakref.WeakValueDictionary[str, Choice] = weakref.WeakValueDictionary()
_NO_CHOICE = Choice()


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} {number}"


def choice_of(key: str) -> Choice:
    """The choice of that name; torch's own where there is none."""
    return _CHOICES.get(key, _NO_CHOICE) if key else _NO_CHOICE


def _said(facts: Facts) -> str:
    sizes = f"{facts.head_size}" if facts.head_size == facts.value_size else f"{facts.head_size}/{facts.value_size}"
    parts = [f"{str(facts.dtype).removeprefix('torch.')} heads of {sizes}"]
    parts += ["grouped"] if facts.is_grouped else []
    parts += [f"{facts.mask} mask"] if facts.mask else []
    parts += ["causal"] if facts.is_causal else []
    parts += ["with log-sum-exp"] if facts.needs_lse else []
    return ", ".join(parts)


def _run(
    q: Tensor, k: Tensor, v: Tensor, call: Call, choice: Choice, *, needs_lse: bool
) -> tuple[Tensor, Tensor | None]:
    scale = float(q.shape[-1] ** -0.5) if call.scale is None else call.scale
    facts = facts_of(q, k, v, call.mask, is_causal=call.is_causal, needs_lse=needs_lse)
    backend = choice.pick(facts, q, k, v, call)
    if facts.is_grouped and not backend.takes_groups:
        group_size = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
    return backend.run(q, k, v, call.mask, scale, call.is_causal)


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call, choice: Choice = _NO_CHOICE) -> Tensor:
    """softmax(q k^T * scale + mask) v. Local."""
    return _run(q, k, v, call, choice, needs_lse=False)[0]


def attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    choice: Choice = _NO_CHOICE,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of softmax(q k^T * scale + mask) v. Local."""
    out, lse = _run(q, k, v, Call(mask, scale), choice, needs_lse=True)
    if lse is None:
        raise UnsupportedError("an attention backend gave no log-sum-exp")
    return out, lse


@torch.library.custom_op("parafuse::attention", mutates_args=())
def attention_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    choice: str,
) -> Tensor:
    """`attention` as one operator, so that a traced graph asks for the backend at every call."""
    out = attention(q, k, v, Call(mask, scale, is_causal), choice_of(choice)).transpose(1, 2)
    out = out if out.is_contiguous() else out.contiguous()
    return out.transpose(1, 2)


@attention_of.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    batch, heads, rows, width = *q.shape[:3], v.shape[-1]
    return q.new_empty((batch, rows, heads, width)).transpose(1, 2)
