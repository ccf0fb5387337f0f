"""Finds the block stack of a denoiser: the repeated modules that hold its attention, in execution order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from parafuse.errors import UnsupportedError


def _named_classes(model: nn.Module) -> set[str]:
    """Block class names that the model itself declares (`_repeated_blocks`, `_no_split_modules`)."""
    names: set[str] = set()
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        declared: Any = getattr(model, attribute, None)
        names |= set(declared or ())
    return names


def _runs(item: nn.Module | None) -> bool:
    """Whether it has a forward; some lists have empty places."""
    return item is not None and type(item).forward is not nn.Module.forward


def _lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost ModuleLists whose items have a forward of their own."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and all(_runs(item) for item in child):
            yield child
        else:
            yield from _lists(child)


def block_stack(model: nn.Module) -> list[nn.Module]:
    """The blocks that may be split, in registration order. Raises UnsupportedError when there are none.

    A ModuleList counts when the model declares its items' class, or, if the model declares none, when it stands
    directly on the model (as a user's own transformer would have it)."""
    declared = _named_classes(model)
    lists = list(_lists(model))
    blocks = [block for items in lists for block in items if type(block).__name__ in declared]
    if not blocks:
        direct = {id(child) for child in model.children()}
        blocks = [block for items in lists if id(items) in direct for block in items]
    if not blocks:
        raise UnsupportedError(
            f"{type(model).__name__}: no block stack found (no ModuleList of repeated blocks); sequence parallel "
            "needs one. Run it on one rank."
        )
    return list(dict.fromkeys(blocks))  # a block that is used twice is wrapped once


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> each repeated block, of any model of layers: a denoiser, also a UNet, or a text encoder.

    Items of lists whose class the model declares (`_repeated_blocks`, or else `_no_split_modules`, which has patch
    embedders too); where it declares none, or none is there, the items of its outermost ModuleLists."""
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        declared: Any = getattr(model, attribute, None) or ()
        named = model.named_modules()
        found = {name: one for name, one in named if type(one).__name__ in declared and name.split(".")[-1].isdigit()}
        if found:
            return {name: one for name, one in found.items() if not _is_inside(name, found)}
    items = {id(item) for each in _lists(model) for item in each}
    return {name: one for name, one in model.named_modules() if id(one) in items}


def _is_inside(name: str, others: dict[str, nn.Module]) -> bool:
    """Whether it is part of another one."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in others for length in range(1, len(parts)))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """What is compiled of a denoiser: of a transformer its block stack; of a UNet the transformer blocks of all its
    levels, its residual layers and what makes it smaller and larger. Raises UnsupportedError when there are none."""
    if not is_unet(model):
        return block_stack(model)
    found = [
        item
        for path, items in model.named_modules()
        if isinstance(items, nn.ModuleList) and path.rpartition(".")[2] in UNET_LISTS
        for item in items
        if isinstance(item, nn.Module)
    ]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__}: has none of {', '.join(UNET_LISTS)} to compile; leave compile=True out."
        )
    return list(dict.fromkeys(found))


def attending_parts(model: nn.Module) -> list[nn.Module]:
    """What a chosen attention backend stands on: the block stack, as where it is split; of other models the whole."""
    try:
        return [model] if is_unet(model) else block_stack(model)
    except UnsupportedError:
        return [model]


UNET_LISTS = ("transformer_blocks", "resnets", "downsamplers", "upsamplers")
"""ModuleLists of a UNet whose items are compiled."""


def is_unet(module: nn.Module) -> bool:
    """Whether a denoiser goes down to smaller resolutions and up again."""
    return hasattr(module, "down_blocks") and hasattr(module, "up_blocks")
