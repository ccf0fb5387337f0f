"""The errors that parafuse raises. Messages name the field, the value, what is allowed, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ParafuseError(Exception):
    """Base of all errors of this package. The command line prints `str(error)` and ends with `exit_code`."""

    exit_code = 1


class ConfigError(ParafuseError, ValueError):
    """The request or configuration is wrong; found before any weight is loaded or collective entered."""

    exit_code = 2


class ModelError(ConfigError):
    """The model cannot be found, read, or is not of a kind that parafuse runs."""


class UnsupportedError(ParafuseError):
    """A block cannot be split as asked; the message says which operator is in the way."""


class MemoryLimitError(ParafuseError):
    """The request does not fit into memory."""


class MismatchError(ParafuseError):
    """Several ranks gave something else than one."""


class RankError(ParafuseError):
    """Another rank failed or stalled."""


class RankMismatchError(RankError):
    """The ranks were started with different arguments; found before anything was loaded or exchanged."""

    exit_code = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a device's, or the host's, whose allocator has no error of its own."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name nearest to `name`, or '' where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.65)
    return f"; did you mean {close[0]!r}?" if close else ""


def reject_unknown(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError for the first of `names` that is not in `known`, with the nearest known name, or with all."""
    allowed = sorted(str(name) for name in known)
    for name in names:
        if name not in allowed:
            hint = nearest(name, allowed) or f"; allowed: {', '.join(allowed)}."
            raise ConfigError(f"{where}: unknown key {name!r}{hint}")
