"""`parafuse verify --quality`: what a configuration paints against what one rank paints, over a set of prompts."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from parafuse.attention import attention_of
from parafuse.cache import cache_of
from parafuse.config import Config
from parafuse.engine.engine import Engine
from parafuse.engine.receipt import versions
from parafuse.engine.request import check_call
from parafuse.engine.targets import DENOISERS, denoisers
from parafuse.launch.bench.contestant import call_of, calls_of, twin
from parafuse.launch.bench.fidelity import LPIPS_PIXELS, Lpips, compare, lacks_lpips, lpips_on, pictures, relative_error
from parafuse.launch.bench.model import CALLBACK, Loaded
from parafuse.launch.bench.record import commit, short_hardware, today
from parafuse.quantization import quantize_of
from parafuse.sparse import sparse_of

EMOJI = "emoji"
NUM_WORST = 8
CELL = 128
AMPLIFIED = 16
"""Differences on the contact sheet are shown so many times."""


@dataclass(kw_only=True)
class Judged:
    """One prompt."""

    prompt: str
    quality: dict[str, float]
    """The picture against that of one rank."""
    step_errors: list[float]
    """By step: largest difference of the latents over their largest value."""
    right: dict[str, bool] = field(default_factory=dict[str, bool])
    """`emoji` only: "exact" and "found": whether the nearest training picture is the prompt's own."""


@dataclass(kw_only=True)
class Verdict:
    """All of them."""

    model: str
    degrees: dict[str, int]
    dtype: str
    against: str
    """dtype of the run on one rank."""
    versions: dict[str, str]
    seed: int
    commit: str
    dirty: bool
    date: str
    hardware: str
    cache: str = ""
    """As its shortest text; empty: none, or a record of before there were caches."""
    quantize: str = ""
    """As its shortest text; empty: none."""
    attention: str = ""
    """The backend that was asked for; empty: torch's own choice."""
    sparse: str = ""
    """As its shortest text; empty: none."""
    skipped: float | None = None
    """Share of the calls that it skipped, over all prompts."""
    judged: list[Judged]

    @property
    def worst(self) -> list[Judged]:
        return sorted(self.judged, key=lambda one: one.quality["worst_psnr_db"])

    def right(self, which: str) -> int | None:
        """How many pictures are of the right thing; None where that cannot be told."""
        known = [one.right[which] for one in self.judged if one.right]
        return sum(known) if known else None


def judge(
    loaded: Loaded, exact: Any, config: Config, prompts: list[str], call: dict[str, Any], *, seed: int
) -> tuple[Verdict, list[Any]]:
    """(verdict, pairs of pictures in its order; empty but on rank 0). Collective on all ranks.

    `exact`: the pipeline that paints on rank 0 alone; where it is the loaded one, over the same weights."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    against = next(denoisers(exact, DENOISERS)[0][1].parameters()).dtype
    exact = twin(exact) if rank == 0 else None
    lpips = lpips_on("cpu") if rank == 0 and not lacks_lpips(LPIPS_PIXELS) else None
    judged: list[Judged] = []
    pairs: list[Any] = []
    calls: list[bool] = []
    with Engine.from_pipeline(twin(loaded.pipeline), config) as engine:
        for number, prompt in enumerate(prompts):
            keywords = check_call(loaded.source, call | {"prompt": prompt})
            found, found_steps = _painted(engine, call_of(keywords, seed + number))
            calls += calls_of(engine.receipt["cache"])
            if exact is not None:
                want, want_steps = _painted(exact, call_of(keywords, seed + number))
                errors = [relative_error(a, b) for a, b in zip(found_steps, want_steps, strict=True)]
                pair = pictures(found), pictures(want)
                quality = compare(*pair) | worst_lpips(*pair, lpips)
                judged.append(Judged(prompt=prompt, quality=quality, step_errors=errors))
                pairs.append(pair)
            if ranks > 1:
                dist.barrier()
        degrees = {axis: degree for axis, degree in engine.plan.degrees.items() if degree > 1}
    if loaded.source.name == EMOJI:
        _tell_emoji(judged, pairs, Path(loaded.source.path))
    number, dirty = commit()
    verdict = Verdict(
        model=loaded.source.name,
        degrees=degrees,
        dtype=str(loaded.dtype).removeprefix("torch."),
        against=str(against).removeprefix("torch."),
        versions=versions(),
        seed=seed,
        commit=number,
        dirty=dirty,
        date=today(),
        hardware=short_hardware(loaded.gpu, ranks),
        cache=cache.brief if (cache := cache_of(config.cache)) else "",
        quantize=method.brief if (method := quantize_of(config.quantize)) else "",
        attention=str(one) if (one := attention_of(config.attention)).acts else "",
        sparse=left_out.brief if (left_out := sparse_of(config.sparse)) else "",
        skipped=sum(calls) / len(calls) if calls else None,
        judged=judged,
    )
    return verdict, pairs


def worst_lpips(found: Tensor, want: Tensor, lpips: Lpips | None) -> dict[str, float]:
    """Of the worst of (N, 3, H, W) in 0..1; empty where it cannot be had."""
    if lpips is None or not len(want) or min(want.shape[-2:]) < LPIPS_PIXELS:
        return {}
    return {"worst_lpips": max(lpips(a[None], b[None]) for a, b in zip(found, want, strict=True))}


def _painted(run: Any, call: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """(output, latents after each step)."""
    latents: list[Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if "latents" in values:
            latents.append(values["latents"].detach().float().cpu())
        return values

    return run(**call | {CALLBACK: keep}), latents


def _tell_emoji(judged: list[Judged], pairs: list[Any], folder: Path) -> None:
    """Whose nearest training picture (mean squared error at 32 x 32) is the prompt's own."""
    captions: list[str] = json.loads((folder / "captions.json").read_text())
    sheet = np.asarray(Image.open(folder / "training_pictures.png").convert("RGB"), np.float32) / 255
    known = sheet.reshape(16, 32, 32, 32, 3).swapaxes(1, 2).reshape(512, -1)
    for one, pair in zip(judged, pairs, strict=True):
        if one.prompt not in captions:
            continue
        for which, picture in zip(("found", "exact"), pair, strict=True):
            small = np.asarray(_image(picture[0]).resize((32, 32), Image.Resampling.LANCZOS), np.float32) / 255
            nearest = int(np.mean((known - small.reshape(-1)) ** 2, axis=1).argmin())
            one.right[which] = captions[nearest] == one.prompt


