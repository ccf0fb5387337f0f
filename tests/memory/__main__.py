"""`python -m tests.memory`: writes the table of docs/notes/memory.md, what was predicted beside what was measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.dist.ranks import close_pools, run_ranks
from tests.memory.cases import CASES, Case
from tests.memory.requests import measured, predicted

PAGE = Path(__file__).parents[2] / "docs" / "notes" / "memory.md"
BEGIN, END = "<!-- memory:begin -->", "<!-- memory:end -->"
HEAD = """| request | phase | weights | predicted | measured | beside the weights | in all |
|---|---|---|---|---|---|---|
"""


def rows(case: Case) -> str:
    """Lines of one case: MB beside the weights that stay, of the rank that took the most, and how far off they are."""
    call = {"num_inference_steps": 2, **case.call}
    prediction = predicted(case.model, case.options, call, case.ranks)
    stays = max(0, prediction.staying)
    found = run_ranks(measured, case.ranks, case.model, case.options, call)
    lines = ""
    for request in ("first", "later") if case.ranks > 1 else ("first",):
        for phase, one in getattr(prediction, request).items():
            most, beside = max(figures[request][phase] for figures, _ in found), one.nbytes - stays
            lines += (
                f"| {case.name} | {phase}, {request} | {stays / 1e6:.1f} | {beside / 1e6:.3f} | {most / 1e6:.3f} "
                f"| {beside / most - 1:+.1%} | {one.nbytes / (most + stays) - 1:+.2%} |\n"
            )
    return lines


def main() -> None:
    os.environ["PARAFUSE_CACHE"] = ""  # blocks are examined anew
    table = HEAD
    try:
        for case in CASES:
            lines = rows(case)
            table += lines
            print(lines, end="", file=sys.stderr, flush=True)
            write(table)  # a table that was broken off has what was measured
    finally:
        close_pools()


def write(table: str) -> None:
    """Puts it into the page, between the marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
