"""parafuse runs any diffusers pipeline on any number of GPUs, and gives the picture that one GPU would have given."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parafuse.attention import Attention
    from parafuse.cache import (
        Cache,
        DeepCache,
        FasterCache,
        FirstBlockCache,
        ForaCache,
        IntervalCache,
        MagCache,
        MaskCache,
        PyramidAttentionBroadcast,
        TaylorSeerCache,
        TeaCache,
        TGateCache,
        TokenMerging,
    )
    from parafuse.config import Config, Parallel
    from parafuse.engine.apply import Handle, apply
    from parafuse.engine.engine import Engine
    from parafuse.engine.plan import Plan
    from parafuse.engine.planning.choose import plans
    from parafuse.errors import ParafuseError
    from parafuse.launch.serve.async_engine import AsyncEngine, Progress, Result
    from parafuse.quantization import Fp8, Fp8Weight, Int8, Int8Weight, Quantize
    from parafuse.sparse import Content, Radial, Sparse, Window

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine", "Attention", "Cache", "Config", "Content", "DeepCache", "Engine", "FasterCache", "FirstBlockCache",
    "ForaCache", "Fp8", "Fp8Weight", "Handle", "Int8", "Int8Weight", "IntervalCache", "MagCache", "MaskCache",
    "ParafuseError", "Parallel", "Plan", "Progress", "PyramidAttentionBroadcast", "Quantize", "Radial", "Result",
    "Sparse", "TGateCache", "TaylorSeerCache", "TeaCache", "TokenMerging", "Window", "apply", "plans",
]  # fmt: skip

_HOMES = {
    **{name: "parafuse.cache" for name in __all__ if name.endswith(("Cache", "Broadcast", "Merging"))},
    **dict.fromkeys(("Quantize", "Fp8", "Fp8Weight", "Int8", "Int8Weight"), "parafuse.quantization"),
    **dict.fromkeys(("Sparse", "Window", "Radial", "Content"), "parafuse.sparse"),
    **dict.fromkeys(("AsyncEngine", "Progress", "Result"), "parafuse.launch.serve.async_engine"),
    "Attention": "parafuse.attention",
    "Config": "parafuse.config",
    "Parallel": "parafuse.config",
    "ParafuseError": "parafuse.errors",
    "Plan": "parafuse.engine.plan",
    "Engine": "parafuse.engine.engine",
    "Handle": "parafuse.engine.apply",
    "apply": "parafuse.engine.apply",
    "plans": "parafuse.engine.planning.choose",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'parafuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
