"""`apply`: what a config asks for, put on a model the user already has, and taken off again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import nn

from parafuse.config import Axis, Config
from parafuse.engine.probe import probe
from parafuse.engine.stack import block_stack
from parafuse.errors import ConfigError
from parafuse.log import note
from parafuse.parallel.comm import Count, counters
from parafuse.parallel.hooks import is_overridden
from parafuse.parallel.mesh import Mesh, make_mesh
from parafuse.parallel.sequence import SequenceParallel
from parafuse.parallel.world import ensure_world

DENOISERS = ("transformer", "transformer_2")
"""Pipeline components that hold a block stack, where they are present."""


@dataclass
class Handle:
    """What was applied. `remove()` puts the model back bit for bit; also a context manager."""

    applied: list[str] = field(default_factory=list[str])
    """One line per thing that was applied, for receipts; empty when nothing was."""
    mesh: Mesh | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    _before: dict[str, Count] = field(default_factory=dict[str, Count])
    """What had gone over the groups before: torch gives two meshes of the same ranks the same groups."""

    def __post_init__(self) -> None:
        self._before = {name: replace(count) for name, count in self._counts().items()}

    def remove(self) -> None:
        """Takes everything off, in reverse order. Local; a second call does nothing."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self.applied.clear()

    def exchanged(self) -> dict[str, Count]:
        """Calls and bytes that this rank has sent since `apply`, per axis and kind, as `ulysses.all_to_all`."""
        none = Count()
        now = self._counts()
        old = {name: self._before.get(name, none) for name in now}
        return {n: Count(c.calls - old[n].calls, c.bytes - old[n].bytes) for n, c in now.items()}

    def _counts(self) -> dict[str, Count]:
        if self.mesh is None:
            return {}
        groups = {str(axis): group for axis, group in self.mesh.groups.items()}
        if self.mesh.sequence is not None and self.mesh.sequence not in groups.values():
            groups["sequence"] = self.mesh.sequence
        return {f"{axis}.{kind}": c for axis, group in groups.items() for kind, c in counters(group).kinds.items()}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def denoisers(target: Any) -> list[tuple[str, nn.Module]]:
    """(name, module) of what carries the block stacks: the target itself, or a pipeline's denoisers."""
    if isinstance(target, nn.Module):
        return [(type(target).__name__, target)]
    found = [(name, getattr(target, name, None)) for name in DENOISERS]
    modules = [(name, module) for name, module in found if isinstance(module, nn.Module)]
    if not modules:
        raise ConfigError(
            f"target={type(target).__name__}: must be a torch module, or a pipeline with one of {', '.join(DENOISERS)}."
        )
    return modules


def apply(target: Any, config: Config | None = None, *, mesh: Mesh | None = None) -> Handle:
    """Makes a pipeline or a transformer run on all ranks. Every rank must call it, with the same config.

    `target` is changed in place (its instances, never their classes) and must have the same weights on every rank. Uses
    the default process group, or makes it from the launcher's environment. On one rank nothing is wrapped. Raises
    ConfigError before anything is changed or exchanged. Calls of the model are collective from then on."""
    config = config or Config()
    modules = denoisers(target)
    for name, module in modules:
        if is_overridden(module):
            raise ConfigError(f"target: parafuse is on {name} already; call remove() on the handle of the first apply.")
    if mesh is None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        degrees = config.parallel.degrees(dist.get_world_size() if dist.is_initialized() else launched)
        stacks = [block_stack(module) for _, module in modules] if max(degrees.values()) > 1 else []
        first = next(chain(modules[0][1].parameters(), modules[0][1].buffers()), None)
        device = "cuda" if first is not None and first.is_cuda else "cpu"
        if stacks:
            ensure_world(device, config.timeout_s)
        mesh = make_mesh(degrees, device)
        if stacks and config.parallel.ulysses == "auto":
            note(f"ulysses {degrees[Axis.ULYSSES]}: all ranks that no other axis uses")
    handle = Handle(mesh=mesh)
    if mesh.sequence_degree == 1:
        return handle
    try:
        for name, module in modules:
            blocks = block_stack(module)
            parallel = SequenceParallel(module, blocks, mesh, probe)
            handle._undo.append(parallel.remove)
            parallel.install()
            axes = " x ".join(f"{a} {mesh.degree(a)}" for a in (Axis.RING, Axis.ULYSSES) if mesh.degree(a) > 1)
            handle.applied.append(f"sequence parallel ({axes}) on {name}: {len(blocks)} blocks")
    except BaseException:
        handle.remove()
        raise
    return handle
