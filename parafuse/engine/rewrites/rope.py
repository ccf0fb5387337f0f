"""The rewrite `rope`: in blocks of two streams, each stream is turned by position before both are joined.

It is a pass over the graph of a compiled block, so it needs compile, and is given with each compile call: nothing is
set for the process, and no block is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from parafuse.engine.rewrites.rewrite import Rewrite

NAME = "rope"
PLACE = "post_grad_custom_pre_pass"
"""Inductor's option for passes over graphs of plain operators, before its own."""


def compile_options(names: Sequence[str], given: Mapping[str, Any] | None = None, *, mode: str = "") -> dict[str, Any]:
    """Options of one `torch.compile` (backend "inductor") that has these rewrites in it, beside `given` ones and those
    of `mode`, which torch does not take beside options. Empty where none is needed. Keep the dict: `lines_of` tells
    from it what was done."""
    options = dict(given or {})
    if mode and mode != "default":
        from torch._inductor import list_mode_options

        options = {**list_mode_options(mode), **options}
    if NAME in names:
        from parafuse.kernels.graph_passes.rope_order import RopeOrder

        before = _passes(options)
        if not any(isinstance(one, RopeOrder) for one in before):
            own = RopeOrder()
            options[PLACE] = [*before, own] if before else own
    return options


def pass_in(options: Mapping[str, Any]) -> Any:
    """The pass among those options; None where it is not."""
    from parafuse.kernels.graph_passes.rope_order import RopeOrder

    return next((one for one in _passes(options) if isinstance(one, RopeOrder)), None)


def _passes(options: Mapping[str, Any]) -> list[Any]:
    """All that stand there: torch takes one, or several."""
    there: Any = options.get(PLACE)
    return list(there) if isinstance(there, (list, tuple)) else [there] if there is not None else []


def lines_of(options: Mapping[str, Any]) -> list[str]:
    """What it did in all compile calls with these options, for receipts."""
    found = pass_in(options)
    if found is None:
        return []
    line = f"rewrite rope: {found.changed} of {found.graphs} graphs changed, {found.moved} concatenations moved"
    if found.asked and not found.graphs:
        line = "rewrite rope: graphs are from torch's cache of compiled code, where it was done"
    return [line]


def why_not_auto(module: nn.Module, *, compiles: bool) -> str:
    """Why `auto` leaves it off; empty where it pays."""
    if not compiles:
        return "changes the graphs of compiled blocks, and nothing is compiled"
    weight = next(module.parameters(), None)
    return "" if weight is not None and weight.is_cuda else "does not pay on a CPU: 1% slower there"


class JoinedLast(Rewrite):
    """It as one of the rewrites of a denoiser: what compiles its blocks takes `options`."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.options = compile_options((NAME,))

    def install(self) -> None:
        """Nothing is put on the model."""

    def remove(self) -> None:
        """What was compiled goes with what compiled it."""

    def compile_options(self) -> dict[str, Any]:
        return self.options

    def lines(self) -> list[str]:
        return lines_of(self.options)
