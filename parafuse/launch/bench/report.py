"""Pages, from records only."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from parafuse.errors import ConfigError
from parafuse.launch.bench.record import Record
from parafuse.launch.bench.tables import acted, conditions, ladder, modelled, parts, starts
from parafuse.launch.bench.trade import recommended, trade_table

HOW = (
    "Medians of the rounds, with the smallest and the largest; variants took turns within each round, and ratios are "
    "of the same round, to {baseline!r}. The least time of a step is what its products and attention would take alone, "
    "at the rates measured on this device, shared evenly by the ranks."
)


def markdown(record: Record) -> str:
    """One record as a page: the ladder, what each variant did, its parts, starts."""
    sections = [
        [f"# {record.case}: {record.model} on {record.hardware}"],
        [f"- {line}" for line in conditions(record)],
        textwrap.wrap(HOW.format(baseline=record.baseline), 110),
        _ladder(record),
        *(table.markdown() for table in (acted(record), trade_table(record), parts(record), starts(record))),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _ladder(record: Record) -> list[str]:
    said = modelled(record)
    return [*ladder(record).markdown(), *(["", said] if said else [])]


def linked(record: Record, link: str) -> str:
    """A record's ladder with its source, between marks."""
    return _between(MARK.format(name=record.case), _ladder(record), record, link)


def caches_linked(record: Record, link: str) -> str:
    """A record's caches, the best of them first, with their source, between marks."""
    return _between(CACHES_MARK.format(name=record.case), recommended(record), record, link)


def _between(mark: str, lines: list[str], record: Record, link: str) -> str:
    return "\n".join([mark, *lines, "", f"From [{record.name}]({link}).", mark])


MARK, CACHES_MARK = "<!-- bench:{name} -->", "<!-- caches:{name} -->"


def into_page(page: Path, record: Record, link: str) -> bool:
    """Puts a record's ladder, or its caches, between the marks of a page, linked to the record; whether the page
    changed."""
    try:
        text = page.read_text()
    except OSError as error:
        raise ConfigError(f"--page {str(page)!r}: cannot be read ({error.strerror}).") from error
    blocks = {MARK.format(name=record.case): linked, CACHES_MARK.format(name=record.case): caches_linked}
    found = {mark: made(record, link) for mark, made in blocks.items() if mark in text}
    if not found or any(text.count(mark) != 2 for mark in found):
        wanted = " or ".join(repr(mark) for mark in found or blocks)
        raise ConfigError(f"{page}: must have {wanted} twice, around the table.")
    new = text
    for mark, block in found.items():
        new = re.sub(f"{re.escape(mark)}.*{re.escape(mark)}", lambda _, block=block: block, new, flags=re.DOTALL)
    page.write_text(new)
    return new != text
