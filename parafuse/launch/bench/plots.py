"""Plots, from records only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parafuse.launch.bench.figures import Spread, figures_of
from parafuse.launch.bench.record import Record
from parafuse.launch.bench.tables import MODELLED, ranks_of
from parafuse.launch.bench.trade import Trade, trades


def plots(records: list[Record], folder: Path) -> list[Path]:
    """`ladder`, `scaling`, `quality` and `caches`, each as SVG and PNG, of what the records have."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "parafuse"  # the same record, the same file
    made: list[Path] = []
    ways = {"ladder": _draw_ladder, "scaling": _draw_scaling, "quality": _draw_quality, "caches": _draw_caches}
    for name, draw in ways.items():
        figure = Figure(figsize=(9, 6) if name == "caches" else (7, 4), layout="constrained")
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
                said = [record.case] * (len(records) > 1) + [ranks_of(row)]
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


def cache_lines(records: list[Record]) -> dict[str, list[Trade]]:
    """Method -> its points in the order of their thresholds or intervals; of several records, with the case."""
    lines: dict[str, list[Trade]] = {}
    for record in records:
        for one in trades(record):
            name = f"{record.case}: {one.method}" if len(records) > 1 else one.method
            lines.setdefault(name, []).append(one)
    return {name: sorted(points, key=lambda one: one.number) for name, points in lines.items()}


def _draw_caches(axes: Any, records: list[Record]) -> bool:
    lines = cache_lines(records)
    for number, (name, points) in enumerate(lines.items()):
        color = f"C{number % 10}"
        speeds = [one.speed.median for one in points]
        axes.plot(speeds, [one.ssim for one in points], marker="o", color=color, label=name)
        axes.plot(speeds, [one.worst_ssim for one in points], marker="x", linestyle=":", linewidth=0.8, color=color)
        for one in points:
            at = (one.speed.median, one.ssim)
            axes.annotate(one.name, at, textcoords="offset points", xytext=(4, 4), fontsize=7)
    if lines:
        axes.legend(fontsize=8)
        axes.set(
            xlabel="times as fast as the baseline, by request",
            ylabel="SSIM of the prompts: median (dots), worst (crosses)",
            title="Caches: quality against speed",
        )
    return bool(lines)
