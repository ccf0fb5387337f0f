"""Pipelines whose autoencoder has several tiles in a small picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.guided import wan
from tests.vae.case import build, tile
from tests.vae.zoo import CASES


def wan_pipeline(*, tiled: bool) -> Any:
    """Wan, text to video: 12 tiles of a video of 3 latent frames."""
    case = next(case for case in CASES if case.name == "AutoencoderKLWan")
    pipeline: Any = wan.build()
    pipeline.register_modules(vae=tile(case, build(case)))
    pipeline.vae.use_tiling = tiled
    pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal = 4, 2
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def video(pipeline: Any, count: int = 1) -> Tensor:
    """Of so many prompts."""
    keywords = wan.call(count) | dict(output_type="pt", generator=torch.Generator().manual_seed(0))
    return pipeline(**keywords)[0]
