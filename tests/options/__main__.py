"""`python -m tests.options` tries every option beside everything else and writes docs/options-support.md."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

from tests.dist.ranks import close_pools
from tests.options.cells import OPTIONS, PIPELINES, SETTINGS, cell_of
from tests.options.table import read_record, write_record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pipeline", action="append", default=[], help="by name; may be repeated")
    parser.add_argument("--option", action="append", default=[], help="by name; may be repeated")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PARAFUSE_CACHE"] = folder
        return measure(asked)


def measure(asked: argparse.Namespace) -> int:
    rows, faults = read_record(), 0
    for pipeline in asked.pipeline or PIPELINES:
        for option in asked.option or OPTIONS:
            row = rows.setdefault(pipeline, {})[option] = {
                name: cell_of(pipeline, OPTIONS[option], setting) for name, setting in SETTINGS.items()
            }
            wrong = [f"{name}: {cell.fault}" for name, cell in row.items() if cell.fault]
            refused = [f"{name}: refused" for name, cell in row.items() if cell.refused]
            faults += len(wrong)
            print(f"{pipeline}, {option}: {'; '.join(wrong + refused) or 'right'}", flush=True)
            write_record(rows)
    close_pools()
    print(f"{faults} cells are not right", flush=True)
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
