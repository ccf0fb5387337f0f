"""How many of 64 captions give the right picture, and the contact sheet that goes into the docs.

`python evaluate.py WORKDIR MODEL --sheet docs/emoji.png`: paints 64 captions drawn at random from the training set
(seed 0), looks for the nearest training picture (mean squared error at 32 x 32), counts the right ones.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

NUM_PROMPTS, BATCH = 64, 16


def thumbs(pictures: list[Image.Image]) -> np.ndarray:
    """(N, 32 * 32 * 3) in 0..1."""
    small = [np.asarray(p.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS), np.float32) for p in pictures]
    return np.stack(small).reshape(len(small), -1) / 255


def paint(model: Path, captions: list[str], **overrides: float) -> list[Image.Image]:
    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((model / "parafuse.json").read_text())["call"] | overrides
    out: list[Image.Image] = []
    for start in range(0, len(captions), BATCH):
        batch = captions[start : start + BATCH]
        call["negative_prompt"] = [""] * len(batch)
        generator = [torch.Generator().manual_seed(1000 + start + i) for i in range(len(batch))]
        out += pipeline(prompt=batch, generator=generator, **call).images
    return out


def sheet(painted: list[Image.Image], right: list[bool], columns: int = 16) -> Image.Image:
    """Four rows of 16 pictures, half size; a red frame around the wrong ones."""
    side = painted[0].width // 2
    rows = -(-len(painted) // columns)
    out = Image.new("RGB", (columns * side, rows * side), "white")
    for index, (picture, good) in enumerate(zip(painted, right, strict=True)):
        frame = Image.new("RGB", (side, side), "white" if good else "red")
        frame.paste(picture.resize((side - 6, side - 6)), (3, 3))
        out.paste(frame, (index % columns * side, index // columns * side))
    return out


def plot_curve(model: Path, path: Path) -> None:
    """Loss over images seen is not comparable between the stages (other tokens): one panel each."""
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    curve = json.loads((model / "training_curve.json").read_text())
    stages = sorted({point["stage"] for point in curve})
    figure, axes = plt.subplots(1, len(stages), figsize=(4.5 * len(stages), 3), squeeze=False)
    for stage, axis in zip(stages, axes[0], strict=True):
        points = [point for point in curve if point["stage"] == stage]
        axis.plot([p["step"] for p in points], [p["loss"] for p in points])
        axis.set(
            xlabel="step", ylabel="flow-matching loss", title=("64 pixels", "128 pixels", "128 pixels, again")[stage]
        )
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--curve", type=Path, help="PNG of the training curve (needs matplotlib)")
    parser.add_argument("--guidance", type=float)
    args = parser.parse_args()
    captions = [row["caption"] for row in json.loads((args.work / "captions.json").read_text())]
    chosen = random.Random(0).sample(range(len(captions)), NUM_PROMPTS)
    overrides = {} if args.guidance is None else {"true_cfg_scale": args.guidance}
    begun = time.perf_counter()
    painted = paint(args.model, [captions[i] for i in chosen], **overrides)
    seconds = (time.perf_counter() - begun) / NUM_PROMPTS
    pictures = torch.load(args.work / "pictures.pt").numpy()
    known = thumbs([Image.fromarray(p) for p in pictures])
    found = [int(np.mean((known - t) ** 2, axis=1).argmin()) for t in thumbs(painted)]
    right = [a == b for a, b in zip(found, chosen, strict=True)]
    wrong = [f"{captions[a]} -> {captions[b]}" for a, b in zip(chosen, found, strict=True) if a != b]
    print(f"{sum(right)} of {NUM_PROMPTS} right; {seconds:.2f} s a picture")
    print("wrong:", "; ".join(wrong))
    if args.sheet:
        sheet(painted, right).save(args.sheet)
    if args.curve:
        plot_curve(args.model, args.curve)


if __name__ == "__main__":
    main()
