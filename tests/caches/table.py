"""docs/cache-support.md and its record, and the table of all caches in docs/caches.md."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from parafuse.cache import METHODS, PartCache, StackCache
from parafuse.launch.options import field_docs
from tests.caches.cells import COMPILED, LAYOUTS, Cell
from tests.caches.methods import TEXTS
from tests.zoo.collect import cases

DOCS = Path(__file__).parents[2] / "docs"
RECORD, PAGE, METHODS_PAGE = DOCS / "cache-support.json", DOCS / "cache-support.md", DOCS / "caches.md"
MARK = "<!-- methods -->"
INTRODUCTION = """# Which models can have a cache, in which layouts

Written by `make caches`; do not edit. Tiny configurations with random weights, fp32.

## First-block caching

Every transformer class of diffusers that has a block stack (`tests/zoo`), called eleven times with a sample that moves
at a pace that varies, at a threshold that parts these steps. A cell is *exact* when every decision, by step and sample,
is that of one rank with the same cache, when some but not all are skips, and when the largest fp32 difference of all
steps from that rank is at most 1e-5 of the largest value; the number is that difference. *Compiled*: the blocks in full
graphs, with Ulysses 2, and no graph is made from the first skipped step on. *Again* is the error of a skipped step that
is given what the computed one was given, against the plain model.

"""


@dataclass
class Record:
    """All cells."""

    first_block: dict[str, dict[str, Cell]] = field(default_factory=dict[str, dict[str, Cell]])
    """Transformer -> layout -> cell."""
    methods: dict[str, dict[str, dict[str, Cell]]] = field(default_factory=dict[str, dict[str, dict[str, Cell]]])
    """Method -> pipeline -> layout -> cell."""


def read_record() -> Record:
    if not RECORD.exists():
        return Record()
    found = json.loads(RECORD.read_text())
    return Record(
        {name: {c: Cell(**cell) for c, cell in row.items()} for name, row in found["first_block"].items()},
        {
            method: {name: {c: Cell(**cell) for c, cell in row.items()} for name, row in rows.items()}
            for method, rows in found["methods"].items()
        },
    )


def write_record(record: Record) -> None:
    RECORD.write_text(json.dumps(asdict(record), indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(record))


def page(record: Record) -> str:
    notes: list[str] = []
    columns = (*LAYOUTS, COMPILED)
    rows = [
        f"| {name} | {' | '.join(_shown(row[column], notes) for column in columns)} | {_again(row)} |"
        for name, row in sorted(record.first_block.items())
    ]
    classes = {name.partition(":")[0] for name in record.first_block}
    right = {
        name for name, row in record.first_block.items()
        if not any(cell.faults or (cell.refused and column in LAYOUTS) for column, cell in row.items())
    }  # fmt: skip
    main = sum(name in right for name in classes)
    head = [f"| class | {' | '.join(columns)} | again |", f"|---{'|---' * len(columns)}|---:|"]
    lines = [INTRODUCTION + f"In all: {main} of {len(classes)} classes are exact in all layouts.", "", *head, *rows, ""]
    missing = sorted({name.partition(":")[0] for name in cases()} - classes)
    if missing:
        lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    lines += ["## The other methods", "", METHODS_INTRODUCTION]
    if len(record.methods) < len(TEXTS):
        lines += [f"Not measured yet: {', '.join(name for name in TEXTS if name not in record.methods)}.", ""]
    lines += ["| method | pipeline | cfg 2 | Ulysses 2 | skipped |", "|---|---|---|---|---:|"]
    for method in TEXTS:
        for name, row in record.methods.get(method, {}).items():
            cells = [_shown(row[c], notes) if c in row else "not split" for c in ("cfg 2", "Ulysses 2")]
            some = next(iter(row.values()))
            skipped = f"{some.skipped} of {some.of}" if some.decides else "in every call"
            lines.append(f"| {method} | {name} | {cells[0]} | {cells[1]} | {skipped} |")
    lines += ["", *(f"[{number}] {note}  " for number, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


METHODS_INTRODUCTION = """Each on whole pipelines with guidance, 8 steps (`tests/guided`), against one rank with the
same cache: the same decisions, and the largest fp32 difference. What is painted differs from what is painted without a
cache, or the cell is a fault. UNets are not split over tokens.
"""


def _shown(cell: Cell, notes: list[str]) -> str:
    if cell.faults:
        return f"**{'; '.join(cell.faults)}**"
    if cell.refused:
        if cell.refused not in notes:
            notes.append(cell.refused)
        return f"refused [{notes.index(cell.refused) + 1}]"
    return f"exact, {cell.error:.0e}"


def _again(row: dict[str, Cell]) -> str:
    found = [cell.again for cell in row.values() if not cell.refused]
    return f"{max(found):.0e}" if found else ""


SHARED = {
    StackCache: "caches that skip a stack",
    PartCache: "caches that reuse parts of blocks",
}
"""Bases whose fields are told once."""


def methods_table() -> str:
    """Every cache with its fields, from the dataclasses."""
    lines: list[str] = []
    for base, who in SHARED.items():
        names = [f"`{name}`" for name, kind in METHODS.items() if issubclass(kind, base)]
        lines += [f"### Fields of all {who}", "", f"{', '.join(names)}.", "", *_fields(base), ""]
    for name, kind in METHODS.items():
        said = " ".join((kind.__doc__ or "").split())
        lines += [f"### `{name}`", "", f"`parafuse.{kind.__name__}`, for a {' or a '.join(kind.models)}. {said}", ""]
        base = next((one for one in SHARED if issubclass(kind, one)), None)
        lines += [*_fields(kind, told=_fields(base) if base else []), ""]
    return "\n".join(lines)


def _fields(kind: type, told: list[str] | None = None) -> list[str]:
    """A line for each field, those that a text fills by place first; without those that were told already."""
    docs = field_docs(kind)
    lines: list[str] = []
    for one in sorted(dataclasses.fields(kind), key=lambda one: bool(one.kw_only)):
        default = "needed" if one.default is dataclasses.MISSING else f"default {_text(one.default)}"
        lines.append(f"- `{one.name}` ({default}): {' '.join(docs[one.name].split())}")
    return [line for line in lines if line not in (told or [])]


def _text(value: object) -> str:
    return "none" if value is None else f"`{value}`"


def with_methods(text: str) -> str:
    """The page with the table between its marks."""
    before, first, rest = text.partition(MARK)
    _, second, after = rest.partition(MARK)
    if not (first and second):
        raise ValueError(f"{METHODS_PAGE.name}: needs {MARK} twice, around the table of caches")
    return f"{before}{MARK}\n{methods_table()}\n{MARK}{after}"


if __name__ == "__main__":
    METHODS_PAGE.write_text(with_methods(METHODS_PAGE.read_text()))
    if RECORD.exists():
        PAGE.write_text(page(read_record()))
