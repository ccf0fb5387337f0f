"""Figures of pictures, by a kept library: of pairs (PSNR, SSIM, LPIPS), and of two sets (the Fréchet distance).

D: features. Weights are taken from where they lie, and never downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from parafuse.errors import ConfigError
from parafuse.launch.bench.fidelity import Lpips, compare, pictures

INCEPTION_FEATURES = 2048


def of_pair(found: Image, want: Image, lpips: Lpips | None) -> dict[str, float]:
    """PSNR in dB, SSIM, the largest difference of 255, and LPIPS where there is a function for it."""
    a, b = pictures([found]), pictures([want])
    figures = compare(a, b)
    kept = {name: figures[name] for name in ("psnr_db", "ssim", "largest_of_255")}
    return kept | ({"lpips": lpips(a, b)} if lpips else {})


def frechet_distance(found_ND: Tensor, want_ND: Tensor) -> float:
    """Between Gaussians with the means and covariances of two sets of features, in float64.

    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)); each set needs two rows. Heusel et al. 2017, arXiv:1706.08500."""
    as_they_are: Any = nn.Identity()
    as_they_are.num_features = found_ND.shape[-1]
    metric = FrechetInceptionDistance(feature=as_they_are).set_dtype(torch.float64)
    metric.update(want_ND.double(), real=True)
    metric.update(found_ND.double(), real=False)
    return max(0.0, float(metric.compute()))  # equal sets are a rounding below or above


def check_inception(path: str) -> None:
    """Raises ConfigError where `path` is not the weights of torch-fidelity's Inception v3.

    They are unpickled as tensors only: torch-fidelity's own reading would run what the file says."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ConfigError(f"--inception {path!r}: needs torch-fidelity; pip install 'parafuse[eval]'.")
    name = "weights-inception-2015-12-05-6726825d.pth"
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        shape = tuple(found["fc.weight"].shape)
    except Exception as error:  # whatever unpickling raises
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ConfigError(
            f"--inception {path!r}: is no file of weights that can be read ({why}); give torch-fidelity's {name}."
        ) from error
    if shape != (1008, INCEPTION_FEATURES):
        raise ConfigError(
            f"--inception {path!r}: fc.weight is {shape}; must be (1008, 2048): give torch-fidelity's {name}."
        )


def inception_distance(path: str, found: Iterable[Image], want: Iterable[Image], device: str) -> float:
    """FID with torch-fidelity's Inception v3, scaled as TensorFlow 1 did (no antialiasing): the usual one, in float64.

    Pictures are taken one by one, so that they may have any sizes. After `check_inception`."""
    try:
        metric = FrechetInceptionDistance(INCEPTION_FEATURES, feature_extractor_weights_path=path, antialias=False)
    except RuntimeError as error:  # of load_state_dict
        why = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"--inception {path!r}: has other weights than torch-fidelity's Inception v3 ({why})."
        ) from error
    metric = metric.to(device).set_dtype(torch.float64)
    for images, real in ((want, True), (found, False)):
        for image in images:
            pixels_1CHW = torch.from_numpy(np.array(image)).movedim(-1, 0)[None]
            metric.update(pixels_1CHW.to(device), real=real)
    return max(0.0, float(metric.cpu().compute()))  # not every CUDA build of torch has the eigenvalues
