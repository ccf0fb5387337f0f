"""Every transformer class with sparse attention: what its video is, and whether ranks give what one rank gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import parafuse
from parafuse.config import Config, Parallel
from parafuse.errors import ParafuseError
from tests.sparse.test_grid import VIDEO, _sizes
from tests.zoo.collect import cases, inputs_of, randomized

METHOD = "radial:0.4,tile=1x2x3,dense_steps=0,dense_layers=0,sink_frames=0"


@dataclass(frozen=True)
class Ran:
    """One class in one layout."""

    outputs: list[Tensor]
    refused: str
    grid: str
    sparse_calls: int
    whole: dict[str, int]
    density: float | None
    rounds: bool
    """The model rounds queries and keys to bf16 by itself."""


def run(name: str, degrees: dict[str, int], method: str = METHOD) -> Ran:
    """One call on this rank. Without a method: the plain model."""
    case = cases()[name]
    model, values = randomized(case.build()), inputs_of(case, _sizes(name, VIDEO))
    rounds = bool(case.rounding)
    if not method:
        return Ran(_outputs(model, values), "", "", 0, {}, None, rounds)
    parallel = Parallel(**{"ulysses": 1, **degrees})
    try:
        with parafuse.apply(model, Config(sparse=method, parallel=parallel)) as handle, handle.request():
            outputs = _outputs(model, values)
            video = next(iter(handle.sparse().values()))
            report = video.attention.report() or {}
            grid = "x".join(map(str, next(iter(video.streams.values())).grid))
    except ParafuseError as refusal:
        return Ran([], str(refusal), "", 0, {}, None, rounds)
    return Ran(
        outputs,
        "",
        grid,
        report.get("sparse_calls", 0),
        report.get("whole_calls", {}),
        report.get("density"),
        rounds,
    )


def _outputs(model: Any, values: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in tree_leaves(model(**values)) if isinstance(x, Tensor) and x.is_floating_point()]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference over largest value, of the worst output."""
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(got, want, strict=True))
