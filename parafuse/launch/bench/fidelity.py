"""Pictures against pictures: in float, by a kept library. A video counts frame by frame, and by its worst one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from parafuse.errors import ConfigError, ModelError

LPIPS_PIXELS = 31
"""Of each side: AlexNet's layers leave nothing of less."""
Lpips = Callable[[Tensor, Tensor], float]
OF_SEVERAL: dict[str, Callable[[list[float]], float]] = {
    "psnr_db": lambda values: float(np.mean(values)),
    "ssim": lambda values: float(np.mean(values)),
    "worst_psnr_db": min,
    "worst_ssim": min,
    "largest_of_255": max,
    "latent_error": max,
}
"""Figure -> what it is of several."""
SAME_DB = 99.0
"""Stands for the infinite ratio of equal pictures, which JSON cannot hold."""


def pictures(output: Any) -> Tensor:
    """(N, 3, H, W) in 0..1 of a pipeline's output: pictures, or the frames of videos. Empty where there are none."""
    found = getattr(output, "images", None)
    if found is None:
        found = getattr(output, "frames", None)
    if found is None and isinstance(output, (list, tuple, np.ndarray, Tensor)):
        found = output
    if found is None or (isinstance(found, (list, tuple)) and not found):
        return torch.empty(0, 3, 0, 0)
    if isinstance(found, Tensor):
        return found.float().flatten(0, -4) if found.ndim > 3 else found.float()[None]
    if isinstance(found, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(found))
        values = values.float() / 255 if values.dtype == torch.uint8 else values.float()
        return values.flatten(0, -4).movedim(-1, 1) if values.ndim > 3 else values.movedim(-1, 0)[None]
    flat = [frame for item in found for frame in (item if isinstance(item, (list, tuple)) else [item])]
    arrays = [np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture) for picture in flat]
    scaled = [array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1) for array in arrays]
    if len({array.shape for array in scaled}) > 1:
        raise ConfigError(f"pictures: have different sizes, {sorted({array.shape[:2] for array in scaled})}.")
    return torch.from_numpy(np.stack(scaled)).movedim(-1, 1)


def compare_outputs(found: Any, want: Any, call: dict[str, Any]) -> dict[str, float]:
    """Figures of one output against another of the same call: of pictures; of latents where the call asked for them."""
    if call.get("output_type") != "latent":
        return compare(pictures(found), pictures(want))
    mine, other = (tree_leaves(vars(output) if hasattr(output, "__dict__") else output) for output in (found, want))
    errors = [relative_error(a, b) for a, b in zip(mine, other, strict=True) if isinstance(b, Tensor)]
    return {"latent_error": max(errors)} if errors else {}


def relative_error(found: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    found, want = found.float(), want.float()
    return float((found - want).abs().max() / want.abs().max().clamp_min(1e-30))


def compare(found: Tensor, want: Tensor) -> dict[str, float]:
    """Figures of the mean and of the worst picture: PSNR in dB, SSIM, the largest difference of 255.

    Both (N, 3, H, W) in 0..1. Raises ConfigError where they have different sizes."""
    if found.shape != want.shape:
        raise ConfigError(f"pictures: {tuple(found.shape)} cannot be compared with {tuple(want.shape)}; sizes differ.")
    if not len(want):
        return {}
    found, want = found.float().cpu().clamp(0, 1), want.float().cpu().clamp(0, 1)
    psnr = [psnr_db(a, b) for a, b in zip(found, want, strict=True)]
    ssim = [_ssim(a[None], b[None]) for a, b in zip(found, want, strict=True)]
    return {
        "psnr_db": float(np.mean(psnr)),
        "worst_psnr_db": min(psnr),
        "ssim": float(np.mean(ssim)),
        "worst_ssim": min(ssim),
        "largest_of_255": float((found - want).abs().max()) * 255,
    }


def over_prompts(each: dict[str, list[float]]) -> dict[str, float]:
    """One set of figures from those of each prompt: means, worst ones, and medians as `median_ssim`."""
    made = {name: OF_SEVERAL[name](values) for name, values in each.items()}
    return made | {f"median_{name}": float(np.median(each[name])) for name in ("psnr_db", "ssim") if name in each}


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise, in dB, of values in 0..1; black against white is 0. Equal pictures: `SAME_DB`."""
    return min(SAME_DB, float(peak_signal_noise_ratio(a, b, data_range=1.0)))


def _ssim(a: Tensor, b: Tensor) -> float:
    found: Any = structural_similarity_index_measure(a, b, data_range=1.0)
    return float(found)


def lacks_lpips(smallest: int) -> str:
    """Why LPIPS (on AlexNet) cannot be had for pictures whose shortest side has `smallest` pixels; '' where it can."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed: pip install 'parafuse[eval]'"
    models: Any = importlib.import_module("torchvision.models")
    url: str = models.AlexNet_Weights.DEFAULT.url
    weights = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not weights.is_file():
        return f"its weights are not at hand, and nothing is downloaded: put {url} at {weights}"
    if smallest < LPIPS_PIXELS:
        return f"a picture has a side of {smallest} pixels, and AlexNet needs {LPIPS_PIXELS}"
    return ""


def lpips_on(device: str) -> Lpips:
    """LPIPS on AlexNet of two pictures (1, 3, H, W) in 0..1. Zhang et al. 2018, arXiv:1801.03924.

    Only after `lacks_lpips` has found nothing lacking. Raises ModelError where the weights cannot be loaded."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
    except Exception as error:  # whatever unpickling and load_state_dict raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"LPIPS: AlexNet's weights in {torch.hub.get_dir()!r} cannot be loaded ({why}).") from error

    def lpips(a: Tensor, b: Tensor) -> float:
        return float(metric(a.to(device), b.to(device)))

    return lpips
