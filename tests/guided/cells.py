"""What one pipeline with guidance gives on several ranks in one layout, against plain diffusers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import parafuse
from parafuse.engine.verify import relative_error
from parafuse.errors import ParafuseError
from tests.dist.ranks import RankFailure, run_ranks
from tests.guided.collect import cases

EXACT = 1e-5
LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "cfg 2": (dict(cfg=2, ulysses=1), 1),
    "cfg 2 x ulysses 2": (dict(cfg=2, ulysses=2), 1),
    "data 2": (dict(data=2, ulysses=1), 3),
    "data 2 x cfg 2": (dict(data=2, cfg=2, ulysses=1), 2),
}
"""Name -> (degrees, prompts)."""


@dataclass
class Cell:
    error: float = 0.0
    """Largest difference from plain diffusers over the largest value, fp32, of two requests."""
    apart: int = 0
    """Steps of the second request in which several branches ran side by side, or a batch was cut."""
    alone: int = 0
    """Steps in which one branch ran and other ranks waited (guidance was off, or its result was needed at once), and
    calls that all ranks made."""
    refused: str = ""
    failed: str = ""

    @property
    def faults(self) -> list[str]:
        wrong = [] if self.error <= EXACT else [f"differs by {self.error:.1e}"]
        if not self.apart and not self.refused:
            wrong.append("nothing was shared")
        return [self.failed] if self.failed else wrong


def tensors(output: Any) -> list[Tensor]:
    """Tensors and arrays of a pipeline's output."""
    leaves = tree_leaves(tuple(output.values()) if isinstance(output, dict) else output)
    found = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in leaves]
    return [x for x in found if isinstance(x, Tensor)]


def seeded(call: dict[str, Any]) -> dict[str, Any]:
    return call | {"generator": torch.Generator("cpu").manual_seed(5)}


def measure(name: str, degrees: dict[str, int], prompts: int) -> Cell:
    """One case, as one rank sees it."""
    case, cell = cases()[name], Cell()
    call = case.call(min(prompts, case.max_prompts))
    want = tensors(case.build()(**seeded(call)))
    config = parafuse.Config(parallel=parafuse.Parallel(**degrees))
    try:
        with parafuse.Engine.from_pipeline(case.build(), config) as engine:
            cell.error = relative_error(tensors(engine(**seeded(call))), want)
            shared = engine.handle.guidance or engine.handle.data
            before = [Counter(one.seen) for one in shared.values()]
            cell.error = max(cell.error, relative_error(tensors(engine(**seeded(call))), want))
            for one, seen in zip(shared.values(), before, strict=True):
                new = one.seen - seen
                cell.apart += new["cut"] + new["together"]
                cell.alone += new["alone"] + new["everywhere"]
    except ParafuseError as refusal:
        cell.refused = str(refusal)
    return cell


def cell_of(name: str, column: str) -> Cell:
    """The worst that the ranks of a layout see."""
    degrees, prompts = LAYOUTS[column]
    size = int(np.prod(list(degrees.values())))
    try:
        first, *others = run_ranks(measure, size, name, degrees, prompts, timeout_s=200)
    except RankFailure as failure:
        return Cell(failed=str(failure).splitlines()[0][:300])
    for other in others:
        first.error = max(first.error, other.error)
        first.failed = first.failed or ("" if first.refused == other.refused else "one rank refuses, another does not")
    return first
