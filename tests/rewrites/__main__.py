"""`python -m tests.rewrites` puts the rewrite `text` on every class of the zoo that takes a mask of its text, and
writes the table of docs/rewrites.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import parafuse
from parafuse.engine.rewrites.text import TrimmedText, takes_a_mask
from parafuse.engine.verify import relative_error
from tests.models import Sizes
from tests.rewrites.test_text import Masks
from tests.zoo.case import Case
from tests.zoo.collect import cases, inputs_of, outputs, randomized

PAGE = Path(__file__).parents[2] / "docs" / "rewrites.md"
TABLE = re.compile(r"(<!-- text: made by python -m tests\.rewrites -->\n).*?(<!-- end -->)", re.S)
TOKENS, VALID = 40, 14
NO_TEXT = ("img_mask", "condition_mask", "padding_mask")
"""Masks of other things."""


def masked(case: Case, batch: int, ragged: bool) -> dict[str, Any] | None:
    """A call with 14 of 40 text tokens (ragged: 2 in the second sample); None where it takes no such mask."""
    values = inputs_of(case, Sizes(grid=case.sizes.grid, text=TOKENS, batch=batch))
    found = False
    for name, x in values.items():
        is_mask = "mask" in name and name not in NO_TEXT and isinstance(x, Tensor) and x.ndim == 2 and len(x) == batch
        if is_mask and x.shape[1] > 2:
            new, found = torch.ones_like(x), True
            new[:, min(VALID, x.shape[1] - 2) : min(TOKENS, x.shape[1])] = 0
            if ragged:
                new[1, 2 : min(TOKENS, x.shape[1])] = 0
            values[name] = new
    return values if found else None


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """The same with no padding: what is found there must not stand for calls with some."""
    return {
        name: torch.ones_like(x) if "mask" in name and name not in NO_TEXT and isinstance(x, Tensor) else x
        for name, x in values.items()
    }


def told(case: Case, ragged: bool) -> tuple[str, float] | None:
    """(what it did, largest error of four calls, the first of which has no padding)."""
    values = masked(case, 2, ragged)
    if values is None:
        return None
    model = randomized(case.build())
    want, full = outputs(model, values), outputs(model, filled(values))
    with parafuse.apply(model, parafuse.Config(rewrites="text")) as handle:
        rewrite: Any = next(x for x in handle._on[0][1].rewrites if isinstance(x, TrimmedText))
        error = relative_error(outputs(model, filled(values)), full)
        rewrite.why.clear()
        error = max(error, *(relative_error(outputs(model, values), want) for _ in range(2)))
        rewrite.seen.clear()
        with Masks() as seen:
            error = max(error, relative_error(outputs(model, values), want))
    if rewrite.seen["left whole"]:
        return f"whole: {next(iter(rewrite.why), 'nothing to cut')}", error
    return f"cut; {seen.masked} of {seen.calls} attentions masked", error


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "| class | all samples as long | samples of several lengths | largest error |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    without: list[str] = []
    for name, case in cases().items():
        if not takes_a_mask(case.build()):
            continue
        cells = [told(case, ragged) for ragged in (False, True)]
        if cells[0] is None or cells[1] is None:
            without.append(name)
            continue
        lines.append(f"| {name} | {cells[0][0]} | {cells[1][0]} | {max(cells[0][1], cells[1][1]):.0e} |")
        print(lines[-1], flush=True)
    lines += ["", f"Called without a mask of (samples, tokens): {', '.join(without)}."]
    page, count = TABLE.subn(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], PAGE.read_text())
    if not count:
        raise SystemExit(f"{PAGE}: has no place for the table")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
