"""One rank of a world whose other ranks are absent: what it computes is run, or followed without values.

The other ranks' messages are this rank's own data of the same size, copied where they would arrive. So shapes, kernels
and the packing of buffers are those of the real run; the pictures are not, and the time on the wire comes from bytes
and calls."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    _create_work_from_future,  # pyright: ignore[reportAttributeAccessIssue]
    _register_process_group,
    _unregister_process_group,
)
from torch._subclasses.fake_tensor import FakeTensor
from torch.futures import Future

from parafuse.config import Axis
from parafuse.errors import ConfigError
from parafuse.parallel.mesh import Mesh, make_mesh

BACKEND = "parafuse_share"


@dataclass(frozen=True)
class Link:
    """What joins two ranks, as it is modelled."""

    bytes_per_s: float = 370e9
    """That a rank sends. Not given: NVLink 4."""
    latency_s: float = 15e-6
    """Of one exchange, its launch included."""

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.latency_s < 0:
            raise ConfigError(f"link={self}: bytes_per_s must be above 0, latency_s at least 0.")

    def seconds(self, counts: Mapping[str, float]) -> float:
        """On the wire, by the counters of a request; nothing of it is taken as hidden behind computing."""
        sent = sum(number for name, number in counts.items() if name.endswith(" bytes"))
        calls = sum(number for name, number in counts.items() if name.endswith(" calls") and "." in name)
        return sent / self.bytes_per_s + calls * self.latency_s


_ProcessGroup: Any = dist.ProcessGroup  # its types are those of one version of torch


class Share(_ProcessGroup):
    """Rank 0 of a group whose other ranks are not there: they are taken to send what this one sends."""

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:
        return BACKEND

    def barrier(self, *_: Any) -> Any:
        return _done([])

    def broadcast(self, tensors: list[Tensor], *_: Any) -> Any:
        return _done(tensors)

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        """A sum of equal parts; any other reduction of them (largest, mean) leaves them as they are."""
        if options is None or options.reduceOp == dist.ReduceOp.SUM:
            for x in tensors:
                x.mul_(self.size())
        return _done(tensors)

    def allgather(self, received: list[list[Tensor]], sent: list[Tensor], *_: Any) -> Any:
        for parts, x in zip(received, sent, strict=True):
            for part in parts:
                part.copy_(x)
        return _done(received)

    def all_gather_single(self, received: Tensor, sent: Tensor, *_: Any) -> Any:
        received.view(self.size(), -1).copy_(sent.reshape(1, -1).expand(self.size(), -1))
        return _done([received])

    def all_to_all_single(self, received: Tensor, sent: Tensor, *_: Any) -> Any:
        """Sizes by rank may differ: what is sent is repeated until all is filled."""
        target, source = received.view(-1), sent.reshape(-1)
        if not len(source):
            target.zero_()
        for first in range(0, len(target), max(1, len(source))):
            piece = target[first : first + len(source)]
            piece.copy_(source[: len(piece)])
        return _done([received])

    _allgather_base = all_gather_single  # the names of torch before 2.13
    alltoall_base = all_to_all_single

    def send(self, tensors: list[Tensor], *_: Any) -> Any:
        self._sent = tensors
        return _done(tensors)

    def recv(self, tensors: list[Tensor], *_: Any) -> Any:
        given, self._sent = self._sent, []
        for x, sent in zip(tensors, given, strict=True):
            x.copy_(sent)
        return _done(tensors)


class Unheard(Share):
    """The same, where tensors without values are not copied: whoever counts operators would count the wire as well."""

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        return _done(tensors) if _is_blank(tensors[0]) else super().allreduce(tensors, options)

    def allgather(self, received: list[list[Tensor]], sent: list[Tensor], *_: Any) -> Any:
        return _done(received) if _is_blank(sent[0]) else super().allgather(received, sent)

    def all_gather_single(self, received: Tensor, sent: Tensor, *_: Any) -> Any:
        return _done([received]) if _is_blank(sent) else super().all_gather_single(received, sent)

    def all_to_all_single(self, received: Tensor, sent: Tensor, *_: Any) -> Any:
        return _done([received]) if _is_blank(sent) else super().all_to_all_single(received, sent)

    _allgather_base = all_gather_single
    alltoall_base = all_to_all_single


def _is_blank(x: Tensor) -> bool:
    return isinstance(x, FakeTensor)


def _done(result: Any) -> Any:
    """Work that has ended."""
    future: Any = Future()
    future.set_result(result)
    return _create_work_from_future(future)


def enter(world_size: int, timeout_s: float) -> None:
    """Makes this process rank 0 of a world of which it is the only rank. It must be in none yet."""
    if dist.is_initialized():
        raise ConfigError("share_of: is measured in a process of its own; start it without a launcher, on one rank.")
    _begin(world_size, timeout_s)


def _begin(world_size: int, timeout_s: float) -> None:
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, lambda _, rank, size, __: Share(rank, size), devices=["cpu", "cuda"])
    dist.init_process_group(
        BACKEND, store=dist.HashStore(), rank=0, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def leave() -> None:
    """Ends that world."""
    dist.destroy_process_group()


def mesh_of(degrees: Mapping[Axis, int], device: str, timeout_s: float) -> Mesh:
    """The first ranks of the world, in this layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Set timeout is now only supported")  # nothing is waited for here
        return make_mesh(degrees, device, timeout_s)


_NUMBERS = itertools.count()


@contextmanager
def beside_others(axis: Axis, degree: int) -> Iterator[Mesh]:
    """The mesh of one rank of `degree` along one axis of a sequence, the others absent, for tensors without values.
    Local: it may
    be used where ranks have been joined, who need not know of it."""
    began = not dist.is_initialized()
    if began:
        _begin(1, 60.0)
    group = Unheard(0, degree)
    name: Any = f"{BACKEND} {next(_NUMBERS)}"
    world = dist.distributed_c10d._world
    own = dist.get_rank()
    world.pg_map[group] = (BACKEND, dist.HashStore())
    world.pg_names[group] = name
    # this rank is the first of the group; numbers below 0 stand for the others
    world.pg_group_ranks[group] = {own: 0} | {-rank: rank for rank in range(1, degree)}
    _register_process_group(name, group)
    try:
        yield Mesh(None, {axis: group}, group)
    finally:
        _unregister_process_group(name)
        for table in (world.pg_map, world.pg_names, world.pg_group_ranks):
            table.pop(group, None)
        if began:
            leave()
