"""What a denoiser's attention is computed by: frozen, torch-free. How fast each backend was on a machine is data.

`parafuse tune attention` times the backends on calls of the shapes that it is given, and keeps what it found; with
`attention="auto"` the fastest one that changes nothing but the order of sums is then used, and a plan says so.
"""

# Users pass what they like, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from parafuse.errors import ConfigError, nearest, reject_unknown

AUTO, TORCH, TIMED = "auto", "torch", "timed"
EXACT = (
    TORCH, "cpu-flash", "flash", "cudnn", "efficient", "flash-attn-2", "flash-attn-3", "flash-attn-4", "math",
)  # fmt: skip
"""Backends that change nothing but the order of sums."""
LOSSY_BACKENDS = ("sage", "fp8", "fp8-reference")
"""Backends that compute products in 8 bits."""
NEAR = 4.0
"""A timing says something about calls of up to so many times more, or fewer, pairs of tokens."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """How long each backend took for calls of one shape."""

    dtype: str
    head_size: int
    mask: str
    """"" for none, "bool" or "bias"."""
    is_causal: bool
    with_lse: bool
    """Whether the log-sum-exp was asked for, as a ring does."""
    shape: str = field(default="", compare=False)
    """(batch) x (heads) x (rows) x (keys) x (head size)."""
    pairs: int = field(default=0, compare=False)
    """Rows times keys."""
    seconds: dict[str, float] = field(default_factory=dict[str, float], compare=False)
    """Backend -> median."""


@dataclass(frozen=True)
class Timings:
    """All that was timed on one kind of device, under one set of versions."""

    device: str
    rows: tuple[Row, ...] = ()

    def nearest(self, like: Row, pairs: int) -> Row | None:
        """The row of such calls whose number of pairs is nearest; None where none is near."""
        same = [row for row in self.rows if row == like and row.pairs and pairs]
        found = min(same, key=lambda row: abs(math.log(row.pairs / pairs)), default=None)
        return found if found and 1 / NEAR <= found.pairs / pairs <= NEAR else None

    def with_row(self, new: Row) -> Timings:
        """The same, with what was timed anew in the place of what was known of the same shape."""
        kept = tuple(row for row in self.rows if (row, row.shape) != (new, new.shape))
        return Timings(self.device, (*kept, new))

    def to_dict(self) -> dict[str, Any]:
        return {"device": self.device, "rows": [dataclasses.asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Timings:
        """Raises ConfigError, beginning with `where`, for what is none."""
        try:
            reject_unknown(where, values, ("device", "rows"))
            return cls(str(values["device"]), tuple(map(_row, values["rows"])))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigError(f"{where}: holds no timings of attention ({error}); time it anew.") from error


def _row(values: dict[str, Any]) -> Row:
    seconds: dict[str, Any] = values["seconds"]
    return Row(**{**values, "seconds": {str(name): float(value) for name, value in seconds.items()}})  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Attention:
    """The backend that is asked for, and what is known of their speed."""

    backend: str = AUTO
    """auto: the fastest of those that were timed here on such calls, else torch's own choice."""
    timings: Timings | None = None
    """For `timed`: what an `auto` was resolved with."""

    def __post_init__(self) -> None:
        names = (AUTO, *EXACT, *LOSSY_BACKENDS)
        if not isinstance(self.backend, str) or self.backend not in (*names, TIMED):
            hint = nearest(self.backend, names) if isinstance(self.backend, str) else ""
            raise ConfigError(f"attention={self.backend!r}: must be one of {', '.join(names)}{hint or '.'}")
        if (self.backend == TIMED) != (self.timings is not None):
            raise ConfigError("attention='timed': goes with timings; ask for 'auto', which looks for some.")

    def __str__(self) -> str:
        return self.backend

    @property
    def acts(self) -> bool:
        """Whether a model's own calls of torch would not do the same."""
        return self.backend not in (AUTO, TORCH)


def attention_of(value: Any) -> Attention:
    """What a text names, or the value itself. Raises ConfigError with what is allowed."""
    return value if isinstance(value, Attention) else Attention(value)
