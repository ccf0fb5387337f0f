"""Tensors of several ranks in one exchange, together with word of a rank whose part failed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parafuse.errors import RankError
from parafuse.parallel.comm import all_gather

HEAD = 8
"""Bytes before the tensors: the first is 1 where a rank has none to give, since it failed."""


def exchange(
    mine: Sequence[Tensor],
    shapes: Sequence[Sequence[Tensor]],
    device: torch.device,
    group: str,
    error: BaseException | None = None,
) -> list[list[Tensor]]:
    """For each rank of `group` the tensors that it gave. Collective, one exchange.

    `shapes`: tensors without values (device meta), like those of every rank; what arrives has their strides too, where
    they leave no gaps. With `error`, this rank has nothing to give: it raises that after the exchange, and the others
    raise RankError (on a GPU at their next look at a value)."""
    longest = max(sum(x.numel() * x.element_size() for x in each) for each in shapes)
    send = torch.zeros(HEAD + longest, dtype=torch.uint8, device=device)
    offset = HEAD
    if error is not None:
        send[0] = 1
    for x in mine if error is None else ():
        flat = x.contiguous().view(-1).view(torch.uint8)
        send[offset : offset + flat.numel()] = flat
        offset += flat.numel()
    received = all_gather(send, len(shapes), group)
    if error is not None:
        raise error
    if device.type == "cpu":  # elsewhere a look would wait for the device, in every step
        _refuse_failed(received)
    return [_unpacked(received[rank, HEAD:], each) for rank, each in enumerate(shapes)]


def all_say(yes: bool, module: nn.Module, degree: int, group: str) -> bool:
    """Whether every rank of `group` says yes. Collective; waits for the module's device."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return bool(all_gather(torch.tensor([yes], device=device), degree, group).all())


def _refuse_failed(received: Tensor) -> None:
    failed = torch.nonzero(received[:, 0]).flatten().tolist()
    if failed:
        which = ", ".join(map(str, failed))
        raise RankError(f"the part of rank {which} of the group failed there; its own error tells why.")


def _unpacked(flat: Tensor, shapes: Sequence[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    offset = 0
    for like in shapes:
        size = like.numel() * like.element_size()
        piece = flat[offset : offset + size].clone()  # a copy starts where its dtype may be read
        offset += size
        found.append(with_strides_of(piece.view(like.dtype).view(like.shape), like))
    return found


def with_strides_of(x: Tensor, like: Tensor) -> Tensor:
    """The same values, laid out in memory as `like` is."""
    if x.stride() == like.stride():
        return x
    return torch.empty_like(like, device=x.device).copy_(x)


def without_values(x: Tensor) -> Tensor:
    """Shape, strides and dtype of a tensor."""
    return torch.empty_like(x, device="meta")
