"""docs/vae-support.md from the record of the cells."""

from __future__ import annotations

from collections.abc import Mapping

from tests.vae.cells import FORMS, INPUTS, METHODS, RANKS, worst_of
from tests.vae.zoo import CASES

HEAD = """# Autoencoders on several ranks, class by class

Written by `python -m tests.vae`; do not edit. Every class that diffusers exports, as a tiny configuration with random
weights (`tests/vae/zoo.py`), fp32. *Tiled* is held against diffusers' own tiled method on one rank, *sharded* against
the undivided one. A cell is the worst of three inputs (even sizes, odd sizes, two samples of odd sizes) on all ranks:
*bitwise*, or *exact* with the largest difference over the largest value (at most 1e-4), or the number of the reason
below why it is neither.

"""


def page(record: Mapping[str, str]) -> str:
    reasons: list[str] = []
    columns = [(form, num_ranks) for form in FORMS for num_ranks in RANKS]
    lines = [f"| class | method | {' | '.join(f'{form} {num}' for form, num in columns)} |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for case in CASES:
        for method in METHODS:
            row = [_text(record, (case.name, method, form), num, reasons) for form, num in columns]
            lines.append(f"| {case.name} | {method} | {' | '.join(row)} |")
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return HEAD + _counts(record) + "\n" + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


def _counts(record: Mapping[str, str]) -> str:
    said: list[str] = []
    for form in FORMS:
        of_form = {name.split("; ")[0].split(":")[0] for name in record if f"; {form}; " in name}
        whole = {
            name
            for name in of_form
            if all(
                text.startswith(("bitwise", "exact"))
                for cell, text in record.items()
                if cell.split("; ")[0] == name and f"; decode; {form}; " in cell
            )
        }
        said.append(f"{form}: {len(whole)} of {len(of_form)} classes decode so on {_listed()} ranks")
    return "; ".join(said)[:1].upper() + "; ".join(said)[1:] + ".\n"


def _listed() -> str:
    return f"{', '.join(map(str, RANKS[:-1]))} and {RANKS[-1]}"


def _text(record: Mapping[str, str], cell: tuple[str, ...], num_ranks: int, reasons: list[str]) -> str:
    names = ["; ".join([*cell, given, f"{num_ranks} ranks"]) for given in INPUTS]
    texts = {given: record[name] for given, name in zip(INPUTS, names, strict=True) if name in record}
    if not texts:
        return ""
    worst = worst_of(texts.values())
    if worst.startswith(("bitwise", "exact")):
        return worst
    kind, _, reason = worst.partition(": ")
    reason = reason.replace("|", "/")
    if reason not in reasons:
        reasons.append(reason)
    good = [given for given, text in texts.items() if text.startswith(("bitwise", "exact"))]
    more = f" ({', '.join(good)}: {worst_of(texts[given] for given in good)})" if good else ""
    return f"{kind if kind != 'none' else '-'} [{reasons.index(reason) + 1}]{more}"
