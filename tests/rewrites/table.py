"""`python -m tests.rewrites.table`: writes docs/qkv-support.md, who of the zoo can have one product for q, k and v."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from parafuse.engine.rewrites.qkv import FusedProjections
from parafuse.errors import ConfigError
from tests.models import error
from tests.zoo.collect import cases, inputs_of, outputs, randomized

PAGE = Path(__file__).parents[2] / "docs" / "qkv-support.md"
HEAD = """# Rewrite `qkv`: who can have it

Written by `python -m tests.rewrites.table` from the tiny configurations of `tests/zoo`, fp32 against plain diffusers.
*Attentions* that have one product for queries, keys and values (keys and values where text is attended to), of all that
have `fuse_projections`; *error*: largest difference over largest value.

| configuration | attentions | error | without, and why |
|---|---|---|---|
"""


def row(name: str) -> str:
    """A line of the table."""
    case = cases()[name]
    with torch.no_grad():
        model = randomized(case.build())
    rewrite = FusedProjections(model)
    want = outputs(model, inputs_of(case, case.sizes))
    shown = "-"
    try:
        rewrite.install()
    except ConfigError:
        pass
    else:
        pairs = zip(outputs(model, inputs_of(case, case.sizes)), want, strict=True)
        worst = max(error(got, plain) for got, plain in pairs)
        shown = "0" if worst == 0 else f"{worst:.0e}"
    reasons = "; ".join(f"{why} ({count})" for why, count in sorted(rewrite.why_not.items()))
    if not rewrite.found:
        reasons = "no attention with separate projections that diffusers could join"
    return f"| {name} | {rewrite.num_on} of {len(rewrite.found)} | {shown} | {reasons.replace('|', '/')} |\n"


def write(names: Iterable[str]) -> None:
    PAGE.write_text(HEAD + "".join(map(row, names)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(cases())
