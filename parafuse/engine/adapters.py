"""Adapters that do not fit a pipeline: one clear error, and nothing of them stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from parafuse.engine.surface import Act
from parafuse.errors import ConfigError

LOADS = ("load_lora_weights", "load_lora_adapter")


@contextmanager
def fitting(act: Act, pipeline: Any) -> Iterator[None]:
    """Around a method on every rank. Raises ConfigError where it loads an adapter of another architecture, of which
    diffusers says so in its own words, or, where no name in it fits, in its log alone."""
    if act.name not in LOADS:
        yield
        return
    before = adapters(pipeline)
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, ValueError, LookupError) as error:
        for part, names in adapters(pipeline).items():
            for name in names - before.get(part, set()):
                with suppress(ValueError, KeyError):  # it was taken off by itself
                    getattr(pipeline, part).delete_adapters(name)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"{act}: the adapter does not fit this model ({' '.join(lines[:2])}).") from error
    if adapters(pipeline) == before and not act.kwargs.get("hotswap"):
        raise ConfigError(
            f"{act}: nothing in the adapter is for a part of {type(pipeline).__name__} ({', '.join(before)}); it is "
            "one for another architecture, or its names need another prefix."
        )


def adapters(pipeline: Any) -> dict[str, set[str]]:
    """Component -> names of the adapters on it."""
    parts = {name: part for name, part in pipeline.components.items() if hasattr(part, "load_lora_adapter")}
    parts |= {name: part for name, part in pipeline.components.items() if _configs(part)}
    return {name: _configs(part) | _norms(part) for name, part in parts.items()}


def _configs(part: Any) -> set[str]:
    return set(getattr(part, "peft_config", None) or ()) if isinstance(part, nn.Module) else set()


def _norms(part: Any) -> set[str]:
    """FLUX's adapters may have norms alone."""
    return {"norms"} if getattr(part, "_transformer_norm_layers", None) else set()
