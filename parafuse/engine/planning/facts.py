"""What a request computes and moves, part by part, operator by operator. Torch-free data, kept as JSON.

Sizes of an operator on a rank of a sequence of P ranks are `whole + divided / P`: found from runs at two degrees.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from parafuse.config import VAE_AUTO, VAE_REPLICATED, VAE_SHARDED, VAE_TILED

ENCODE, DENOISE, DECODE = "encode", "denoise", "decode"
GEMM, ATTENTION, CONVOLUTION, VIEW, FUSED = "gemm", "attention", "convolution", "view", "fused"
"""Families of operators; all others go by their own name. VIEW moves nothing; FUSED is what a compiler makes of the
operators between two products."""
PRODUCTS = (GEMM, ATTENTION, CONVOLUTION)
SMALL_DECODE = 64 * 64
"""Latent positions from which on ranks share a decode."""
SCHEMA = 2


class Amount(NamedTuple):
    """A number on one rank of a sequence of so many."""

    whole: float = 0.0
    """The same on every rank."""
    divided: float = 0.0
    """Over all ranks together."""

    def on(self, degree: int) -> float:
        return self.whole + self.divided / degree

    def times(self, factor: float) -> Amount:
        return Amount(self.whole * factor, self.divided * factor)

    @classmethod
    def of(cls, at_2: float, at_4: float) -> Amount:
        """From what it is at degrees 2 and 4; sizes that are rounded up are never less than nothing."""
        divided = max(0.0, 4 * (at_2 - at_4))
        return cls(max(0.0, at_4 - divided / 4), divided)


NOTHING = Amount()


@dataclass(frozen=True, kw_only=True)
class Operator:
    """All calls of one kind and size in one place."""

    where: str
    """Class of the repeated block; empty outside of blocks."""
    family: str
    dtype: str
    count: float
    """Calls."""
    flops: Amount = NOTHING
    """Of each call."""
    bytes: Amount = NOTHING
    """Read and written by each call, without weights."""
    weights: float = 0.0
    """Bytes of weights that each call reads."""
    columns: int = 0
    """Of a matrix product (m, k) x (k, n): n; of attention the size of a head."""


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """What a rank sends in one call of a part, split over a sequence."""

    attention_calls: float = 0.0
    """Attentions that exchange."""
    ulysses_bytes: float = 0.0
    """Times (u - 1) / u and over all ranks P: q, k, v and the result."""
    ulysses_calls: float = 0.0
    ring_bytes: float = 0.0
    """Times (r - 1) / r and over the ranks of Ulysses: keys and values."""
    gather_bytes: float = 0.0
    """Times (P - 1) / P: of streams that are gathered."""
    gather_calls: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component in one phase of a request."""

    name: str
    phase: str
    calls: float
    """In a request of `Facts.steps` steps."""
    rows: int = 1
    """Samples in one call: pictures times the branches of guidance that are stacked."""
    alone: tuple[Operator, ...] = ()
    """Of one call, on one rank."""
    shared: tuple[Operator, ...] = ()
    """Of one call, on a rank of a sequence; empty where tokens cannot be shared."""
    exchanges: Exchanges = field(default_factory=Exchanges)
    refused: str = ""
    """Why tokens cannot be shared."""
    peak: Amount = NOTHING
    """Bytes at the most of activations on a rank of a sequence, exchanges included."""
    peak_alone: float = 0.0
    """The same on one rank."""
    heads: tuple[int, ...] = ()
    """Numbers of heads of the attentions that exchange, each once."""
    tokens: int = 0
    """Queries of the longest attention."""
    blocks: dict[str, int] = field(default_factory=dict[str, int])
    """Class of a repeated block -> how many of them a call runs."""

    def operators(self, degree: int) -> tuple[Operator, ...]:
        return self.shared if degree > 1 else self.alone

    def total(self, family: str, degree: int = 1, where: str | None = None) -> float:
        """Floating-point operations of a family in one call, on one rank of a sequence."""
        return sum(
            one.count * one.flops.on(degree)
            for one in self.operators(degree)
            if one.family == family and where in (None, one.where)
        )


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one model and one request."""

    model: str
    model_id: str
    dtype: str
    call: dict[str, Any]
    """Keywords of the request, as far as they are plain values."""
    steps: int
    pictures: int
    branches: int
    """Of guidance, in a step: stacked in the batch, or one call each."""
    stacked: bool
    """Whether they are in one batch."""
    weights: dict[str, int]
    """Component -> bytes."""
    parts: tuple[Part, ...]
    result_bytes: float = 0.0
    """Of what a denoiser gives for one branch of one picture."""
    tiles: int = 0
    """In which the pictures are decoded; 0: undivided."""
    vae: str = VAE_AUTO
    """How ranks are to share a decode, as in `Config`."""
    schema: int = SCHEMA

    def of(self, phase: str) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.phase == phase)

    @property
    def refused(self) -> str:
        """Why the tokens of this model cannot be shared; empty where they can."""
        return next((part.refused for part in self.of(DENOISE) if part.refused), "")

    @property
    def heads(self) -> int:
        """The fewest of an attention that exchanges."""
        return min((number for part in self.of(DENOISE) for number in part.heads), default=0)

    def shares(self, part: Part) -> bool:
        """Whether several ranks share a call of an autoencoder: in an engine's requests, large ones."""
        if self.vae in (VAE_REPLICATED, VAE_TILED, VAE_SHARDED):
            return self.vae != VAE_REPLICATED
        return self.tiles > 1 or not 0 < part.tokens < SMALL_DECODE

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Facts:
        parts = tuple(_part(dict(one)) for one in values["parts"])
        settings: dict[str, Any] = {**values, "parts": parts}
        return cls(**settings)


def _part(values: dict[str, Any]) -> Part:
    for name in ("alone", "shared"):
        values[name] = tuple(
            Operator(**one | {"flops": Amount(*one["flops"]), "bytes": Amount(*one["bytes"])}) for one in values[name]
        )
    values["exchanges"] = Exchanges(**values["exchanges"])
    values["peak"], values["heads"] = Amount(*values["peak"]), tuple(values["heads"])
    return Part(**values)
