"""How long it takes to write what a request gave: pictures as PNG, videos as MP4."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FRAMES_PER_S = 24


def write_file(output: Any) -> dict[str, float]:
    """`file` -> seconds to write the pictures or videos of an output to a temporary folder; empty where there are
    none (latents), or where nothing here writes videos (imageio with ffmpeg does)."""
    with tempfile.TemporaryDirectory(prefix="parafuse-bench-") as folder:
        begun = time.perf_counter()
        written = _write(output, Path(folder))
        return {"file": time.perf_counter() - begun} if written else {}


def _write(output: Any, folder: Path) -> bool:
    images = getattr(output, "images", None)
    if isinstance(images, list) and images and all(hasattr(image, "save") for image in images):
        for number, image in enumerate(images):
            image.save(folder / f"{number}.png")
        return True
    videos = getattr(output, "frames", None)
    if not isinstance(videos, (list, np.ndarray)) or not len(videos):
        return False
    if importlib.util.find_spec("imageio") is None or importlib.util.find_spec("imageio_ffmpeg") is None:
        return False
    from diffusers.utils.export_utils import export_to_video

    for number, frames in enumerate(videos):
        export_to_video(list(frames), str(folder / f"{number}.mp4"), fps=FRAMES_PER_S)
    return True
