"""A tiny video model with sparse attention on some ranks, for tests: what it gives, what was counted, what was sent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import parafuse
from parafuse.config import Config, Parallel
from parafuse.parallel.comm import since
from tests.models import Sizes, build, call, inputs

GRID = (3, 5, 7)
"""Divides by nothing, nor do its tiles."""
SIZES = Sizes(grid=GRID, text=13)
FIELDS = "tile=2x2x3,dense_steps=0,dense_layers=0"
METHODS = {
    "window": f"window:1,1,2,{FIELDS}",
    "radial": f"radial:0.3,sink_frames=0,{FIELDS}",
    "content": f"content:0.5,{FIELDS}",
}
LONG = Sizes(grid=(12, 4, 4), text=5)
"""Frames enough for ranks of a ring that see nothing of each other."""
LAYOUTS = [{"ulysses": 2}, {"ulysses": 3}, {"ring": 2}, {"ring": 3}, {"ring": 4}, {"ring": 2, "ulysses": 2}]
FAMILIES = {"wan": "", "flux": ",grid=3x5x7"}
"""Cross-attention to text; joint attention, whose grid nothing tells here."""


def painted(
    family: str, method: str, degrees: dict[str, int], sizes: Sizes = SIZES, heads: int = 3, compile: bool = False
) -> dict[str, Any]:
    """What the last of three calls gives on this rank, and what was counted in all."""
    degrees = {"ulysses": 1, **degrees}
    config = Config(sparse=method, parallel=Parallel(**degrees), compile=compile)
    model, values = build(family, heads=heads), inputs(family, sizes)
    with parafuse.apply(model, config) as handle, handle.request():
        result = call(model, values)
        before = handle.exchanged()
        for _ in range(2):
            result = call(model, values)
        sent = {name: (one.calls, one.bytes) for name, one in since(handle.exchanged(), before).items()}
        report = next(iter(handle.sparse().values())).attention.report()
        applied = list(handle.applied)
    after: Tensor = call(model, values)
    return {"result": result, "after": after, "report": report, "sent": sent, "applied": applied}


def plain(family: str, sizes: Sizes = SIZES, heads: int = 3) -> Tensor:
    return call(build(family, heads=heads), inputs(family, sizes))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())
