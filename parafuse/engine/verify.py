"""Holds a model's denoiser on several ranks against the same denoiser alone, layout by layout, on its own calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from parafuse.config import SEQUENCE_AXES, Axis
from parafuse.engine.apply import apply
from parafuse.engine.recorded import RecordedCall, recording
from parafuse.engine.targets import denoisers
from parafuse.errors import ConfigError, ParafuseError, RankError
from parafuse.parallel.comm import all_gather
from parafuse.parallel.mesh import Mesh, make_mesh

if TYPE_CHECKING:
    from parafuse.engine.engine import Engine

EXACT = 1e-5
"""Largest difference over largest value that fp32 may have: another order of keys changes attention by 4e-7."""
LOW_PRECISION_RATIO = 2.0
"""How many times plain bf16's (or fp16's) distance from fp32 the parallel one may have."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one layout gave."""

    layout: dict[str, int]
    """Axis -> degree, of the axes above 1."""
    error: float | None
    """Largest difference from the plain model (in 16 bits: from the same model in fp32) over the largest value, of the
    worst call and rank; None where the layout was refused."""
    limit: float
    """What `error` may be."""
    refused: str = ""
    """Why this layout does not run."""

    @property
    def name(self) -> str:
        return " x ".join(f"{axis} {degree}" for axis, degree in self.layout.items())

    @property
    def exact(self) -> bool:
        return self.error is not None and self.error <= self.limit


def layouts(world_size: int) -> list[dict[Axis, int]]:
    """Every way to share a sequence among all ranks, Ulysses first."""
    found = [(ring, world_size // ring) for ring in range(1, world_size + 1) if world_size % ring == 0]
    return [dict.fromkeys(Axis, 1) | dict(zip(SEQUENCE_AXES, degrees, strict=True)) for degrees in found]


def verify(engine: Engine, *, seed: int = 0, **call: Any) -> list[Verdict]:
    """One verdict for each layout of the engine's ranks. Collective: every rank calls it with the same arguments.

    Runs the pipeline once with `call`, alone on each rank, and records what its denoisers were given; then, layout by
    layout, gives them the same again on all ranks. Takes what the engine had applied off, for good. Raises ConfigError
    for a call that the pipeline refuses, RankError when ranks fail differently."""
    if engine.plan.world_size == 1:
        raise ConfigError("ranks: 1 rank has nothing to be compared with; start 2 or more.")
    if engine._workers:
        raise ConfigError("engine: it has started its ranks itself; start all of them with torchrun to verify.")
    engine.handle.remove()
    recorded = record(engine, seed, call)
    _add_truth(recorded)
    if not all(bool(x.isfinite().all()) for r in recorded for x in (*r.plain, *r.truth)):
        raise ConfigError(
            f"dtype={engine.plan.dtype!r}: the model gives values that are no numbers, on one rank too; use another."
        )
    return [_verdict(engine, degrees, recorded) for degrees in layouts(engine.plan.world_size)]


def record(engine: Engine, seed: int, call: dict[str, Any]) -> list[RecordedCall]:
    """The denoisers' calls in one plain run of the pipeline, on this rank."""
    recorded: list[RecordedCall] = []
    with ExitStack() as hooks:
        for _, module in denoisers(engine.pipeline):
            hooks.enter_context(recording(module, recorded))
        engine(seed=seed, **call)
    if not recorded:
        raise ConfigError("call: the pipeline did not call its denoiser; give it at least one step.")
    return recorded


def _add_truth(recorded: list[RecordedCall]) -> None:
    """What each call gives in fp32, for modules that hold 16 bits."""
    for module in {id(r.module): r.module for r in recorded}.values():
        mine = [r for r in recorded if r.module is module]
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters()):
            with _in_float32(module):
                for r in mine:
                    r.truth = r.again(torch.float32)


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Weights and buffers in fp32 for a while; 16 bits survive the way there and back. Doubles the module's memory."""
    held = [(t, t.dtype) for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]
    try:
        for tensor, _ in held:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in held:
            tensor.data = tensor.data.to(dtype)


def _verdict(engine: Engine, degrees: dict[Axis, int], recorded: list[RecordedCall]) -> Verdict:
    plan = engine.plan
    mesh = make_mesh(degrees, plan.device, plan.timeout_s)
    shown = {str(axis): degree for axis, degree in degrees.items() if degree > 1}
    own = [relative_error(r.plain, r.truth) for r in recorded if r.truth is not r.plain]
    limit = max(EXACT, LOW_PRECISION_RATIO * max(own, default=0.0))
    try:
        with engine.world.request(), apply(engine.pipeline, mesh=mesh):
            mine = max(relative_error(r.again(), r.truth) for r in recorded)
    except RankError:
        raise
    except ParafuseError as refusal:
        return Verdict(layout=shown, error=None, limit=limit, refused=str(refusal))
    return Verdict(layout=shown, error=_worst(mine, mesh, engine.world.device), limit=limit)


def _worst(mine: float, mesh: Mesh, device: torch.device) -> float:
    """The largest of the ranks' errors. Collective on the sequence group."""
    if mesh.sequence is None:
        return mine
    value = torch.tensor([mine], dtype=torch.float64, device=device)
    return float(all_gather(value, mesh.sequence_degree, mesh.sequence.group_name).max())


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference over largest value, of the worst tensor; inf where shapes differ or a value is no number."""
    worst = 0.0
    if [x.shape for x in got] != [x.shape for x in want]:
        return math.inf
    for mine, other in zip(got, want, strict=True):
        if not bool(mine.isfinite().all() and other.isfinite().all()):
            return math.inf
        if other.numel():
            largest = float(other.float().abs().max())
            worst = max(worst, float((mine.float() - other.float()).abs().max()) / (largest or 1.0))
    return worst
