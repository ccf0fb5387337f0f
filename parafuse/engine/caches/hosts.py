"""The blocks whose parts a cache may reuse, and whether a denoiser has what a cache needs."""

from __future__ import annotations

from torch import nn

from parafuse.cache import Cache, StackCache, TGateCache, TokenMerging
from parafuse.engine.caches.anatomy import TIME, may_have
from parafuse.engine.caches.schedules import CROSS, SELF
from parafuse.engine.stack import block_stack, is_unet
from parafuse.errors import UnsupportedError


def hosts_of(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> block: of a transformer its block stack, of a UNet the transformer blocks of all its levels. Raises
    UnsupportedError where there are none."""
    paths = {part: path for path, part in module.named_modules()}
    if not is_unet(module):
        return {paths[block]: block for block in block_stack(module)}
    found = {
        paths[block]: block
        for path, items in module.named_modules()
        if isinstance(items, nn.ModuleList) and path.endswith("transformer_blocks")
        for block in items
    }
    if not found:
        raise UnsupportedError(f"{type(module).__name__}: has no transformer blocks, whose parts could be reused.")
    return found


def merging_hosts(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> block of a UNet whose self-attention runs over the tokens of one picture, or of one frame."""
    return {
        path: block
        for path, block in hosts_of(module).items()
        if isinstance(getattr(block, "attn1", None), nn.Module) and not TIME.search(path)
    }


def missing_parts(cache: Cache | type[Cache], module: nn.Module) -> str:
    """What a cache would reuse and a denoiser has not, as far as its modules tell before a call; empty: nothing."""
    kind = cache if isinstance(cache, type) else type(cache)
    if issubclass(kind, StackCache):
        return ""
    wanted = CROSS if issubclass(kind, TGateCache) else SELF
    try:
        hosts = hosts_of(module)
    except UnsupportedError:
        return wanted
    if issubclass(kind, TokenMerging):
        return "" if merging_hosts(module) else wanted
    return "" if any(may_have(wanted, block) for block in hosts.values()) else wanted
