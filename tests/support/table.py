"""docs/support.md from the record of the cells: a row per transformer class, a column per layout."""

from __future__ import annotations

from pathlib import Path

from tests.support.cells import EXACT, Cell
from tests.support.record import Record

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
MARK = "<!-- support -->"
INTRODUCTION = """# Which transformers run on several ranks, and how exactly

Written by `make support`; do not edit. Every transformer class that diffusers exports, as tiny configurations with
random weights (`tests/zoo`), against plain diffusers on the same weights and inputs. A cell is *exact* when, for all
variants and lengths of its class, the largest fp32 difference is at most 1e-5 of the largest value, bf16 is no further
from fp32 than twice plain bf16, and attention sends what the formulas say: two all-to-alls with Ulysses, one buffer per
step with ring. The number is the worst fp32 difference. Lengths: one that does not divide, and fewer tokens than ranks;
at Ulysses 3 also batch 1, text as long as the image, other lengths after the first ones, and one token. A class that
rounds to 16 bits inside, whatever its weights, may differ by 1e-3, where a rounding flips: the notes say which.
*Gathers* are the exchanges of one forward beside those of attention: 1 is the last one, which every model needs.
*Graphs* are those that `compile(fullgraph=True)` on every block makes on one rank without parafuse / with Ulysses 2,
all in the first two steps; and, where it was run, the error of Inductor's result against the plain uncompiled model.
"""


def write_table(record: Record) -> None:
    PAGE.write_text(table(record))
    readme = PAGE.parents[1] / "README.md"
    before, first, rest = readme.read_text().partition(MARK)
    _, second, after = rest.partition(MARK)
    if not (first and second):
        raise ValueError(f"README.md: needs {MARK} twice, around the counts")
    readme.write_text(f"{before}{MARK}{counts(record)}{MARK}{after}")


def by_class(record: Record) -> dict[str, dict[str, dict[str, Cell]]]:
    """Class -> case -> layout -> cell."""
    classes: dict[str, dict[str, dict[str, Cell]]] = {}
    for name, row in sorted(record.cells.items()):
        classes.setdefault(name.partition(":")[0], {})[name] = row
    return classes


def main_is_exact(rows: dict[str, dict[str, Cell]], column: str) -> bool:
    """The class's first case, the one named like it, is exact, and none of the others is wrong."""
    return next(iter(rows.values()))[column].is_exact and not any(row[column].faults for row in rows.values())


def counts(record: Record) -> str:
    """One sentence for the README."""
    classes = by_class(record)
    columns = list(next(iter(record.cells.values())))
    ulysses = sum(all(main_is_exact(r, c) for c in columns if c.startswith("Ulysses")) for r in classes.values())
    everywhere = sum(all(main_is_exact(r, c) for c in columns) for r in classes.values())
    return (
        f"of {len(classes)} classes, {ulysses} are exact with Ulysses on 2, 3 and 4 ranks, and {everywhere} in all "
        f"{len(columns)} layouts; {compile_counts(record)}"
    )


def compile_counts(record: Record) -> str:
    found = [row["aot_eager"] for row in record.compiled.values() if row["aot_eager"].plain]
    whole = sum(not (one.refused or one.faults) for one in found)
    return f"of the {len(found)} whose blocks compile to single graphs on one rank, {whole} do on several"


def table(record: Record) -> str:
    columns = list(next(iter(record.cells.values())))
    notes: dict[str, int] = {}
    lines = [INTRODUCTION, f"In all: {counts(record)}.", ""]
    lines += ["| class | " + " | ".join(columns) + " | gathers | graphs |", "|---" * (len(columns) + 3) + "|"]
    for name, rows in by_class(record).items():
        cells = [_shown(rows, column, notes) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {_gathers(rows)} | {_graphs(record, name, notes)} |")
    lines += ["", "## Notes: what is refused, and why; what rounds inside", ""]
    lines += [f"{number}. {text}" for text, number in notes.items()] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _shown(rows: dict[str, dict[str, Cell]], column: str, notes: dict[str, int]) -> str:
    """One cell of the page: the worst of all cases of the class, and notes for those that are refused."""
    cells = {name: row[column] for name, row in rows.items()}
    faults = [fault for cell in cells.values() for fault in cell.faults]
    marks: list[str] = []
    for name, cell in cells.items():
        for what, why in list(cell.refused.items())[:1]:
            known = next((number for text, number in notes.items() if text.startswith(f"{name}, {what}: ")), None)
            number = known or notes.setdefault(f"{name}, {what}: {why}", len(notes) + 1)
            if f"[{number}]" not in marks:
                marks.append(f"[{number}]")
        if cell.rounding and cell.worst > EXACT:
            number = notes.setdefault(f"{name}: {cell.rounding}", len(notes) + 1)
            marks.append(f"[{number}]")
    if faults:
        return f"**wrong** ({faults[0]})"
    if not next(iter(cells.values())).is_exact:
        return "refused " + "".join(marks)
    worst = max(cell.worst for cell in cells.values())
    return f"exact, {worst:.0e}" + (f"; {''.join(marks)}" if marks else "")


def _graphs(record: Record, name: str, notes: dict[str, int]) -> str:
    row = record.compiled.get(name)
    if row is None:
        return ""
    found, inductor = row["aot_eager"], row.get("inductor")
    faults = [fault for one in row.values() for fault in one.faults]
    if faults:
        return f"**wrong** ({faults[0]})"
    if found.refused:
        number = notes.setdefault(f"{name}, compiled: {found.refused}", len(notes) + 1)
        return f"{found.plain or 'none'} / refused [{number}]"
    return f"{found.plain or 'none'} / {found.graphs}" + (f"; {inductor.error:.0e}" if inductor else "")


def _gathers(rows: dict[str, dict[str, Cell]]) -> str:
    found = sorted({row["Ulysses 3"].gathers for row in rows.values() if row["Ulysses 3"].gathers is not None})
    return "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
