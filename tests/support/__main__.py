"""`python -m tests.support` measures all cells and writes docs/support.json and docs/support.md."""

from __future__ import annotations

import argparse
import os
import sys

from tests.dist.ranks import close_pools
from tests.support.cells import LAYOUTS, cell_of
from tests.support.compiled import WITH_INDUCTOR, compiled_of
from tests.support.record import Record, read_record, write_record
from tests.support.table import write_table
from tests.zoo.collect import cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", default=[], help="a case by name; may be repeated")
    asked = parser.parse_args()
    os.environ["PARAFUSE_CACHE"] = ""  # every block is examined
    record = read_record()
    for name in asked.only or cases():
        wrong = measure_all(record, name)
        for line in wrong:
            print(f"{name}, {line}", flush=True)
        print(f"{name}: {'right' if not wrong else 'not right'}", flush=True)
    close_pools()
    write_table(record)
    return 0


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
