"""`python -m tests.guided` measures every pipeline in every layout and writes docs/guidance.md."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tests.dist.ranks import close_pools
from tests.guided.cells import LAYOUTS, Cell, cell_of
from tests.guided.collect import cases

PAGE = Path(__file__).parents[2] / "docs" / "guidance.md"
INTRODUCTION = """# Guidance and data parallel, pipeline by pipeline

Written by `make guidance`; do not edit. Whole pipelines of diffusers with tiny random weights (`tests/guided`), 3 or 4
steps with classifier-free guidance, against plain diffusers on the same weights and noise. A cell is *exact* when the
largest fp32 difference is at most 1e-5 of the largest value, in two requests; the number is that difference. `cfg 2`
has one prompt, `data 2` three (a single generator for all), `data 2 x cfg 2` two; fewer where a pipeline takes one.

*Kept* is in how many steps of the second request the branches ran side by side, of all in which a rank could have
waited for another: the rest had guidance switched off, or needed a branch before the other one was asked for.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="a pipeline by name; writes nothing")
    asked = parser.parse_args()
    table: dict[str, dict[str, Cell]] = {}
    for name in asked.only or cases():
        table[name] = {column: cell_of(name, column) for column in LAYOUTS}
        shown = [f"{column}: {text(cell)}" for column, cell in table[name].items()]
        print(f"{name}: " + "; ".join(shown), flush=True)
    close_pools()
    if not asked.only:
        PAGE.write_text(page(table))
    return min(1, sum(len(cell.faults) for row in table.values() for cell in row.values()))


def text(cell: Cell) -> str:
    if cell.faults:
        return f"**wrong** ({cell.faults[0]})"
    return f"refused ({cell.refused})" if cell.refused else f"exact, {cell.error:.0e}"


def page(table: dict[str, dict[str, Cell]]) -> str:
    green = sum(not any(cell.faults or cell.refused for cell in row.values()) for row in table.values())
    right = sum(not any(cell.faults for cell in row.values()) for row in table.values())
    exact = f"{green} of {len(table)} are exact in all {len(LAYOUTS)} layouts"
    lines = [INTRODUCTION, f"In all: {exact}; {right} are exact or refused with the reason.", ""]
    lines += ["| pipeline | " + " | ".join(LAYOUTS) + " | kept |", "|---" * (len(LAYOUTS) + 2) + "|"]
    notes: list[str] = []
    for name, row in table.items():
        cells: list[str] = []
        for cell in row.values():
            if cell.refused and not cell.faults:
                why = re.sub(r"^model='\w+': ", "", cell.refused)
                if why not in notes:
                    notes.append(why)
                cells.append(f"refused [{notes.index(why) + 1}]")
            else:
                cells.append(text(cell))
        first = row["cfg 2"]
        kept = f"{first.apart} of {first.apart + first.alone}" if first.apart + first.alone else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {kept} |")
    if notes:
        lines += ["", "## Refused", "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
