"""What a record shows, as tables of text."""

from __future__ import annotations

from dataclasses import dataclass

from parafuse.launch.bench.figures import Figures, Spread, figures_of
from parafuse.launch.bench.record import Record, Row

SAID = {"communication": "exchange"}
MODELLED = "modelled"
SAID_OF_SHARES = (
    "one rank's share was run on this device, with messages of the same size from itself; the wire is added, at "
    "{gigabytes:g} GB/s and {microseconds:g} us for each exchange, nothing of it hidden."
)
IN_SECONDS = 10.0
"""From here on, times are shown in seconds."""
LADDER = ("variant", "ranks", "step", "times as fast", "request", "of the least time", "TFLOP/s", "GB/s", "memory")


@dataclass
class Table:
    """Headings, and rows of as many cells; the first column is text, others are figures unless they are named."""

    heads: list[str]
    rows: list[list[str]]
    text: tuple[str, ...] = ()
    """Further columns of text."""

    def markdown(self) -> list[str]:
        """Lines; none for a table without rows."""
        if not self.rows:
            return []
        marks = "".join("---|" if i == 0 or head in self.text else "---:|" for i, head in enumerate(self.heads))
        return [_line(self.heads), f"|{marks}", *map(_line, self.rows)]


def conditions(record: Record) -> list[str]:
    """Where, when and what."""
    ranks = f"{record.ranks} rank{'s' if record.ranks > 1 else ''}"
    threads = f"{record.threads} thread{'s' if record.threads > 1 else ''}"
    changed = ", with changes since" if record.dirty else ""
    devices = dict.fromkeys([gpu["name"] for gpu in record.machine.get("gpus", [])]) if record.device == "cuda" else {}
    device = ", ".join(devices) or record.machine.get("cpu", "")
    return [
        f"{ranks} of {threads}, {record.dtype} on {record.device} ({device})",
        f"commit {record.commit}{changed}, {record.date}; the pipeline was on its device after {record.load_s:.1f} s",
        f"call: {', '.join(f'{name}={value!r}' for name, value in record.call.items())}",
        *([f"{len(record.prompts)} prompts, one for each round, seeds one after another"] if record.prompts else []),
        f"versions: {', '.join(f'{name} {version}' for name, version in record.versions.items())}",
    ]


def ladder(record: Record) -> Table:
    """Times of each variant, or why it has none."""
    request = f"request of {record.whole_steps} steps, extrapolated" if record.whole_steps else "request"
    table = Table([request if head == "request" else head for head in LADDER], [])
    for row in record.rows:
        found = figures_of(record, row)
        failed = [row.name, ranks_of(row), row.error, *[""] * (len(LADDER) - 3)]
        table.rows.append(_times(record, row, found) if found else failed)
    return table


def modelled(record: Record) -> str:
    """What is modelled in the ladder; empty where nothing is."""
    shares = [row for row in record.rows if row.share_of > 1 and not row.error]
    if not shares:
        return ""
    link = record.link
    said = SAID_OF_SHARES.format(gigabytes=link["bytes_per_s"] / 1e9, microseconds=link["latency_s"] * 1e6)
    return f"{MODELLED}: {said}"


def ranks_of(row: Row) -> str:
    """How many; of a share, how many it is one of, marked."""
    return str(row.ranks) if row.share_of == 1 else f"1 of {row.share_of}, {MODELLED}"


def _times(record: Record, row: Row, found: Figures) -> list[str]:
    return [
        row.name,
        ranks_of(row),
        _time(found.step_s),
        "1" if row.name == record.baseline else times_as_fast(found.ratio),
        _time(found.whole_s if record.whole_steps else found.total_s),
        _percent(found.fraction),
        _scaled(found.flops, 1e12),
        _scaled(found.bytes, 1e9),
        " / ".join(f"{x / 2**20:.0f} MiB" for x in row.memory_bytes),
    ]


def acted(record: Record) -> Table:
    """What each variant did, where its step's time went, and how its pictures differ."""
    kinds = ("GEMM", "attention", "pointwise", "communication", "host")
    text = ("a request's counters", "against the baseline")
    table = Table(["variant", *(SAID.get(kind, kind) for kind in kinds), *text], [], text)
    for row in record.rows:
        if not row.error:
            shares = [_percent(row.shares.get(kind)) for kind in kinds]
            table.rows.append([row.name, *shares, _counters(row), said_quality(row.quality)])
    return table


def parts(record: Record) -> Table:
    """What a request is made of, and what the first one takes besides."""
    kinds = list(dict.fromkeys(part for row in record.rows for part in row.parts_s))
    table = Table(["variant", *kinds, "first request", "of that, the compiler"], [])
    for row in record.rows:
        if row.parts_s:
            cells = [_seconds(row.parts_s.get(kind)) for kind in kinds]
            table.rows.append([row.name, *cells, _seconds(row.first_s), _seconds(row.compile_s or None)])
    return table


def starts(record: Record) -> Table:
    """First pictures."""
    ways = ("cold", "warm")
    table = Table(["variant", *(f"first picture, {way}" for way in ways)], [])
    for name, seconds in record.starts_s.items():
        table.rows.append([name, *(f"{seconds[way]:.1f} s" if way in seconds else "" for way in ways)])
    return table


def _counters(row: Row) -> str:
    shown = [
        f"{name.removesuffix(' bytes')} {number / 2**20:.2f} MiB" if name.endswith(" bytes") else f"{name} {number:g}"
        for name, number in row.counts.items()
    ]
    return ", ".join(shown)


def said_quality(quality: dict[str, float]) -> str:
    """Of the worst picture, in words; empty for figures of nothing."""
    if not quality:
        return ""
    if "latent_error" in quality:
        return f"latents within {quality['latent_error']:.1e} of the largest"
    if quality["largest_of_255"] < 0.5:
        return "the same picture"
    return f"PSNR {quality['worst_psnr_db']:.1f} dB, SSIM {quality['worst_ssim']:.3f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _time(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread.median >= IN_SECONDS:
        return f"{spread.median:.1f} s ({spread.low:.1f} to {spread.high:.1f})"
    return f"{spread.median * 1e3:.1f} ms ({spread.low * 1e3:.1f} to {spread.high * 1e3:.1f})"


def times_as_fast(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.0f}%"


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}"
