"""`python -m tests.caches` puts a first-block cache on every transformer class in several layouts, the other methods on
a few pipelines, and writes docs/cache-support.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping

from tests.caches.cells import COMPILED, LAYOUTS, Cell, NeverSkippedError, cell_of, on_one_rank, parting_cache
from tests.caches.methods import TEXTS, cells_of
from tests.caches.table import read_record, write_record
from tests.dist.ranks import close_pools
from tests.zoo.collect import cases

COLUMNS = (*LAYOUTS, COMPILED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", default=[], help="a transformer by name; may be repeated")
    parser.add_argument("--method", action="append", default=[], help="another method by name; may be repeated")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PARAFUSE_CACHE"] = folder  # how blocks are split is found once, and proven in the other layouts
        return measure(asked)


def measure(asked: argparse.Namespace) -> int:
    record, faults = read_record(), 0
    some = bool(asked.only or asked.method)
    for name in asked.only if some else cases():
        row = record.first_block[name] = row_of(name)
        faults += _said(name, row)
        write_record(record)
    for method in asked.method if some else TEXTS:
        found = record.methods[method] = cells_of(method)
        faults += sum(_said(f"{method} on {name}", row) for name, row in found.items())
        write_record(record)
    close_pools()
    print(f"{faults} cells are not right", flush=True)
    return min(faults, 1)


def row_of(name: str) -> dict[str, Cell]:
    """By layout: a class with a first-block cache whose threshold parts its steps."""
    try:
        cache = parting_cache(name)
    except NeverSkippedError as why:
        return {column: Cell(refused=str(why)) for column in COLUMNS}
    alone = on_one_rank(name, cache)
    return {column: cell_of(name, column, cache, alone) for column in COLUMNS}


def _said(name: str, row: Mapping[str, Cell]) -> int:
    wrong = [f"{column}: {fault}" for column, cell in row.items() for fault in cell.faults]
    print(f"{name}: {'; '.join(wrong) or 'right'}", flush=True)
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
