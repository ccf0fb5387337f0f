"""Which denoisers can have a cache, which caches a denoiser can have, and by which rule these decide."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from parafuse.cache import (
    METHODS,
    TRANSFORMER,
    UNET,
    Cache,
    DeepCache,
    FirstBlockCache,
    IntervalCache,
    MagCache,
    MaskCache,
    StackCache,
    TeaCache,
    calibration_of,
)
from parafuse.calibration import Curves
from parafuse.engine.caches.hosts import missing_parts
from parafuse.engine.caches.mag import Magnitude
from parafuse.engine.caches.rules import Interval, Mask, Rule, Threshold
from parafuse.engine.caches.tea import Accumulated
from parafuse.engine.caches.units import is_unet, skeleton_of
from parafuse.errors import ConfigError, UnsupportedError


def fitting(cache: Cache, modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Names of the denoisers that can have the cache. Raises ConfigError where none can."""
    found: list[str] = []
    why_not: list[str] = []
    for name, module in modules:
        try:
            why = _why_not(cache, module)
        except UnsupportedError as error:
            why_not.append(f"{name}: {error}")
            continue
        if why:
            why_not.append(f"{name} ({type(module).__name__}) {why}")
            continue
        curves_for(cache, name, module)
        found.append(name)
    if not found:
        raise ConfigError(f"cache={str(cache)!r}: {'; '.join(why_not) or 'there is no denoiser to put it on.'}")
    return found


def caches_for(kind: str) -> str:
    """The caches that a kind of denoiser can have, as a list in words."""
    return ", ".join(name for name, cache in METHODS.items() if kind in cache.models)


def refuse_kind(cache: Cache, kinds: set[str], model: str) -> None:
    """Raises ConfigError for a model with denoisers of these kinds alone, before it is loaded."""
    if kinds and not kinds & set(cache.models):
        kind = sorted(kinds)[0]
        raise ConfigError(
            f"cache={cache.method!r}: is for a {' or a '.join(cache.models)}, and {model!r} has a {kind}, which can "
            f"have {caches_for(kind)}."
        )


def _why_not(cache: Cache, module: nn.Module) -> str:
    kind = UNET if is_unet(module) else TRANSFORMER
    if kind not in cache.models:
        return f"is a {kind}, which can have {caches_for(kind)}."
    if isinstance(cache, StackCache):
        return skeleton_of(module).why_not(cache.leading, cache.last_blocks)
    missing = missing_parts(cache, module)
    if not missing:
        return ""
    others = [name for name, one in METHODS.items() if kind in one.models and not missing_parts(one, module)]
    return f"has no {missing} of its own to reuse; it can have {', '.join(others)}."


def rule_of(cache: Cache, curves: Curves | None = None) -> Rule:
    """The rule of a cache that skips a stack. `curves`: what was measured of the denoiser beforehand."""
    if isinstance(cache, FirstBlockCache):
        return Threshold(cache.threshold)
    if isinstance(cache, TeaCache):
        return Accumulated(cache.threshold, curves)
    if isinstance(cache, MagCache) and curves is not None:
        return Magnitude(cache.threshold, curves)
    if isinstance(cache, (IntervalCache, DeepCache)):
        return Interval(cache.every, cache.warmup_steps)
    if isinstance(cache, MaskCache):
        return Mask(cache.steps)
    raise TypeError(f"{type(cache).__name__}: has no rule; a new cache needs one here")


def curves_for(cache: Cache, name: str, module: nn.Module) -> Curves | None:
    """What was measured of a denoiser; None where the cache has no calibration. Raises ConfigError where that is of
    others."""
    calibration = calibration_of(cache)
    return calibration.curves(name, architecture_of(module)) if calibration is not None else None


def architecture_of(module: nn.Module) -> str:
    """Its class, and a fingerprint of its configuration, where it has one."""
    config: Any = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        return type(module).__name__
    values = {str(k): v for k, v in config.items() if not str(k).startswith("_") and k != "quantization_config"}
    text = json.dumps(values, sort_keys=True, default=str)
    return f"{type(module).__name__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


KINDS = {TRANSFORMER: ("transformer", "transformer_2", "unconditional_transformer"), UNET: ("unet", "image_unet")}
"""Kind -> the pipeline components that are of it."""
