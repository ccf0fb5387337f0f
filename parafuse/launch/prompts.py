"""Prompts to try a model with: one's own file, or the model's own set. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from parafuse.errors import ConfigError

if TYPE_CHECKING:
    from parafuse.engine.source import ModelSource

OWN_PROMPTS = "prompts.txt"
"""In a model's folder: its prompts for comparing pictures."""


def prompts_of(source: ModelSource, prompt: str | None, file: str | None, first: int | None) -> tuple[str, ...]:
    """The one prompt that was given, or the `first` of a file with one in each line; without one, of the model's own.

    Raises ConfigError where there is none."""
    if prompt is not None:
        return (prompt,)
    path = Path(file) if file else Path(source.path) / OWN_PROMPTS
    if not path.is_file():
        what = f"--prompts {file!r}: does not exist" if file else f"{source.name}: has no prompts.txt"
        raise ConfigError(f"{what}; give --prompts FILE with a prompt in each line, or one prompt.")
    found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not found:
        raise ConfigError(f"--prompts {str(path)!r}: has no line with a prompt.")
    return tuple(found[:first])