def _image(picture: Tensor) -> Image.Image:
    """Of (3, H, W) in 0..1."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())


def write(verdict: Verdict, pairs: list[Any], folder: Path) -> list[Path]:
    """`quality.json`, `quality.md`, the plot of the error by step, and the sheet of the worst pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "quality.json"
    data.write_text(json.dumps(asdict(verdict), indent=1) + "\n")
    page = folder / "quality.md"
    page.write_text(markdown(verdict))
    sheet = folder / "worst.png"
    order = [verdict.judged.index(one) for one in verdict.worst[:NUM_WORST]]
    _sheet([pairs[i] for i in order]).save(sheet)
    return [data, page, sheet, *_plot(verdict, folder)]


def markdown(verdict: Verdict) -> str:
    """A table of the set and of its worst prompts."""
    layout = ", ".join(f"{axis} {degree}" for axis, degree in verdict.degrees.items()) or "one rank"
    if verdict.cache:
        layout += f" and cache {verdict.cache}"
    if verdict.quantize:
        layout += f" and quantize {verdict.quantize}"
    if verdict.sparse:
        layout += f" and sparse {verdict.sparse}"
    if verdict.attention:
        layout += f" and attention {verdict.attention}"
    figures = {name: [one.quality[name] for one in verdict.judged] for name in verdict.judged[0].quality}
    last = [one.step_errors[-1] for one in verdict.judged if one.step_errors]
    said = f" The cache skipped {verdict.skipped * 100:.0f}% of the calls." if verdict.skipped is not None else ""
    lines = [
        f"# {verdict.model} with {layout} in {verdict.dtype} against one rank in {verdict.against}",
        "",
        f"{len(verdict.judged)} prompts, seeds from {verdict.seed} on.{said}",
        "",
        "| | median | worst |",
        "|---|---:|---:|",
        _row("PSNR, dB", figures["worst_psnr_db"], min),
        _row("SSIM", figures["worst_ssim"], min),
        _row("largest difference, of 255", figures["largest_of_255"], max),
        *([_row("LPIPS", figures["worst_lpips"], max)] if "worst_lpips" in figures else []),
        *([_row("error of the last latents", last, max)] if last else []),
        "",
    ]
    if verdict.right("found") is not None:
        lines += [
            (
                f"Pictures whose nearest training picture is the right one: {verdict.right('found')} of "
                f"{len(verdict.judged)}, on one rank {verdict.right('exact')}."
            ),
            "",
        ]
    lines += ["| worst prompts | PSNR, dB | SSIM |", "|---|---:|---:|"]
    for one in verdict.worst[:NUM_WORST]:
        lines.append(f"| {one.prompt} | {one.quality['worst_psnr_db']:.1f} | {one.quality['worst_ssim']:.4f} |")
    return "\n".join(lines) + "\n"


def _row(name: str, values: list[float], worst: Any) -> str:
    return f"| {name} | {statistics.median(values):.3g} | {worst(values):.3g} |"


def _sheet(pairs: list[Any]) -> Image.Image:
    """Rows of: one rank, the configuration, their difference amplified."""
    sheet = Image.new("RGB", (3 * CELL, max(1, len(pairs)) * CELL), "white")
    for row, (found, want) in enumerate(pairs):
        difference = ((found[0] - want[0]).abs() * AMPLIFIED).clamp(0, 1)
        for column, picture in enumerate((want[0], found[0], difference)):
            sheet.paste(_image(picture).resize((CELL, CELL)), (column * CELL, row * CELL))
    return sheet


def _plot(verdict: Verdict, folder: Path) -> list[Path]:
    from matplotlib.figure import Figure

    curves = [one.step_errors for one in verdict.judged if one.step_errors]
    if not curves:
        return []
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(curves[0]) + 1)
    for curve in curves:
        axes.plot(steps, [max(error, 1e-9) for error in curve], color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, [max(1e-9, statistics.median(step)) for step in zip(*curves, strict=True)], color="black")
    axes.set(yscale="log", xlabel="step", ylabel="relative error of the latents", title="Each prompt, and their median")
    made = [folder / "step_error.svg", folder / "step_error.png"]
    for path in made:
        figure.savefig(path, dpi=120)
    return made
