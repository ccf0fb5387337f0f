"""A model of blocks whose weights come and go, as tests of that put them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parafuse.engine.offload.component import RootCalls, Summons, UnitCalls
from parafuse.engine.offload.units import groups_of
from parafuse.parallel.carry import HostCarrier, Ledger
from parafuse.parallel.homes import Home, HostHome
from parafuse.parallel.residence import Residence, Turn

CPU = torch.device("cpu")


class Tower(nn.Module):
    """Blocks in an order that its caller chooses."""

    def __init__(self, count: int = 4, width: int = 6) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(count)])
        self.order = list(range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for number in self.order:
            x = self.blocks[number](x)
        return x


def tower(**sizes: int) -> Any:
    torch.manual_seed(0)
    return Tower(**sizes).eval().requires_grad_(False)


def settled(
    model: Any, home: Home | None = None, modules: Callable[[], list[nn.Module]] | None = None, **more: Any
) -> tuple[Residence, Callable[[], None]]:
    """A residence with its blocks (or `modules`) as units, and what takes it off again."""
    modules = modules or (lambda: list(model.blocks))
    one = Residence(
        model, lambda: groups_of(model, modules()), home or HostHome(pinned=False), CPU, HostCarrier(), Ledger(),
        more.pop("turn", Turn()), **more,
    )  # fmt: skip
    one.settle()
    standing = [Summons(one, enters=False, quiet=modules()), UnitCalls(one), RootCalls(one, checks=False)]
    for each in standing:
        each.install()

    def off() -> None:
        for each in reversed(standing):
            each.remove()
        one.close()

    return one, off
