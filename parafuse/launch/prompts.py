"""Prompts to try a model with: one's own file, or the model's own set. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from parafuse.errors import ConfigError

if TYPE_CHECKING:
    from parafuse.engine.source import ModelSource

OWN_PROMPTS = "prompts.txt"
"""In a model's folder: its prompts for comparing pictures."""
GENERAL = Path(__file__).with_name("prompts.txt")
"""For models that bring none."""


def prompts_of(source: ModelSource, prompt: str | None, file: str | None, first: int | None) -> tuple[str, ...]:
    """The one prompt that was given, or the `first` lines of a file: the given one, the model's own, or a general one.

    Raises ConfigError where there is none."""
    if prompt is not None:
        return (prompt,)
    own = Path(source.path) / OWN_PROMPTS
    path = Path(file) if file else own if own.is_file() else GENERAL
    if not path.is_file():
        raise ConfigError(f"--prompts {file!r}: does not exist; give a file with a prompt in each line, or one prompt.")
    found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not found:
        raise ConfigError(f"--prompts {str(path)!r}: has no line with a prompt.")
    return tuple(found[:first])


def first_prompts(source: ModelSource, number: int) -> tuple[str, ...]:
    """So many of the model's own prompts, or of the general ones. Raises ConfigError where there are fewer."""
    if not number:
        return ()
    found = prompts_of(source, None, None, number)
    if len(found) < number:
        raise ConfigError(f"prompts={number}: {source.name!r} has {len(found)} prompts; ask for no more.")
    return found
