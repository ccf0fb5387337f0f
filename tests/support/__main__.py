"""`python -m tests.support` measures all cells and writes docs/support.json and docs/support.md. With `--fixed-part` it
measures a part, writes nothing, and fails where a cell is worse than the record.
"""

from __future__ import annotations

import argparse
import sys

from tests.dist.ranks import close_pools
from tests.support.cells import LAYOUTS, Cell, cell_of
from tests.support.record import RECORD, read_record, write_record
from tests.support.table import write_table
from tests.zoo.collect import cases

FIXED_PART = ("Ulysses 2", "ring 3", "ring 2 x Ulysses 2")


def worse(found: Cell, recorded: Cell) -> list[str]:
    """What was right by the record and is not any more."""
    if recorded.faults:
        return []  # the page says so
    lost = [f"refused now ({found.refused[what]})" for what in found.refused if what in recorded.errors]
    return found.faults + lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fixed-part", action="store_true", help="a part, held against the record")
    parser.add_argument("--only", action="append", default=[], help="a case by name; may be repeated")
    asked = parser.parse_args()
    record = read_record() if RECORD.exists() else {}
    faults = 0
    for name in asked.only or cases():
        row, measured = record.setdefault(name, {}), dict[str, Cell]()
        for column in FIXED_PART if asked.fixed_part else LAYOUTS:
            cell = measured[column] = cell_of(name, column, bf16=not asked.fixed_part)
            wrong = worse(cell, row[column]) if asked.fixed_part and column in row else cell.faults
            for line in wrong:
                print(f"{name}, {column}: {line}", flush=True)
            faults += bool(wrong)
            if not asked.fixed_part:
                row[column] = cell
        print(f"{name}: {summary(measured)}", flush=True)
        if not asked.fixed_part:
            write_record(record)
    close_pools()
    if asked.fixed_part:
        print(f"{faults} cells are worse than docs/support.json says")
        return min(faults, 1)
    write_table(record)
    return 0


def summary(row: dict[str, Cell]) -> str:
    exact = sum(cell.is_exact for cell in row.values())
    return f"{exact} of {len(row)} layouts exact"


if __name__ == "__main__":
    sys.exit(main())
