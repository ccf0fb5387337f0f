"""docs/support.json: the cells as they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

import parafuse
from tests.support.cells import Cell

RECORD = Path(__file__).parents[2] / "docs" / "support.json"
Record = dict[str, dict[str, Cell]]
"""Case -> layout -> cell."""


def read_record() -> Record:
    values: dict[str, Any] = json.loads(RECORD.read_text())["cells"]
    return {name: {column: Cell(**cell) for column, cell in row.items()} for name, row in values.items()}


def write_record(record: Record) -> None:
    """One line for each cell."""
    versions = {"parafuse": parafuse.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    rows = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(column)}: {json.dumps(_slim(cell))}" for column, cell in row.items())
        + "\n}"
        for name, row in sorted(record.items())
    ]
    RECORD.write_text(f'{{"versions": {json.dumps(versions)}, "cells": {{\n' + ",\n".join(rows) + "\n}}\n")


def _slim(cell: Cell) -> dict[str, Any]:
    """What is not empty, with two digits."""
    errors = {length: float(f"{value:.1e}") for length, value in cell.errors.items()}
    values = vars(cell) | {"errors": errors, "bf16": cell.bf16 and round(cell.bf16, 2)}
    return {name: value for name, value in values.items() if value not in (None, {}, [], "")}
