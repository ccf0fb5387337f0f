"""`python -m tests.sparse` puts sparse attention on every transformer class: docs/sparse-support.md (ten minutes)."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.dist.ranks import close_pools, run_ranks
from tests.sparse.zoo import METHOD, Ran, error, run
from tests.zoo.collect import cases

PAGE = Path(__file__).parents[2] / "docs" / "sparse-support.md"
EXACT, ROUNDED = 1e-5, 1e-3
"""The second where a model rounds queries and keys to bf16 whatever its weights are, so that another order of sums may
round one of them to the other side."""
HEAD = f"""# Sparse attention, class by class

Made by `python -m tests.sparse`: tiny configurations with random weights, `{METHOD}`. The grid is found out from one
call. *Loss*: largest difference from the plain model over its largest value; random weights attend evenly, so it is a
worst case. *Two ranks*: the same against sparse attention on one rank, with Ulysses 2 and with ring 2; exact is at most
1e-5, or 1e-3 where the model itself rounds queries and keys to bf16.
*Density*: pairs attended over all pairs, in sparse calls.

| class | grid | sparse calls | density | loss | Ulysses 2 | ring 2 |
|---|---|---:|---:|---:|---|---|
"""


def row(name: str) -> tuple[str, str]:
    """(line, fault)."""
    one = run(name, {})
    if one.refused:
        return f"| {name} | refused | | | | | |", ""
    plain = run(name, {}, "")
    cells = [_cell(one, run_ranks(run, 2, name, layout)) for layout in ({"ulysses": 2}, {"ring": 2})]
    density = "" if one.density is None else f"{one.density:.2f}"
    loss = f"{error(one.outputs, plain.outputs):.2f}"
    fault = "; ".join(cell for cell in cells if cell not in ("exact", "refused"))
    return f"| {name} | {one.grid} | {one.sparse_calls} | {density} | {loss} | {' | '.join(cells)} |", fault


def _cell(one: Ran, ranks: list[Ran]) -> str:
    if any(rank.refused for rank in ranks):
        return "refused"
    worst = max(error(rank.outputs, one.outputs) for rank in ranks)
    return "exact" if worst <= (ROUNDED if one.rounds else EXACT) else f"{worst:.1e}"


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    lines: list[str] = []
    faults: list[str] = []
    for name in cases():
        if wanted not in name:
            continue
        line, fault = row(name)
        print(line, flush=True)
        lines.append(line)
        faults += [f"{name}: {fault}"] if fault else []
    close_pools()
    if not wanted:
        PAGE.write_text(HEAD + "\n".join(lines) + "\n")
    print("\n".join(["faults:", *faults]) if faults else "no faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
