"""What the pipelines are put together from, and what they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.collect import randomized

PROMPTS = ("a cat", "the red apple", "a red cat", "the apple")
NEGATIVE_PROMPTS = ("the red", "a", "apple", "cat the")
NO_TEXT: dict[str, Any] = dict(text_encoder=None, tokenizer=None)
"""Components of pipelines that are given embeddings."""
NO_TEXTS: dict[str, Any] = NO_TEXT | dict(text_encoder_2=None, tokenizer_2=None)
STEPS = 3
"""The fewest with a first step, one between, and a last."""


def assemble(pipeline: str, **parts: Any) -> Any:
    """The pipeline of this name from its components, each with random weights of its own."""
    import diffusers

    return finished(getattr(diffusers, pipeline)(**_randomized(parts)))


def made(name: str, config: Mapping[str, Any], **changes: Any) -> Any:
    """The class of diffusers with this name from a configuration and what is different here."""
    import diffusers

    return getattr(diffusers, name)(**{**config, **changes})


def finished(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _randomized(parts: dict[str, Any]) -> dict[str, Any]:
    for seed, part in enumerate(parts.values()):
        if isinstance(part, nn.Module):
            randomized(part.eval().requires_grad_(False), seed)
    return parts


def prompts(count: int) -> dict[str, Any]:
    return dict(prompt=list(PROMPTS[:count]), negative_prompt=list(NEGATIVE_PROMPTS[:count]))


def rows(count: int, *shape: int, seed: int) -> Tensor:
    """(count, *shape) of random values, a row for each prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])


def legible(count: int, tokens: int, *, missing: int = 0) -> Tensor:
    """(count, tokens) of 0 and 1: every prompt is a token shorter than the one before, the first lacks `missing`."""
    lengths = (tokens - missing - torch.arange(count)).clamp(min=1)
    return (torch.arange(tokens) < lengths[:, None]).long()


def picture(height: int, width: int, *, seed: int = 5) -> Any:
    """A PIL image of noise."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
