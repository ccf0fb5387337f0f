"""Which home a map gives to a path: the longest one that it begins with decides. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

Homes = dict[str, str]
"""Path of a component or of a module of it -> "0", "1", ..., "cpu" or "disk". The longest path decides."""


def home_in(homes: Mapping[str, str], path: str) -> str | None:
    """Of what stands at a path; None where the map leaves it out."""
    found = next((homes[above] for above in with_above(path) if above in homes), None)
    return homes.get("") if found is None else found


def with_above(path: str) -> list[str]:
    """The path and all that it is in, longest first."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
