"""What a cache may skip of a denoiser: its units in the order in which they run, and which run of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from parafuse.cache import TRANSFORMER, UNET
from parafuse.engine.caches.streams import Seen
from parafuse.engine.stack import block_stack, is_unet
from parafuse.errors import UnsupportedError


@dataclass(frozen=True)
class Span:
    """Places in the order of units: those from `start` to before `end` may be skipped."""

    first: int
    """The first unit of the stack; those before prepare its streams."""
    start: int
    end: int


class Skeleton(Protocol):
    """How the units of one kind of denoiser hang together."""

    kind: str
    units: list[nn.Module]
    openers: set[nn.Module]
    """The first units of its lists."""

    def why_not(self, leading: int, trailing: int) -> str:
        """Why nothing is left to skip, or that cannot be kept; empty where it can."""
        ...

    def starts(self, seen: Sequence[Seen]) -> list[int]:
        """Where the stack may start, after the units that ran in one call: the first place whose stream depends on the
        sample."""
        ...

    def span(self, seen: Sequence[Seen], first: int, leading: int, trailing: int) -> Span:
        """What may be skipped of a stack that starts at `first`. Raises UnsupportedError where that is nothing."""
        ...


class Stack:
    """The blocks of a transformer."""

    kind = TRANSFORMER

    def __init__(self, module: nn.Module):
        self.units = block_stack(module)
        self._lists = [items for items in module.modules() if isinstance(items, nn.ModuleList) and len(items)]
        self.openers = {items[0] for items in self._lists}

    def why_not(self, leading: int, trailing: int) -> str:
        always = leading + trailing
        if always < len(self.units):
            return ""
        return f"has {len(self.units)} blocks, of which {always} would run in every step: nothing is left to skip."

    def starts(self, seen: Sequence[Seen]) -> list[int]:
        """Blocks that work on a part of the tokens only (refiners of the text or the picture), or that give something
        beside their streams for others to use (hints of a control branch), prepare the stack."""
        aside = [place for place, one in enumerate(seen) if None in one.sources.values()]
        after = aside[-1] + 1 if aside and aside[-1] + 1 < len(seen) else 0
        numbers = [one.stream_numbers for one in seen[after:]]
        most = max(numbers, key=lambda number: (number * numbers.count(number), number))  # where most work is done
        enough = [after + place for place, number in enumerate(numbers) if number >= most]
        list_of = {unit: i for i, items in enumerate(self._lists) for unit in items}
        return [p for p in enough if p == enough[0] or list_of.get(seen[p].unit) != list_of.get(seen[p - 1].unit)]

    def span(self, seen: Sequence[Seen], first: int, leading: int, trailing: int) -> Span:
        return _checked(Span(first, first + leading, len(seen) - trailing), seen)


class Levels:
    """The layers of a UNet, and its middle."""

    kind = UNET

    def __init__(self, module: nn.Module):
        down, up = getattr(module, "down_blocks", None), getattr(module, "up_blocks", None)
        if down is None or up is None or any(not hasattr(block, "resnets") for block in (*down, *up)):
            raise UnsupportedError(
                f"{type(module).__name__}: has no down_blocks and up_blocks of resnets to skip; UNets that have can "
                "have a cache: UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel, "
                "UNetSpatioTemporalConditionModel."
            )
        middle = [module.mid_block] if getattr(module, "mid_block", None) is not None else []
        self.units = [*_layers(down), *middle, *_layers(up)]
        self.openers = set()
        self._down = [
            unit for block in down for unit in (*block.resnets, *(getattr(block, "downsamplers", None) or ()))
        ]
        self._up = [unit for block in up for unit in block.resnets]

    def why_not(self, leading: int, trailing: int) -> str:
        most = min(len(self._down), len(self._up) - 1) - 1
        if leading > most:
            return f"has layers to skip beside {most} leading ones at most; {leading} are asked for."
        if trailing:
            return "has no last blocks to choose: the layers of the way up that run follow from the leading ones."
        return ""

    def starts(self, seen: Sequence[Seen]) -> list[int]:
        return [0]

    def span(self, seen: Sequence[Seen], first: int, leading: int, trailing: int) -> Span:
        """`leading` layers at the top run, and the layers of the way up that take what these give."""
        starts = [place for place, one in enumerate(seen) if one.unit in self._down]
        ups = [place for place, one in enumerate(seen) if one.unit in self._up]
        if leading >= len(starts) or leading + 1 >= len(ups):  # it ran fewer layers than it has
            raise UnsupportedError(f"a cache with {leading} leading layers leaves nothing of this UNet to skip.")
        return _checked(Span(first, starts[leading], ups[-1 - leading]), seen)


def skeleton_of(module: nn.Module) -> Skeleton:
    """How a denoiser can be skipped. Raises UnsupportedError where it cannot."""
    return Levels(module) if is_unet(module) else Stack(module)


def _layers(blocks: nn.ModuleList) -> list[nn.Module]:
    return [
        unit for block in blocks for items in block.children() if isinstance(items, nn.ModuleList) for unit in items
    ]


def _checked(span: Span, seen: Sequence[Seen]) -> Span:
    if span.start >= span.end:
        raise UnsupportedError(
            f"a cache leaves nothing to skip of {len(seen)} blocks: {span.start} run before and {len(seen) - span.end} "
            "after what it may skip; ask for fewer first_blocks or last_blocks, or no cache."
        )
    return span
