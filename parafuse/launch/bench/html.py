"""The report of a proof: one HTML file with its tables, plots and pictures inside."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from torch import Tensor

from parafuse.launch.bench.figures import figures_of
from parafuse.launch.bench.paintings import Paintings
from parafuse.launch.bench.plots import plots
from parafuse.launch.bench.record import Record
from parafuse.launch.bench.report import HOW
from parafuse.launch.bench.tables import acted, conditions, ladder, parts, said_quality, times_as_fast

TEMPLATE = Path(__file__).with_name("prove.html.j2")
LARGEST_PIXELS = 512
"""Pictures are shown no larger, along their longer side."""


def page(record: Record, paintings: Paintings) -> str:
    """The report. Needs nothing beside itself."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    tables = {"Times": ladder(record), "Parts of a request": parts(record), "What each did": acted(record)}
    return environment.from_string(TEMPLATE.read_text()).render(
        title=f"{record.model} on {record.ranks} rank{'s' if record.ranks > 1 else ''} of {record.hardware}",
        verdict=verdict(record),
        conditions=conditions(record),
        how=HOW.format(baseline=record.baseline),
        tables={name: table for name, table in tables.items() if table.rows},
        plots=_plots(record),
        pictures=_pictures(paintings),
        errors=[(row.name, row.error) for row in record.rows if row.error],
    )


def verdict(record: Record) -> list[str]:
    """A sentence for each variant that ran: how many times as fast, and whose pictures."""
    lines: list[str] = []
    for row in record.rows:
        found = figures_of(record, row)
        if found and row.name != record.baseline:
            total = found.total_ratio
            lines.append(
                f"{row.name}: a request is {times_as_fast(total)} times as fast as {record.baseline}, "
                f"a step {times_as_fast(found.ratio)}; {said_quality(row.quality) or 'pictures not compared'}."
            )
    return lines


def _plots(record: Record) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        made = [path for path in plots([record], Path(folder)) if path.suffix == ".svg"]
        return {path.stem: _data("image/svg+xml", path.read_bytes()) for path in made}


def _pictures(paintings: Paintings) -> list[dict[str, Any]]:
    """Prompt by prompt: (variant, its pictures, what is said of them)."""
    return [
        {
            "prompt": prompt,
            "cells": [
                (one.variant, [_png(shown) for shown in one.shown], said_quality(one.quality))
                for one in paintings.painted
                if one.prompt == prompt
            ],
        }
        for prompt in paintings.prompts
    ]


def _png(picture: Tensor) -> str:
    image = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy().astype(np.uint8))
    image.thumbnail((LARGEST_PIXELS, LARGEST_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _data("image/png", buffer.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
