"""Other engines' ways to speed the same pipeline up, switched on by their own public calls, with their own defaults.
What one cannot do here is an error, which becomes its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from parafuse.engine.stack import block_stack
from parafuse.engine.targets import DENOISERS
from parafuse.launch.bench.record import CALLS, RAN

Switch = Callable[[Any, int, float | None], Any]
"""(pipeline, ranks, threshold of a cache or None for its default) -> what is called in its place."""


def _denoisers(pipeline: Any) -> list[Any]:
    found = [getattr(pipeline, name, None) for name in DENOISERS]
    return [module for module in found if isinstance(module, nn.Module)]


def diffusers_context_parallel(pipeline: Any, ranks: int, threshold: float | None) -> Any:
    """https://huggingface.co/docs/diffusers/training/distributed_inference#context-parallelism"""
    from diffusers import ContextParallelConfig

    for module in _denoisers(pipeline):
        module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    return pipeline


def diffusers_first_block_cache(pipeline: Any, ranks: int, threshold: float | None) -> Any:
    """https://huggingface.co/docs/diffusers/optimization/cache"""
    from diffusers.hooks import FirstBlockCacheConfig

    for module in _denoisers(pipeline):
        module.enable_cache(FirstBlockCacheConfig() if threshold is None else FirstBlockCacheConfig(threshold))
    return pipeline


def cache_dit(pipeline: Any, ranks: int, threshold: float | None) -> Any:
    """https://github.com/vipshop/cache-dit"""
    import cache_dit as library  # pyright: ignore[reportMissingImports]

    if threshold is None:
        library.enable_cache(pipeline)
    else:
        library.enable_cache(pipeline, cache_config=library.DBCacheConfig(residual_diff_threshold=threshold))
    return pipeline


def para_attn_context_parallel(pipeline: Any, ranks: int, threshold: float | None) -> Any:
    """https://github.com/chengzeyi/ParaAttention"""
    from para_attn.context_parallel import init_context_parallel_mesh  # pyright: ignore[reportMissingImports]
    from para_attn.context_parallel.diffusers_adapters import parallelize_pipe  # pyright: ignore

    parallelize_pipe(pipeline, mesh=init_context_parallel_mesh(pipeline.device.type))
    return pipeline


def para_attn_first_block_cache(pipeline: Any, ranks: int, threshold: float | None) -> Any:
    """https://github.com/chengzeyi/ParaAttention"""
    from para_attn.first_block_cache.diffusers_adapters import apply_cache_on_pipe  # pyright: ignore

    apply_cache_on_pipe(pipeline, **({} if threshold is None else {"residual_diff_threshold": threshold}))
    return pipeline


def xfuser(pipeline: Any, ranks: int, threshold: float | None) -> Any:
    """https://github.com/xdit-project/xDiT"""
    from xfuser import xDiTParallel, xFuserArgs  # pyright: ignore[reportMissingImports]

    name = pipeline.config.get("_name_or_path") or type(pipeline).__name__
    engine, inputs = xFuserArgs(model=name, ulysses_degree=ranks, use_fbcache=ranks == 1).create_config()
    return xDiTParallel(pipeline, engine, inputs)


PEERS: dict[str, Switch] = {
    "diffusers context parallel": diffusers_context_parallel,
    "diffusers first-block cache": diffusers_first_block_cache,
    "cache-dit": cache_dit,
    "para-attn first-block cache": para_attn_first_block_cache,
    "para-attn context parallel": para_attn_context_parallel,
    "xfuser": xfuser,
}


def watch_blocks(pipeline: Any, count: Callable[[str], None]) -> None:
    """Counts, by torch's own hooks, the calls of each denoiser and those in which its last block did its work."""
    for module in _denoisers(pipeline):
        last = block_stack(module)[-1]
        inside = next(part for part in last.modules() if isinstance(part, nn.Linear))
        module.register_forward_pre_hook(lambda *_: count(CALLS))
        inside.register_forward_pre_hook(lambda *_: count(RAN))
