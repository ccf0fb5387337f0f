"""docs/options-support.md and its record."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from tests.options.cells import OPTIONS, PIPELINES, SETTINGS, Cell

DOCS = Path(__file__).parents[2] / "docs"
RECORD, PAGE = DOCS / "options-support.json", DOCS / "options-support.md"
INTRODUCTION = """# Quantization, compile, rewrites, attention and offload beside everything else

Written by `make options`; do not edit. Tiny pipelines with random weights and guidance, fp32, CPU, two prompts, four
steps, twice in a row. A number is the largest difference of the latents over the largest value: of an option that
loses nothing (`compile`, `rewrites`, `attention math`, `offload`, which is to a disk here) against the same setting
without it on one rank, of a quantized model against the same quantized on one rank, and so with sparse attention and
caches. At most 1e-5 is exact. Where layers are given in 8 bits, a difference of 4e-7 can flip a rounding: there at most
what quantizing itself changes is allowed, and the number is in italics. A rewrite must say in `applied` that it acted;
*idle*: it has nothing to do in this pipeline, and the note is what it says.

"""

Rows = dict[str, dict[str, dict[str, Cell]]]
"""Pipeline -> option -> setting -> cell."""


def read_record() -> Rows:
    if not RECORD.exists():
        return {}
    found = json.loads(RECORD.read_text())
    return {
        pipeline: {option: {name: Cell(**cell) for name, cell in row.items()} for option, row in rows.items()}
        for pipeline, rows in found.items()
    }


def write_record(rows: Rows) -> None:
    plain = {
        p: {o: {s: asdict(cell) for s, cell in row.items()} for o, row in each.items()} for p, each in rows.items()
    }
    RECORD.write_text(json.dumps(plain, indent=1) + "\n")
    PAGE.write_text(page(rows))


def page(rows: Rows) -> str:
    notes: list[str] = []
    text = INTRODUCTION
    for pipeline in PIPELINES:
        if pipeline not in rows:
            continue
        text += f"## {pipeline}\n\n| | {' | '.join(SETTINGS)} |\n|---{'|---' * len(SETTINGS)}|\n"
        for option in OPTIONS:
            row = rows[pipeline].get(option, {})
            cells = [_shown(row[name], notes) if name in row else "" for name in SETTINGS]
            text += f"| {option} | {' | '.join(cells)} |\n"
        text += "\n"
    return text + "".join(f"{number}. {note}\n" for number, note in enumerate(notes, 1))


def _shown(cell: Cell, notes: list[str]) -> str:
    if cell.refused or cell.failed:
        note = cell.refused or f"FAILED: {cell.failed}"
        return f"{'refused' if cell.refused else 'FAILED'} ({_number(note, notes)})"
    if cell.fault:
        return f"**{cell.fault}**"
    error = f"{cell.error:.0e}" if cell.error else "0"
    error = error if cell.error is None or cell.error <= 1e-5 else f"*{error}*"
    return f"{error}, idle ({_number(cell.idle, notes)})" if cell.idle else error


def _number(note: str, notes: list[str]) -> int:
    if note not in notes:
        notes.append(note)
    return notes.index(note) + 1
