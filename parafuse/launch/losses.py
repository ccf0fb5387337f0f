"""What lossy options cost on the built-in model, as the help quotes it: from measured records. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import Field
from functools import cache
from pathlib import Path
from typing import Any

from parafuse.config import LOSSY

FILE = Path(__file__).parents[1] / "models" / "emoji" / "losses.json"


@cache
def measured() -> dict[str, dict[str, Any]]:
    """`option=value` -> its figures, and the record that they are from."""
    return json.loads(FILE.read_text())


def lossy_values(field: Field[Any]) -> tuple[str, ...]:
    """The values of a configuration's field that are lossy."""
    return tuple(field.metadata.get(LOSSY, ()))


def said(field: Field[Any]) -> str:
    """The sentence for the help of a field; empty for one that loses nothing, or where nothing is measured yet."""
    found = {value: measured().get(f"{field.name}={value}") for value in lossy_values(field)}
    parts = [_figures(value, figures) for value, figures in found.items() if figures]
    if not parts:
        return ""
    return (
        f"Lossy. On emoji, against the exact run: {'; '.join(parts)}. emoji is a regression anchor, not a promise for "
        "another model."
    )


def _figures(value: str, figures: dict[str, Any]) -> str:
    return (
        f"{value} PSNR {figures['psnr_db']:.0f} dB (worst {figures['worst_psnr_db']:.0f}), "
        f"{figures['right']} of {figures['prompts']} pictures of the right thing (exact: {figures['right_exact']})"
    )
