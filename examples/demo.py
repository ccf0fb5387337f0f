"""The main job in one page: several ranks paint what one rank would have painted.

    torchrun --standalone --nproc-per-node 2 examples/demo.py --out out/demo.png

Each prompt is painted twice from the same seed: by all ranks together through parafuse, then by rank 0 alone through
plain diffusers. The contact sheet shows both, and their difference. In fp32 no pixel may differ by more than 1 of 255:
if one does, the exit code is 1.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageChops, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

import parafuse

PROMPTS = ("a red apple", "a rocket", "a cactus", "an octopus")
MODEL = Path(parafuse.__file__).parent / "models" / "emoji"
ALLOWED = 1
"""Largest difference of a pixel, of 255: rounding may fall to either side."""
AMPLIFIED = 64
"""A difference of 1 of 255 cannot be seen; times this it can."""
CELL, MARGIN, LINE = 256, 12, 22


@dataclass
class Row:
    """One prompt, painted twice."""

    prompt: str
    one: Image.Image
    one_s: float
    many: Image.Image
    many_s: float

    @property
    def difference(self) -> Image.Image:
        return ImageChops.difference(self.one.convert("RGB"), self.many.convert("RGB"))

    @property
    def largest(self) -> int:
        """Largest difference of any pixel and colour, of 255."""
        histogram = self.difference.histogram()  # 256 counts for each of three colours
        return max(level % 256 for level, count in enumerate(histogram) if count)


def painted(paint: Callable[..., Any], seed: int) -> list[tuple[Image.Image, float]]:
    """(picture, seconds) for each prompt, after one step that is not timed."""
    paint(PROMPTS[0], seed, num_inference_steps=1)
    results: list[tuple[Image.Image, float]] = []
    for index, prompt in enumerate(PROMPTS):
        begun = time.perf_counter()
        image = paint(prompt, seed + index).images[0]
        results.append((image, time.perf_counter() - begun))
    return results


def by_all_ranks(ranks: int, seed: int) -> tuple[list[tuple[Image.Image, float]], parafuse.Plan, str]:
    """The pictures by all ranks together, their plan, and what was applied. Every rank must call it."""
    config = parafuse.Config(parallel=parafuse.Parallel(ulysses=ranks), dtype="float32")
    engine = parafuse.Engine.from_pretrained("emoji", config)
    results = painted(lambda prompt, seed, **call: engine(prompt, seed=seed, **call), seed)
    plan, applied = engine.plan, "; ".join(engine.receipt["applied"]) or "nothing"
    engine.close()
    return results, plan, applied


def by_plain_diffusers(device: str, seed: int) -> list[tuple[Image.Image, float]]:
    """The same pictures by diffusers alone, in this process, with the model's own defaults."""
    import torch
    from diffusers import FluxPipeline

    defaults = json.loads((MODEL / "parafuse.json").read_text())["call"]
    pipeline = FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def paint(prompt: str, seed: int, **call: Any) -> Any:
        return pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), **{**defaults, **call})

    return painted(paint, seed)


def contact_sheet(rows: list[Row], ranks: int) -> Image.Image:
    """One row per prompt: one rank, all ranks, their difference made visible."""
    step_x, step_y = CELL + MARGIN, CELL + LINE + MARGIN
    sheet = Image.new("RGB", (MARGIN + 3 * step_x, 2 * MARGIN + LINE + len(rows) * step_y), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column, title in enumerate(("1 rank, plain diffusers", f"{ranks} ranks, parafuse", f"difference x{AMPLIFIED}")):
        draw.text((MARGIN + column * step_x, MARGIN), title, "black", font)
    for index, row in enumerate(rows):
        top = 2 * MARGIN + LINE + index * step_y
        visible = row.difference.point([min(255, value * AMPLIFIED) for value in range(256)] * 3)
        below = (f"{row.prompt}, {row.one_s:.1f} s", f"{row.many_s:.1f} s", f"at most {row.largest} of 255")
        for column, (image, text) in enumerate(zip((row.one, row.many, visible), below, strict=True)):
            left = MARGIN + column * step_x
            sheet.paste(image.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
            draw.text((left, top + CELL + 2), text, "black", font)
    return sheet


def summary(rows: list[Row], ranks: int) -> Table:
    """The same in numbers."""
    table = Table("prompt", "1 rank", f"{ranks} ranks", "speed", "largest difference", title="same seeds, fp32")
    for row in rows:
        times = (f"{row.one_s:.2f} s", f"{row.many_s:.2f} s", f"{row.one_s / row.many_s:.2f}x")
        table.add_row(row.prompt, *times, f"{row.largest} of 255" + ("" if row.largest <= ALLOWED else "  TOO MUCH"))
    return table


def silence_libraries() -> None:
    """No advice to programmers, no bars for loading: this program has a terminal to itself."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def main(
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("out/demo.png"),
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")] = 7,
) -> None:
    """Paint four prompts on all ranks and on one, and compare."""
    silence_libraries()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    console = Console(quiet=rank != 0)
    console.print(f"{ranks} ranks paint {len(PROMPTS)} prompts ...")
    many, plan, applied = by_all_ranks(ranks, seed)
    if rank != 0:
        return  # the rest is for one rank, alone on the machine
    console.print("rank 0 paints them alone, with plain diffusers ...")
    one = by_plain_diffusers(plan.device, seed)
    rows = [Row(p, *alone, *together) for p, alone, together in zip(PROMPTS, one, many, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, ranks).save(out)
    console.print(summary(rows, ranks))
    console.print(f"plan: {plan.one_line()}; applied: {applied}", highlight=False, soft_wrap=True)
    console.print(f"contact sheet: {out}", highlight=False, soft_wrap=True)
    if any(row.largest > ALLOWED for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
