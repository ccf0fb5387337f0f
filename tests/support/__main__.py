"""`python -m tests.support` measures all cells and writes docs/support.json and docs/support.md. With `--fixed-part` it
measures a part, writes nothing, and fails where a cell is worse than the record.
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.dist.ranks import close_pools
from tests.support.cells import LAYOUTS, Cell, cell_of
from tests.support.compiled import WITH_INDUCTOR, Compiled, compiled_of
from tests.support.record import Record, read_record, write_record
from tests.support.table import write_table
from tests.zoo.collect import cases

FIXED_PART = ("ring 3", "ring 2 x Ulysses 2")


def worse(found: Cell, recorded: Cell) -> list[str]:
    """What was right by the record and is not any more."""
    if recorded.faults:
        return []  # the page says so
    lost = [f"refused now ({found.refused[what]})" for what in found.refused if what in recorded.errors]
    return found.faults + lost


def worse_compiled(found: Compiled, recorded: Compiled) -> list[str]:
    if recorded.faults:
        return []
    lost = [f"does not compile now ({found.refused})"] if found.refused and not recorded.refused else []
    more = [f"{found.graphs} graphs, {recorded.graphs} before"] if found.graphs > recorded.graphs else []
    return found.faults + lost + more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fixed-part", action="store_true", help="a part, held against the record")
    parser.add_argument("--only", action="append", default=[], help="a case by name; may be repeated")
    asked = parser.parse_args()
    os.environ["PARAFUSE_CACHE"] = ""  # every block is examined
    record, faults = read_record(), 0
    for name in asked.only or cases():
        wrong = hold_against(record, name) if asked.fixed_part else measure_all(record, name)
        for line in wrong:
            print(f"{name}, {line}", flush=True)
        faults += len(wrong)
        print(f"{name}: {'as recorded' if not wrong else 'not right'}", flush=True)
    close_pools()
    if asked.fixed_part:
        print(f"{faults} things are worse than docs/support.json says")
        return min(faults, 1)
    write_table(record)
    return 0


def hold_against(record: Record, name: str) -> list[str]:
    """What is worse in the fixed part of a case."""
    wrong: list[str] = []
    row = record.cells.get(name, {})
    for column in FIXED_PART:
        cell = cell_of(name, column, bf16=False)
        wrong += [f"{column}: {fault}" for fault in (worse(cell, row[column]) if column in row else cell.faults)]
    if name in WITH_INDUCTOR:  # a part of those that are compiled; with a backend that is quick
        known = record.compiled.get(name, {}).get("aot_eager", Compiled(graphs=99))
        wrong += [f"compiled: {fault}" for fault in worse_compiled(compiled_of(name), known)]
    return wrong


def measure_all(record: Record, name: str) -> list[str]:
    """Puts a case into the record; what is not right in it."""
    cells = record.cells[name] = {column: cell_of(name, column) for column in LAYOUTS}
    wrong = [f"{column}: {fault}" for column, cell in cells.items() for fault in cell.faults]
    if ":" not in name:  # variants compile as their class does
        backends = ["aot_eager", *(["inductor"] if name in WITH_INDUCTOR else [])]
        compiled = record.compiled[name] = {backend: compiled_of(name, backend=backend) for backend in backends}
        wrong += [f"{backend}: {fault}" for backend, found in compiled.items() for fault in found.faults]
    write_record(record)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
