"""`python -m tests.vae` measures every autoencoder class on 2, 3 and 4 ranks: docs/vae-support.md and .json.

With `--fixed-part` it measures a part, writes nothing, and fails where a cell is worse than the record.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.dist.ranks import close_pools, run_ranks
from tests.vae.cells import INPUTS, RANKS, Cell, cells, measured, rank_of, worst_of
from tests.vae.table import page
from tests.vae.zoo import CASES

PAGE = Path(__file__).parents[2] / "docs" / "vae-support.md"
RECORD = PAGE.with_suffix(".json")
TOGETHER = 24
"""Cells that ranks measure in one call."""


def measure(asked: list[Cell], num_ranks: int) -> dict[str, str]:
    """Each cell's text by its key: the worst of all ranks."""
    found: dict[str, str] = {}
    for start in range(0, len(asked), TOGETHER):
        part = asked[start : start + TOGETHER]
        by_rank = run_ranks(measured, num_ranks, part, timeout_s=900)
        texts = [worst_of(column) for column in zip(*by_rank, strict=True)]
        found |= {key(cell, num_ranks): text for cell, text in zip(part, texts, strict=True)}
        print(f"{num_ranks} ranks: {start + len(part)} of {len(asked)}, up to {part[-1][0]}", flush=True)
    return found


def key(cell: Cell, num_ranks: int) -> str:
    return "; ".join([*cell, f"{num_ranks} ranks"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fixed-part", action="store_true", help="a part, held against the record")
    parser.add_argument("--only", action="append", default=[], help="a case by name; may be repeated")
    asked = parser.parse_args()
    names = asked.only or [case.name for case in CASES]
    recorded: dict[str, str] = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if asked.fixed_part:
        found = measure([cell for cell in cells(names, ["batch 2"]) if cell[1] == "decode"], 2)
        worse = [name for name, text in found.items() if rank_of(text) > rank_of(recorded.get(name, "wrong"))]
        print("\n".join(f"{name}: {found[name]} (recorded: {recorded.get(name)})" for name in worse))
        print(f"{len(worse)} of {len(found)} cells are worse than {RECORD.name} says")
        close_pools()
        return min(len(worse), 1)
    for num_ranks in RANKS:
        recorded |= measure(cells(names, INPUTS), num_ranks)
        RECORD.write_text(json.dumps(recorded, indent=0, sort_keys=True) + "\n")
    close_pools()
    PAGE.write_text(page(recorded))
    wrong = [name for name, text in recorded.items() if text.startswith("wrong")]
    print("\n".join([f"{len(recorded)} cells, {len(wrong)} wrong", *wrong]))
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
