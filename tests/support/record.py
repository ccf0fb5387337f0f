"""docs/support.json: what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

import parafuse
from tests.support.cells import Cell
from tests.support.compiled import Compiled

RECORD = Path(__file__).parents[2] / "docs" / "support.json"


@dataclass
class Record:
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict[str, dict[str, Cell]])
    """Case -> layout -> cell."""
    compiled: dict[str, dict[str, Compiled]] = field(default_factory=dict[str, dict[str, Compiled]])
    """Case -> backend of torch.compile -> what it gave."""


def read_record() -> Record:
    if not RECORD.exists():
        return Record()
    values: dict[str, Any] = json.loads(RECORD.read_text())
    return Record(
        {name: {column: Cell(**cell) for column, cell in row.items()} for name, row in values["cells"].items()},
        {name: {key: Compiled(**found) for key, found in row.items()} for name, row in values["compiled"].items()},
    )


def write_record(record: Record) -> None:
    """One line for each cell."""
    versions = {"parafuse": parafuse.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    parts = f'"cells": {_lines(record.cells)},\n"compiled": {_lines(record.compiled)}'
    RECORD.write_text(f'{{"versions": {json.dumps(versions)},\n{parts}}}\n')


def _lines(rows: Mapping[str, Mapping[str, Cell | Compiled]]) -> str:
    text = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(column)}: {json.dumps(_slim(cell))}" for column, cell in row.items())
        + "\n}"
        for name, row in sorted(rows.items())
    ]
    return "{\n" + ",\n".join(text) + "\n}"


def _slim(cell: Cell | Compiled) -> dict[str, Any]:
    """What is not as in an empty one, with two digits."""
    empty = vars(type(cell)())
    return {name: _short(value) for name, value in vars(cell).items() if value != empty[name]}


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return float(f"{value:.1e}") if isinstance(value, float) else value
