"""One pipeline with classifier-free guidance, small enough for a test: data, with where its values come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Guided:
    """A whole diffusers pipeline with tiny random weights, and one call of it with guidance."""

    name: str
    """Of the model, or of what the case adds to one: `Stable Diffusion XL: Heun`."""
    build: Callable[[], Any]
    """The pipeline in eval mode, on the CPU, in fp32; its weights are equal in every process."""
    call: Callable[[int], dict[str, Any]]
    """Number of prompts -> keywords of `__call__` without a generator, for the latents that 3 steps give. The rows of
    fewer prompts are the first rows of more."""
    source: str
    """Where the configuration comes from: diffusers' tests, the zoo's case of the transformer, or our own."""
    max_prompts: int = 4
    """The most prompts that one call takes; 1 where the pipeline knows no batch."""
