"""How many graphs the blocks of one transformer compile to, plain and on several ranks, and what these give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

import parafuse
from parafuse.engine.stack import block_stack
from parafuse.engine.verify import relative_error
from parafuse.errors import ParafuseError
from parafuse.parallel import tiers
from tests.dist.ranks import RankFailure, run_ranks
from tests.graphs import Graphs
from tests.support.cells import EXACT, LAYOUTS, ROUNDED, Layout
from tests.zoo.case import Case
from tests.zoo.collect import cases, inputs_of, outputs, randomized

COMPILED_AT = "Ulysses 2"
STEPS = 3
WITH_INDUCTOR = (
    "CogVideoXTransformer3DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
)


@dataclass
class Compiled:
    """`Config(compile=True)` on one case in one layout."""

    plain: int | None = None
    """Graphs on one rank without parafuse; None: torch cannot make one graph of a block."""
    graphs: int = 0
    """Graphs of one rank in the first two steps."""
    later: int = 0
    """Graphs made in a third step, whose values differ and whose sizes do not."""
    error: float = 0.0
    """Largest difference from the plain model, uncompiled, over the largest value, fp32, of all three steps."""
    rounding: str = ""
    refused: str = ""
    failed: str = ""

    @property
    def faults(self) -> list[str]:
        if self.failed:
            return [self.failed]
        if self.refused:
            return []
        limit = ROUNDED if self.rounding else EXACT
        wrong = [] if self.error <= limit else [f"compiled: {self.error:.1e}"]
        return wrong + ([f"{self.later} graphs made in the third step"] if self.later else [])


def compiled_of(name: str, column: str = COMPILED_AT, backend: str = "aot_eager") -> Compiled:
    """The worst that the ranks of a layout see."""
    layout = LAYOUTS[column]
    try:
        first, *others = run_ranks(measure, layout[0] * layout[1], name, layout, backend, timeout_s=600)
    except RankFailure as failure:
        return Compiled(failed=str(failure).splitlines()[0][:300])
    for other in others:
        first.error, first.later = max(first.error, other.error), max(first.later, other.later)
        first.graphs = max(first.graphs, other.graphs)
        first.failed = first.failed or ("" if first.refused == other.refused else "one rank refuses, another does not")
    return first


def measure(name: str, layout: Layout, backend: str) -> Compiled:
    """One case, as one rank sees it."""
    case = cases()[name]
    found = Compiled(rounding=case.rounding)
    model = randomized(case.build()).eval()
    want = [outputs(model, inputs_of(case, case.sizes, seed=step + 1)) for step in range(STEPS)]
    try:
        found.plain = _run(case, model, _by_hand(model))[0]
    except Exception as error:
        if not type(error).__module__.startswith("torch._dynamo"):
            raise
    for block in block_stack(model):
        block._compiled_call_impl = None
    ring, ulysses = layout
    config = parafuse.Config(parallel=parafuse.Parallel(ring=ring, ulysses=ulysses), compile=True)
    with mock.patch.object(tiers, "BACKEND", backend), parafuse.apply(model, config) as handle:
        try:
            found.graphs, found.later, got = _run(case, model, lambda: _made(handle))
        except ParafuseError as refusal:
            found.refused = str(refusal)
            return found
    found.error = max(map(relative_error, got, want))
    return found


def _by_hand(model: nn.Module) -> Callable[[], int]:
    """Compiles every block as a user would without parafuse; the returned function gives the number of graphs."""
    torch.compiler.reset()
    graphs = Graphs()
    for block in block_stack(model):
        block.compile(fullgraph=True, backend=graphs)
    return lambda: graphs.made


def _made(handle: parafuse.Handle) -> int:
    return sum(one.tally.graphs.total() for one in handle.compiled.values())


def _run(case: Case, model: nn.Module, graphs: Callable[[], int]) -> tuple[int, int, list[list[Tensor]]]:
    """(graphs of two steps, graphs of a third one, what each step gives)."""
    got, made = [], []
    for step in range(STEPS):
        got.append(outputs(model, inputs_of(case, case.sizes, seed=step + 1)))
        made.append(graphs())
    return made[1], made[2] - made[1], got
