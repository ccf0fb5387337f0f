"""How the weights of a unit lie in one run of bytes, so that they come in one copy.

A weight stays the tensor that it is: what changes is its data. While it is away its data is one number that stands for
all (not a number where the dtype has that), of the right shape, dtype and device: what looks at these sees no change,
what computes with it gives no number, and what writes into it fails. Weights that share memory share it in the image;
of packed weights (torchao) the tensors inside are what comes and goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from parafuse.errors import UnsupportedError
from parafuse.parallel.packed import has_values, inside

PLAIN = (Tensor, nn.Parameter, FakeTensor)
ALIGN = 256
"""Bytes: what kernels and copies like the start of a tensor to be a multiple of."""


@dataclass(eq=False)
class Slot:
    """One tensor, and where its data is in an image."""

    tensor: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    run: int
    """Which run of bytes."""
    start: int
    """Bytes from the start of the run."""
    away: Tensor
    """What stands for its data meanwhile."""

    def view(self, run: Tensor) -> Tensor:
        """Its data in these bytes."""
        place = (run.storage_offset() + self.start) // self.dtype.itemsize
        found = torch.empty(0, dtype=self.dtype, device=run.device)
        return found.set_(run.untyped_storage(), place, self.shape, self.stride)


@dataclass(frozen=True)
class Run:
    """Bytes that belong together: one tensor, or several that share memory."""

    start: int
    """In the image."""
    nbytes: int


class Image:
    """The bytes of some weights. `sources` right after it was made, as long as their data is theirs. Of weights without
    memory (fake ones) it has the sizes alone."""

    def __init__(self, weights: Iterable[Tensor], device: torch.device, grain: int = 1):
        """`device`: what computes with them. `grain`: bytes that its size is to be a multiple of. Raises
        UnsupportedError for weights that cannot come and go."""
        self.slots: list[Slot] = []
        self.runs: list[Run] = []
        self.nbytes = 0
        self._were: list[torch.device] = []
        """Where each run was."""
        self._sources: list[Tensor] = []
        weights = list(weights)
        for weight in weights:
            if type(weight) not in PLAIN and weight.device.type != device.type:
                raise UnsupportedError(
                    f"offload: weights of the kind {type(weight).__name__} were packed on {weight.device.type!r}, and "
                    f"{device.type!r} is to compute with them; move the model there first, or use quantize=... ."
                )
        found = {id(x): x for weight in weights for x in carriers(weight) if x.numel()}
        for members in sharing(list(found.values())):
            self._add(members, device)
        self.nbytes = -(-self.nbytes // grain) * grain

    def _add(self, members: list[Tensor], device: torch.device) -> None:
        first = min(map(_start, members))
        first -= first % math.lcm(*(x.dtype.itemsize for x in members))
        last = max(map(_end, members))
        self.runs.append(Run(self.nbytes, last - first))
        self._were.append(members[0].device)
        self.nbytes += -(-(last - first) // ALIGN) * ALIGN
        if not has_values(members[0]):
            return
        whole = members[0].detach()
        source = torch.empty(0, dtype=torch.uint8, device=whole.device)
        self._sources.append(source.set_(whole.untyped_storage(), first, (last - first,), (1,)))
        for x in members:
            number = math.nan if x.dtype.is_floating_point or x.dtype.is_complex else 0
            away = torch.full((), number, dtype=x.dtype, device=device).expand(x.shape)
            self.slots.append(Slot(x, x.shape, x.stride(), x.dtype, len(self.runs) - 1, _start(x) - first, away))

    def sources(self) -> list[Tensor]:
        """The bytes of each run, where they are now; once, since they are not kept."""
        found, self._sources = self._sources, []
        return found

    def split(self, image: Tensor) -> list[Tensor]:
        """The runs of an image (nbytes,) of bytes."""
        return [image[run.start : run.start + run.nbytes] for run in self.runs]

    def put(self, runs: Sequence[Tensor]) -> None:
        """Gives the weights their data, in these bytes."""
        for slot in self.slots:
            slot.tensor.data = slot.view(runs[slot.run])

    def put_back(self, runs: Sequence[Tensor]) -> None:
        """The same, where the weights were."""
        self.put([run.to(device) for run, device in zip(runs, self._were, strict=True)])

    def put_away(self) -> None:
        for slot in self.slots:
            slot.tensor.data = slot.away


def carriers(weight: Tensor) -> list[Tensor]:
    """The plain tensors that have a weight's data: itself, or what is inside of one that wraps others."""
    found = inside(weight)
    if not all(type(x) in PLAIN for x in found):
        raise UnsupportedError(
            f"offload: weights of the kind {type(weight).__name__} cannot come and go; load the model without this "
            "quantization (quantize=... of parafuse can), or leave offload out."
        )
    return found


def nbytes_of(weights: Iterable[Tensor]) -> int:
    """Of some weights, what they share counted once."""
    found = {id(x): x for weight in weights for x in carriers(weight)}
    return sum(max(map(_end, one)) - min(map(_start, one)) for one in sharing([x for x in found.values() if x.numel()]))


def sharing(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Those that share bytes together."""
    storages: dict[int, list[Tensor]] = {}
    for x in tensors:
        if x.is_meta:
            raise UnsupportedError("offload: some weights are on the meta device, without values; load them first.")
        storages.setdefault(x.untyped_storage()._cdata, []).append(x)
    found: list[list[Tensor]] = []
    for members in storages.values():
        end = -1
        for x in sorted(members, key=_start):
            if _start(x) >= end:
                found.append([])
            found[-1].append(x)
            end = max(end, _end(x))
    return found


def _start(x: Tensor) -> int:
    return int(x.storage_offset()) * x.dtype.itemsize


def _end(x: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _start(x) + int(last + 1) * x.dtype.itemsize
