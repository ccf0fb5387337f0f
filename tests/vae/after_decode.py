"""Pipelines that do something when they have decoded, each another thing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import FluxPipeline

LATE = "a dog"
"""The prompt at which some do it."""
Flux: Any = FluxPipeline  # its types are too narrow for what follows


class CallsAfter(Flux):
    """Reads a prompt once more when it has decoded."""

    late = False

    @functools.wraps(Flux.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        if not self.late or kwargs["prompt"] == LATE:
            self.encode_prompt(prompt="x", prompt_2=None)
        return output


class CallsLate(CallsAfter):
    late = True


class Notes(Flux):
    """Notes something on itself when it has decoded."""

    @functools.wraps(Flux.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        self._number = getattr(self, "_number", 0) + 1
        return output


class SetsProcessors(Flux):
    """Sets the denoiser's attention processors when it has decoded, as those with perturbed attention do."""

    @functools.wraps(Flux.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        self.transformer.set_attn_processor({name: type(p)() for name, p in self.transformer.attn_processors.items()})
        return output


class SetsScheduler(Flux):
    """Changes the scheduler when it has decoded."""

    @functools.wraps(Flux.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        self.scheduler.set_begin_index(0)
        self.scheduler._shift = float(torch.rand(1, generator=torch.Generator().manual_seed(id(output) % 1000)))
        return output


class DrawsAfter(Flux):
    """Draws noise that comes from no seed when it has decoded."""

    @functools.wraps(Flux.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        torch.rand(1)
        return output


class DrawsBefore(Flux):
    """Draws noise that comes from no seed before it denoises."""

    @functools.wraps(Flux.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return super().__call__(*args, **kwargs)
