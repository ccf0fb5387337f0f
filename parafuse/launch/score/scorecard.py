"""What `parafuse score` has found: figures by file and of the sets, as a table and as JSON. Imports no torch."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from parafuse.errors import ConfigError

SCHEMA = 1
NUM_WORST = 3
"""File names shown for each figure."""


@dataclass(frozen=True)
class Figure:
    """How a figure is shown."""

    label: str
    digits: int
    more_is_better: bool


BY_FILE = {
    "psnr_db": Figure("PSNR, dB", 2, True),
    "ssim": Figure("SSIM", 4, True),
    "largest_of_255": Figure("largest difference, of 255", 0, False),
    "lpips": Figure("LPIPS", 4, False),
    "clip_score": Figure("CLIP score", 2, True),
    "clip_direction": Figure("CLIP directional similarity", 4, True),
}
OF_SETS = {
    "fid": Figure("FID", 3, False),
    "fid_on_clip_features": Figure("FID on CLIP features", 4, False),
}


@dataclass(kw_only=True)
class Scorecard:
    """One run of the command."""

    schema: int = SCHEMA
    date: str
    versions: dict[str, str]
    asked: dict[str, Any]
    """The options, as they were given."""
    device: str
    files: dict[str, dict[str, Any]]
    """By name, sorted: the figures, and the prompts that were used."""
    sets: dict[str, float] = field(default_factory=dict[str, float])
    """Distances between the two folders."""
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    """Figure -> why there is none."""
    warnings: list[str] = field(default_factory=list[str])

    def put(self, name: str, values: list[Any]) -> None:
        """One value for each file, in their order."""
        for figures, value in zip(self.files.values(), values, strict=True):
            figures[name] = value

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Figure -> mean, worst and the names of the worst files, worst first; of the sets, their value."""
        found: dict[str, dict[str, Any]] = {}
        for name, how in BY_FILE.items():
            values = {file: figures[name] for file, figures in self.files.items() if name in figures}
            if values:
                order = sorted(values, key=values.__getitem__, reverse=not how.more_is_better)
                found[name] = {
                    "mean": statistics.fmean(values.values()),
                    "worst": values[order[0]],
                    "worst_files": order[:NUM_WORST],
                }
        return found | {name: {"value": value} for name, value in self.sets.items()}

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("figure", "mean", "worst", "worst first"):
            table.add_column(heading, justify="right" if heading in ("mean", "worst") else "left", overflow="fold")
        for name, found in self.metrics().items():
            how = (BY_FILE | OF_SETS)[name]
            if name in OF_SETS:
                table.add_row(how.label, f"{found['value']:.{how.digits}f}", "", "of the two sets")
                continue
            shown = [f"{found[which]:.{how.digits}f}" for which in ("mean", "worst")]
            table.add_row(how.label, *shown, ", ".join(found["worst_files"]))
        return table

    def write(self, path: Path) -> None:
        """As one JSON object, whole or not at all. Raises ConfigError where the file exists."""
        head = {name: value for name, value in asdict(self).items() if name not in ("sets", "files")}
        text = json.dumps(head | {"metrics": self.metrics(), "files": self.files}, indent=1, ensure_ascii=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise ConfigError(exists(path)) from error


def exists(path: Path) -> str:
    """The line for a file that is there already."""
    return f"--out {str(path)!r}: exists, and is not overwritten; give another name, or take it away."
