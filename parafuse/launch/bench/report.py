"""Tables and plots, from records only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from parafuse.errors import ConfigError
from parafuse.launch.bench.figures import Figures, Spread, figures_of
from parafuse.launch.bench.record import Record, Row

SAID = {"communication": "exchange"}
MODELLED = "modelled"
SAID_OF_SHARES = (
    "one rank's share was run on this device, with messages of the same size from itself; the wire is added, at "
    "{bytes_per_s:.3g} bytes a second and {latency_s:.2g} s for each exchange, nothing of it hidden."
)
LADDER = ("variant", "ranks", "step", "times as fast", "request", "of the least time", "TFLOP/s", "GB/s", "memory")


def markdown(record: Record) -> str:
    """One record as a page: the ladder, what each variant did, starts."""
    lines = [
        f"# {record.case}: {record.model} on {record.hardware}",
        "",
        *_conditions(record),
        "",
        "Medians of the rounds, with the smallest and the largest; variants took turns within each round, and ratios",
        f"are of the same round, to {record.baseline!r}. The least time of a step is what its products and attention",
        "would take alone, at the rates measured on this device, shared evenly by the ranks.",
        "",
        *ladder(record),
        "",
        *acted(record),
        "",
        *parts(record),
        "",
        *starts(record),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _conditions(record: Record) -> list[str]:
    """Where, when and what, as list items."""
    ranks = f"{record.ranks} rank{'s' if record.ranks > 1 else ''}"
    threads = f"{record.threads} thread{'s' if record.threads > 1 else ''}"
    changed = ", with changes since" if record.dirty else ""
    return [
        f"- {ranks} of {threads}, {record.dtype} on {record.device} ({record.machine.get('cpu', '')})",
        f"- commit {record.commit}{changed}, {record.date}; the pipeline was on its device after {record.load_s:.1f} s",
        f"- call: {', '.join(f'{name}={value!r}' for name, value in record.call.items())}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in record.versions.items())}",
    ]


def ladder(record: Record) -> list[str]:
    """The table of times, and what is modelled in it."""
    heads = [head if head != "request" else _request_head(record) for head in LADDER]
    lines = [_line(heads), "|---|" + "---:|" * (len(LADDER) - 1)]
    for row in record.rows:
        found = figures_of(record, row)
        lines.append(
            _line(_times(record, row, found)) if found else f"| {row.name} | {row.ranks} | {row.error} |" + " |" * 6
        )
    shares = [row for row in record.rows if row.share_of > 1 and not row.error]
    if shares:
        lines += ["", f"{MODELLED}: {SAID_OF_SHARES.format(**record.link)}"]
    return lines


def _request_head(record: Record) -> str:
    return f"request of {record.whole_steps} steps, extrapolated" if record.whole_steps else "request"


def _ranks(row: Row) -> str:
    """How many; of a share, how many it is one of, marked."""
    return str(row.ranks) if row.share_of == 1 else f"1 of {row.share_of}, {MODELLED}"


def _times(record: Record, row: Row, found: Figures) -> list[str]:
    return [
        row.name,
        _ranks(row),
        _ms(found.step_s),
        "1" if row.name == record.baseline else _times_as_fast(found.ratio),
        _ms(found.whole_s or found.total_s),
        _percent(found.fraction),
        _scaled(found.flops, 1e12),
        _scaled(found.bytes, 1e9),
        " / ".join(f"{x / 2**20:.0f} MiB" for x in row.memory_bytes),
    ]


def acted(record: Record) -> list[str]:
    """The table of what each variant did, where its step's time went, and how its pictures differ."""
    kinds = ("GEMM", "attention", "pointwise", "communication", "host")
    heads = ["variant", *(SAID.get(kind, kind) for kind in kinds), "a request's counters", "against the baseline"]
    lines = [_line(heads), "|---|" + "---:|" * len(kinds) + "---|---|"]
    for row in record.rows:
        if not row.error:
            shares = [_percent(row.shares.get(kind)) for kind in kinds]
            lines.append(_line([row.name, *shares, _counters(row), _quality(row)]))
    return lines


def parts(record: Record) -> list[str]:
    """The table of what a request is made of, and of what the first one takes besides."""
    kinds = list(dict.fromkeys(part for row in record.rows for part in row.parts_s))
    if not kinds:
        return []
    lines = [_line(["variant", *kinds, "first request", "of that, the compiler"]), "|---|" + "---:|" * (len(kinds) + 2)]
    for row in record.rows:
        if not row.error:
            cells = [_s(row.parts_s.get(kind)) for kind in kinds]
            lines.append(_line([row.name, *cells, _s(row.first_s), _s(row.compile_s or None)]))
    return lines


