"""The table of docs/drop-in.md, from what the scripts found."""

from __future__ import annotations

from pathlib import Path

from parafuse.engine.loading_keywords import FROM_PRETRAINED, FROM_SINGLE_FILE
from tests.drop_in.pipelines import BASE, CLASSES, ON_TWO
from tests.drop_in.rows import AS_DIFFUSERS, REFUSED, WORKS, Row

PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"
BEGIN, END = "<!-- members -->\n", "<!-- /members -->\n"
KEYWORDS = "<!-- keywords -->\n", "<!-- /keywords -->\n"
Found = dict[str, dict[int, list[Row]]]
"""Class -> number of ranks -> rows of rank 0."""


def table(found: Found) -> str:
    """Everything between the marks of the page."""
    counts = {ranks: [row.state for name in found for row in found[name][ranks]] for ranks in (1, 2)}
    lines = [
        f"On {'one rank' if ranks == 1 else 'two ranks'}: of {len(states)} members, {states.count(WORKS)} work, "
        f"{states.count(REFUSED)} are refused, {states.count(AS_DIFFUSERS)} fail as they do in diffusers here."
        for ranks, states in counts.items()
    ]
    parts = ["\n".join(lines)]
    for name in CLASSES:
        parallel = ON_TWO[name]
        layout = f"`cfg={parallel.cfg}`" if parallel.cfg != 1 else f"`ulysses={parallel.ulysses}`"
        also = "" if name == BASE else ", beside those"
        rows = [
            f"| `{one.member}` | {_cell(one)} | {_cell(two)} |"
            for one, two in zip(found[name][1], found[name][2], strict=True)
        ]
        head = f"### `{name}`{also}\n\n| member | 1 rank | 2 ranks, {layout} |\n|---|---|---|"
        parts.append("\n".join([head, *sorted(rows)]))
    return "\n\n".join(parts) + "\n"


def keywords() -> str:
    """The table of what `Engine.from_pretrained` takes, from its data."""
    lines = ["| keyword | | |", "|---|---|---|"]
    lines += [f"| `{name}` | {one.verdict} | {one.note} |" for name, one in FROM_PRETRAINED.items()]
    lines += ["", "Of a single file, beside those of the hub:", "", "| keyword | | |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {one.verdict} | {one.note} |"
        for name, one in FROM_SINGLE_FILE.items()
        if one != FROM_PRETRAINED.get(name)
    ]
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if row.state == WORKS:
        return WORKS
    reason = row.reason.split(f"{row.member}: ")[-1].split("; ")[0].split(" - got")[0].rstrip(".")
    return f"{row.state}: {reason}"


def states(text: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """(class, member) -> the first words of its cells, from the page."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("### `"):
            name = line.split("`")[1]
        elif line.startswith("| `"):
            member, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
            found[name, member] = tuple(cell.partition(":")[0] for cell in cells)
    return found


def between(text: str, begin: str = BEGIN, end: str = END) -> str:
    return text.partition(begin)[2].partition(end)[0]


def replaced(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{new}{end}{rest.partition(end)[2]}"
