"""The device mesh: made here and nowhere else, passed on as an argument. Degree 1 on an axis means no group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parafuse.config import SEQUENCE_AXES, Axis


@dataclass(frozen=True, eq=False)
class Mesh:
    """Groups of the axes with a degree above 1, and the flat group of the ranks that share a sequence."""

    device_mesh: DeviceMesh | None
    groups: Mapping[Axis, ProcessGroup]
    sequence: ProcessGroup | None
    """ring x ulysses, rank within it = ring rank * ulysses degree + ulysses rank."""
    kind: tuple[object, ...] = ()
    """Degrees, device and timeout; empty without groups."""
    world: ProcessGroup | None = None
    """The default group in whose time it was made."""
    apart: ProcessGroup | None = None
    """The same ranks in a group of its own: what goes over it may be under way beside a denoiser's exchanges."""

    def degree(self, axis: Axis) -> int:
        return self.groups[axis].size() if axis in self.groups else 1

    def rank(self, axis: Axis) -> int:
        return dist.get_rank(self.groups[axis]) if axis in self.groups else 0

    def group_name(self, axis: Axis) -> str:
        """The name under which torch keeps the group of an axis; empty where its degree is 1."""
        return self.groups[axis].group_name if axis in self.groups else ""

    @property
    def num_ranks(self) -> int:
        """The product of the degrees."""
        return math.prod(self.degree(axis) for axis in Axis)

    @property
    def sequence_degree(self) -> int:
        return self.sequence.size() if self.sequence is not None else 1

    @property
    def sequence_rank(self) -> int:
        return dist.get_rank(self.sequence) if self.sequence is not None else 0


_FREE: list[Mesh] = []
"""Meshes that nobody uses any more, for the next one like them: torch never ends a group's threads and connections."""


_USES: Counter[Mesh] = Counter()
"""Uses of a mesh beyond the first."""


def hold(mesh: Mesh) -> None:
    """One more use of a mesh, to be released as well. Local."""
    _USES[mesh] += 1


def release(mesh: Mesh) -> None:
    """Gives a mesh back, once all who use it have. Local; every rank must, in the order in which it makes and gives
    back others."""
    if _USES[mesh]:
        _USES[mesh] -= 1
        return
    del _USES[mesh]
    if mesh.kind and mesh not in _FREE:
        _FREE.append(mesh)


def make_mesh(degrees: Mapping[Axis, int], device: str, timeout_s: float) -> Mesh:
    """The mesh of `degrees`, whose product is the world size. Collective on all ranks.

    `timeout_s` bounds the exchanges of every group; a new group would take torch's default, not the job's."""
    kind = (tuple(degrees[axis] for axis in Axis), device, timeout_s)
    _FREE[:] = [mesh for mesh in _FREE if mesh.world is dist.group.WORLD]  # an earlier world's groups are gone
    found = next((mesh for mesh in _FREE if mesh.kind == kind), None)
    if found is not None:
        _FREE.remove(found)
    mesh = found or _make(degrees, device)
    world = dist.group.WORLD
    if found is None and mesh.groups and world is not None:
        mesh = replace(mesh, kind=kind, world=world, apart=_apart(world))
    for group in {*mesh.groups.values(), *(one for one in (mesh.sequence, mesh.apart) if one is not None)}:
        # also of one that is used again: an axis of all ranks has the default group, which other meshes have as well
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
    return mesh


_APART: dict[ProcessGroup, ProcessGroup] = {}
"""The default group -> the group apart of the same ranks, one for all meshes: of several, ranks may be given other ones
again, as they let go of meshes at other times."""


def _apart(world: ProcessGroup) -> ProcessGroup:
    """Collective the first time."""
    if world not in _APART:
        _APART.clear()  # an earlier world's
        _APART[world] = dist.new_group()  # pyright: ignore[reportArgumentType]  (this rank is in it)
    return _APART[world]


_BESIDE: dict[ProcessGroup, ProcessGroup] = {}
"""The group of the ranks of a sequence -> another one of the same ranks."""


def beside(mesh: Mesh, timeout_s: float) -> ProcessGroup:
    """A group of the ranks that share a sequence, for weights that come beside the exchanges of what computes: over one
    group, one would wait for the other. Collective on these ranks the first time."""
    if mesh.sequence is None:
        raise ValueError("no ranks share a sequence")
    if mesh.sequence not in _BESIDE:
        if any(dist.distributed_c10d._world.pg_map.get(one) is None for one in _BESIDE):  # an earlier world's
            _BESIDE.clear()
        ranks = dist.get_process_group_ranks(mesh.sequence)
        made: Any = dist.new_group(ranks, use_local_synchronization=True)
        _BESIDE[mesh.sequence] = made
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), _BESIDE[mesh.sequence])
    return _BESIDE[mesh.sequence]


def _make(degrees: Mapping[Axis, int], device: str) -> Mesh:
    axes = [axis for axis in Axis if degrees[axis] > 1]
    if not axes:
        return Mesh(None, {}, None)
    device_mesh = init_device_mesh(
        device, tuple(degrees[axis] for axis in axes), mesh_dim_names=tuple(str(axis) for axis in axes)
    )
    groups = {axis: device_mesh.get_group(str(axis)) for axis in axes}
    shared = [axis for axis in SEQUENCE_AXES if axis in groups]
    if not shared:
        return Mesh(device_mesh, groups, None)
    if len(shared) == 1:
        return Mesh(device_mesh, groups, groups[shared[0]])
    flat = device_mesh[tuple(str(axis) for axis in shared)]._flatten("sequence")
    return Mesh(device_mesh, groups, flat.get_group())