def _s(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"


def starts(record: Record) -> list[str]:
    """The table of first pictures."""
    if not record.starts_s:
        return []
    lines = [_line(["variant", "first picture, cold", "first picture, warm"]), "|---|---:|---:|"]
    for name, seconds in record.starts_s.items():
        lines.append(_line([name, *(f"{seconds[way]:.1f} s" if way in seconds else "" for way in ("cold", "warm"))]))
    return lines


def _counters(row: Row) -> str:
    shown = [
        f"{name.removesuffix(' bytes')} {number / 2**20:.2f} MiB" if name.endswith(" bytes") else f"{name} {number:g}"
        for name, number in row.counts.items()
    ]
    return ", ".join(shown)


def _quality(row: Row) -> str:
    if not row.quality:
        return ""
    if "latent_error" in row.quality:
        return f"latents within {row.quality['latent_error']:.1e} of the largest"
    if row.quality["largest_of_255"] < 0.5:
        return "the same picture"
    return f"PSNR {row.quality['worst_psnr_db']:.1f} dB, SSIM {row.quality['worst_ssim']:.3f}"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _ms(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median * 1e3:.1f} ms ({spread.low * 1e3:.1f} to {spread.high * 1e3:.1f})"


def _times_as_fast(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value * 100:.0f}%"


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def plots(records: list[Record], folder: Path) -> list[Path]:
    """`ladder`, `scaling` and `quality`, each as SVG and PNG, of what the records have."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "parafuse"  # the same record, the same file
    made: list[Path] = []
    for name, draw in (("ladder", _draw_ladder), ("scaling", _draw_scaling), ("quality", _draw_quality)):
        figure = Figure(figsize=(7, 4), layout="constrained")
        if draw(figure.subplots(), records):
            for suffix in (".svg", ".png"):
                path = folder / f"{name}{suffix}"
                figure.savefig(path, dpi=120, metadata={"Date": None} if suffix == ".svg" else None)
                made.append(path)
    return made


def _draw_ladder(axes: Any, records: list[Record]) -> bool:
    names: list[str] = []
    bars: list[Spread] = []
    for record in records:
        for row in record.rows:
            found = figures_of(record, row)
            if found and row.name != record.baseline:
                said = [record.case] * (len(records) > 1) + [_ranks(row)]
                names.append(f"{row.name} ({', '.join(said)})")
                bars.append(found.ratio)
    if not bars:
        return False
    errors = [[b.median - b.low for b in bars], [b.high - b.median for b in bars]]
    axes.barh(names, [b.median for b in bars], xerr=errors, capsize=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="times as fast as the baseline, by step (bars: rounds)", title="Variant (ranks)")
    return True


def _draw_scaling(axes: Any, records: list[Record]) -> bool:
    lines: dict[str, dict[int, float]] = {}
    for record in records:
        for row in record.rows:
            found = figures_of(record, row)
            if found and row.degrees and not row.compile:
                axis = " x ".join(row.degrees) + (f", {MODELLED}" if row.share_of > 1 else "")
                lines.setdefault(f"{record.case}: {axis}", {})[row.ranks * row.share_of] = found.ratio.median
    for name, points in lines.items():
        ranks = [1, *sorted(points)]
        axes.plot(ranks, [1.0, *(points[r] for r in ranks[1:])], marker="o", label=name)
    if lines:
        most = max(max(points) for points in lines.values())
        axes.plot([1, most], [1, most], color="grey", linestyle=":", label="linear")
        axes.legend()
        axes.set(xlabel="ranks", ylabel="times as fast as one", title="Scaling")
    return bool(lines)


def _draw_quality(axes: Any, records: list[Record]) -> bool:
    points = [
        (found.ratio.median, row.quality["worst_psnr_db"], row.name)
        for record in records
        for row in record.rows
        if (found := figures_of(record, row)) and "worst_psnr_db" in row.quality
    ]
    for x, y, name in points:
        axes.plot(x, y, marker="o", color="C0")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(
        xlabel="times as fast as the baseline", ylabel="PSNR of the worst picture, dB", title="Quality against speed"
    )
    return bool(points)


def linked(record: Record, link: str) -> str:
    """A record's ladder with its source, between marks."""
    mark = MARK.format(name=record.case)
    return "\n".join([mark, *ladder(record), "", f"From [{record.name}]({link}).", mark])


MARK = "<!-- bench:{name} -->"


def into_page(page: Path, record: Record, link: str) -> bool:
    """Puts a record's ladder between the marks of a page, linked to the record; whether the page changed."""
    mark = MARK.format(name=record.case)
    try:
        text = page.read_text()
    except OSError as error:
        raise ConfigError(f"--page {str(page)!r}: cannot be read ({error.strerror}).") from error
    if text.count(mark) != 2:
        raise ConfigError(f"{page}: must have {mark!r} twice, around the table.")
    new = re.sub(f"{re.escape(mark)}.*{re.escape(mark)}", lambda _: linked(record, link), text, flags=re.DOTALL)
    page.write_text(new)
    return new != text
