"""What makes two blocks, or two calls of one, alike: the keys under which plans are kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def size_of(leaf: Any) -> Any:
    """What of an argument may change from call to call and could mislead a plan: sizes, and whole numbers."""
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, int) else None


def signature(leaf: Any) -> Any:
    """What of an argument decides how a block is split: its structure, never its lengths."""
    if isinstance(leaf, Tensor):
        return (leaf.dtype, tuple(min(size, 2) for size in leaf.shape))
    return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf).__name__


def fingerprint(block: nn.Module) -> str:
    """Equal for blocks that differ in weights only: class, submodules with their shapes, and all other attributes."""
    facts = [
        (name, key, _fact(value))
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if key not in _MODULE_STATE and not isinstance(value, (Tensor, nn.Module))
    ]
    return f"{type(block).__module__}.{block!r}{facts}"


_MODULE_STATE = {*vars(nn.Module()), "forward", "compile"}


def _fact(value: Any, depth: int = 2) -> Any:
    """A value for comparison: plain ones as they are, objects (attention processors, say) by type and attributes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_fact(item, depth) for item in value]
    if isinstance(value, dict):
        return [(str(key), _fact(item, depth)) for key, item in value.items()]
    name = getattr(value, "__qualname__", None)
    if name is not None:  # a function or a class
        return f"{getattr(value, '__module__', '')}.{name}"
    kept = _fact(vars(value), depth - 1) if depth and hasattr(value, "__dict__") else None
    return (f"{type(value).__module__}.{type(value).__qualname__}", kept)
