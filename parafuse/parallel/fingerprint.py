"""What makes two blocks, or two calls of one, alike: the keys under which plans are kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

DIGITS = 12
"""Of a number in a fingerprint."""


def size_of(leaf: Any) -> Any:
    """What of an argument may change from call to call and could mislead a plan: sizes, and whole numbers."""
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, int) else None


def signature(leaf: Any) -> Any:
    """What of an argument decides how a block is split: its structure, never its lengths."""
    if isinstance(leaf, Tensor):
        return (leaf.dtype, tuple(min(size, 2) for size in leaf.shape))
    return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf).__name__


SCALES = ("scaling",)
"""Numbers that adapters multiply with, as peft names them: calls set them and put them back."""


def fingerprint(block: nn.Module, but: tuple[str, ...] = ()) -> str:
    """Equal for blocks that differ in weights only: class, submodules with their shapes, and all other attributes
    `but` for some."""
    facts = [
        (name, key, _fact(value))
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if key not in _MODULE_STATE | _WHERE_FROM and key not in but and not isinstance(value, (Tensor, nn.Module))
    ]
    packed = [
        (name, type(p).__name__, getattr(p, "act_quant_kwargs", None) is not None)
        for name, p in block.named_parameters()
        if type(p) is not nn.Parameter
    ]  # what such weights compute is up to them
    return f"{type(block).__module__}.{block!r}{facts}{packed or ''}"


def hooks_in(parts: list[nn.Module]) -> tuple[Any, ...]:
    """What stands on parts of a block now, beside their classes, and may change what they compute: hooks of diffusers
    (its guiders put some on for one branch, and take them off again), of torch, and replaced forwards."""
    found: list[Any] = []
    for index, part in enumerate(parts):
        state = vars(part)
        hooks: Any = getattr(state.get("_diffusers_hook"), "hooks", None)
        if hooks:
            found += [(index, name, repr(_fact(hook, 1))) for name, hook in hooks.items() if name not in _PLACING]
        elif hooks is None and "forward" in state and "_hf_hook" not in state and not is_part(part):
            if getattr(state["forward"], "parafuse_weights", False):
                continue  # it lets weights come, and changes nothing else
            found.append((index, id(state["forward"])))
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            if state[kind]:
                found.append((index, kind, *map(id, state[kind].values())))
    return tuple(found)


def is_part(module: nn.Module) -> bool:
    """Whether a cache stands on this part of a block: it does nothing while a block is examined."""
    return getattr(vars(module).get("forward"), "parafuse_part", False)


_PLACING = {
    *"group_offloading layer_execution_tracker lazy_prefetch_group_offloading".split(),
    *"layerwise_casting peft_autocast_disable".split(),
}
"""Hooks of diffusers that move or cast weights."""
_WHERE_FROM = {
    *"_name_or_path name_or_path _commit_hash _use_default_values".split(),
    *"architectures dtype torch_dtype transformers_version target_name hf_quantizer".split(),
}
"""Differs by machine, by process (a set as a list) or by layer (an adapter's), or is set when a model is saved; what a
module does, it does not say."""
_MODULE_STATE = {
    *vars(nn.Module()),
    "forward",
    "compile",
    "decode",
    "encode",
    "_hf_hook",
    "_old_forward",
    "_diffusers_hook",
}
"""What torch keeps, and what is put on modules to run them: parafuse, hooks that name the rank's own device."""


def _fact(value: Any, depth: int = 2) -> Any:
    """A value for comparison: plain ones as they are, objects (attention processors, say) by type and attributes."""
    if isinstance(value, float):  # adapters' scales are set and put back by each call, and pick up rounding
        return float(f"{value:.{DIGITS}g}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_fact(item, depth) for item in value]
    if isinstance(value, dict):
        return sorted((str(key), repr(_fact(item, depth))) for key, item in value.items() if key not in _WHERE_FROM)
    name = getattr(value, "__qualname__", None)
    if name is not None:  # a function or a class
        return f"{getattr(value, '__module__', '')}.{name}"
    kept = _fact(vars(value), depth - 1) if depth and hasattr(value, "__dict__") else None
    return (f"{type(value).__module__}.{type(value).__qualname__}", kept)
