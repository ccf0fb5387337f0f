"""Where text encoders run, and what is kept of what they gave: frozen, torch-free. Lossless, bit for bit."""

# Users pass what they like, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from parafuse.spelled import Spelled, chosen


@dataclass(frozen=True)
class Encoding(Spelled):
    """What both have in common."""

    what: ClassVar[str] = "text_encoders"
    one_rank: ClassVar[bool] = False

    kept: int = dataclasses.field(default=0, kw_only=True)
    """Results that each text encoder keeps, in the host's memory: those of its last calls with different texts. A call
    that repeats one gets a copy of it."""

    def __post_init__(self) -> None:
        self._check("kept", least=0)

    @property
    def acts(self) -> bool:
        """Whether anything is other than without it."""
        return self.one_rank or self.kept > 0


@dataclass(frozen=True)
class Everywhere(Encoding):
    """Every rank encodes the prompt for itself."""

    method: ClassVar[str] = "everywhere"


@dataclass(frozen=True)
class OneRank(Encoding):
    """Each text encoder runs on one rank, which sends what it gives to the others; several are spread over ranks."""

    method: ClassVar[str] = "one-rank"
    one_rank: ClassVar[bool] = True


METHODS: dict[str, type[Encoding]] = {one.method: one for one in (Everywhere, OneRank)}


def encoding_of(value: Any) -> Encoding:
    """What a text names, or the value itself. Raises ConfigError with what is allowed."""
    return chosen("text_encoders", value, METHODS, "a text such as 'one-rank:kept=32', or one of its methods")
