"""Every exchange between ranks goes through here: counted, and bounded in time.

What may stand in a traced graph is a custom operator keyed by the name of its process group, so that its counters run
on every call, compiled or not: the exchanges here, and attention as a whole.
"""

# pyright: reportUnknownMemberType=false, reportDeprecated=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (torch.distributed has no types)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op  # pyright: ignore[reportPrivateUsage]
from torch._library.custom_ops import CustomOpDef
from torch.distributed import ProcessGroup

_resolve: Callable[[str], ProcessGroup] = dist.distributed_c10d._resolve_process_group  # pyright: ignore

# Renamed in torch 2.13; the old name warns there, the new one is not in 2.11.
_gather_flat: Callable[..., object] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass
class Count:
    """Calls and bytes sent to other ranks, of one kind of exchange."""

    calls: int = 0
    bytes: int = 0


def since(now: Mapping[str, Count], before: Mapping[str, Count]) -> dict[str, Count]:
    """What was sent between two looks at the counters, by name."""
    none = Count()
    old = {name: before.get(name, none) for name in now}
    return {name: Count(c.calls - old[name].calls, c.bytes - old[name].bytes) for name, c in now.items()}


@dataclass
class Counters:
    """What this rank has sent over one group, by kind of exchange, and the order of ring events."""

    kinds: dict[str, Count] = field(default_factory=dict[str, Count])
    trace: list[str] | None = None
    """Ring events in order ("send 1", "attend 0", ...) while a list is set; None: not recorded."""

    def add(self, kind: str, num_bytes: int) -> None:
        count = self.kinds.setdefault(kind, Count())
        count.calls += 1
        count.bytes += num_bytes

    def event(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(text)


# The one registry of this package: operators can carry only a name, and torch keeps its groups by name as well.
_COUNTERS: dict[str, Counters] = {}


def counters(group: ProcessGroup | str) -> Counters:
    """The counters of a group; made at first use."""
    name = group if isinstance(group, str) else group.group_name
    return _COUNTERS.setdefault(name, Counters())


def rank_and_degree(group: str) -> tuple[int, int]:
    """This rank in a group and the group's size; (0, 1) where the name is empty: no group."""
    if not group:
        return 0, 1
    process_group = _resolve(group)
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def all_to_all(send_N: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: str) -> Tensor:
    """Flat all-to-all: element runs of `send_sizes` go to the ranks of `group` in order. Collective on `group`.

    Sizes are computed by both sides from the global shape; they may differ by rank and may be zero."""
    process_group = _resolve(group)
    received = send_N.new_empty(sum(receive_sizes))
    mine = dist.get_rank(process_group)
    counters(group).add("all_to_all", (sum(send_sizes) - send_sizes[mine]) * send_N.element_size())
    dist.all_to_all_single(received, send_N, list(receive_sizes), list(send_sizes), group=process_group)
    return received


def keeps_order(operator: CustomOpDef) -> CustomOpDef:
    """For an operator that exchanges: a compiler may neither drop it where its result is not used, nor move it past
    another one. Ranks trace graphs of their own (a rank may hold filler alone) and must exchange in the same order."""
    _register_effectful_op(operator._opoverload, _EffectType.ORDERED)  # pyright: ignore[reportPrivateUsage]
    return operator


@keeps_order
@torch.library.custom_op("parafuse::all_gather", mutates_args=())
def all_gather(x: Tensor, degree: int, group: str) -> Tensor:
    """(...) -> (degree, ...): the same shape from every rank of `group`. Collective on `group`."""
    process_group = _resolve(group)
    out = x.new_empty((degree, *x.shape))
    counters(group).add("all_gather", x.nbytes * (degree - 1))
    _gather_flat(out.view(-1), x.contiguous().view(-1), group=process_group)
    return out


@all_gather.register_fake
def _(x: Tensor, degree: int, group: str) -> Tensor:
    return x.new_empty((degree, *x.shape))


@keeps_order
@torch.library.custom_op("parafuse::all_reduce", mutates_args=())
def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks of `group`, on all of them. Collective on `group`.

    Counted as what a ring sends: 2 * bytes * (P - 1) / P."""
    process_group = _resolve(group)
    out = x.clone(memory_format=torch.contiguous_format)
    degree = dist.get_world_size(process_group)
    counters(group).add("all_reduce", 2 * x.nbytes * (degree - 1) // degree)
    dist.all_reduce(out, group=process_group)
    return out


@all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gather_into(out: Tensor, part: Tensor, group: ProcessGroup) -> dist.Work:
    """Starts filling `out` (degree * N,) with the parts (N,) of the ranks of `group`, in order; to be waited for on the
    stream that needs it. Collective on `group`."""
    counters(group).add("all_gather", part.nbytes * (group.size() - 1))
    work: Any = _gather_flat(out, part, group=group, async_op=True)
    if work is None:
        raise RuntimeError(f"this rank is not in the group {group.group_name}")
    return work


def broadcast(x: Tensor, owner: int, group: str) -> dist.Work:
    """Starts sending the owner's `x` into those of the others. `owner`: its rank in `group`. Collective on `group`."""
    process_group = _resolve(group)
    mine, degree = rank_and_degree(group)
    counters(group).add("broadcast", x.nbytes * (degree - 1) if mine == owner else 0)
    work = dist.broadcast(x, dist.get_global_rank(process_group, owner), group=process_group, async_op=True)
    if work is None:
        raise RuntimeError(f"this rank is not in the group {group}")
    return work


class Shift:
    """Point-to-point: each `post` sends a buffer to one rank while one from another is received; sizes are known to
    both sides beforehand, and nothing goes where one is 0."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.rank, self.degree = dist.get_rank(group), dist.get_world_size(group)
        self._counters = counters(group)

    def post(self, send_N: Tensor, to: int, receive_size: int, source: int) -> tuple[Tensor, list[dist.Work]]:
        """Starts sending `send_N` (contiguous); returns the buffer being received and what to wait for."""
        received = send_N.new_empty(receive_size)
        operations: list[dist.P2POp] = []
        if send_N.numel():
            operations.append(dist.P2POp(dist.isend, send_N, dist.get_global_rank(self.group, to), group=self.group))
            self._counters.add("ring", send_N.nbytes)
        if receive_size:
            operations.append(
                dist.P2POp(dist.irecv, received, dist.get_global_rank(self.group, source), group=self.group)
            )
        return received, dist.batch_isend_irecv(operations) if operations else []


class Rotation:
    """Point-to-point ring: each `post` sends a buffer to the next rank while one from the previous is received."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.rank, self.degree = dist.get_rank(group), dist.get_world_size(group)
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.degree)
        self._previous = dist.get_global_rank(group, (self.rank - 1) % self.degree)
        self._counters = counters(group)

    def post(self, send_N: Tensor, step: int) -> tuple[Tensor, list[dist.Work]]:
        """Starts sending `send_N` (contiguous); returns the buffer being received and what to wait for."""
        received = torch.empty_like(send_N)
        operations = [
            dist.P2POp(dist.isend, send_N, self._next, group=self.group),
            dist.P2POp(dist.irecv, received, self._previous, group=self.group),
        ]
        self._counters.add("ring", send_N.nbytes)
        self._counters.event(f"send {step}")
        return received, dist.batch_isend_irecv(operations)

    def attending(self, step: int) -> None:
        """Notes that attention over block `step` starts."""
        self._counters.event(f"attend {step}")
