"""Weights cut between ranks: each keeps an equal part of every image on its device, and all parts come together just
before they are used.

Fully sharded weights, as ZeRO-3 (arXiv:1910.02054) and FSDP (arXiv:2304.11277) have them, without other classes or
hooks of modules: what comes and goes is the data of parameters (`image.py`), as with any other home.
"""

# pyright: reportUnknownMemberType=false
# (torch.distributed has no types)

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parafuse.parallel.comm import gather_into
from parafuse.parallel.image import ALIGN, Image


class RanksHome:
    """The memory of the ranks of a group, which make the same calls in the same order. `keep` and `close` are local;
    what reads is collective on the group. Every rank must have had the same weights."""

    is_direct = True

    def __init__(self, group: ProcessGroup, device: torch.device, *, keep_originals: bool = False):
        self._group, self._device, self._keep_originals = group, device, keep_originals
        self.degree = group.size()
        self.grain = ALIGN * self.degree
        self.keeps_all = keep_originals
        self._parts: list[Tensor] = []
        self._images: list[Image] = []
        self._originals: list[list[Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Of this rank's parts."""
        return sum(part.nbytes for part in self._parts)

    def keep(self, images: Sequence[Image]) -> None:
        sources = [image.sources() for image in images]
        parts = [self._part(image, runs) for image, runs in zip(images, sources, strict=True)]
        for image in images:
            image.put_away()
        self._parts, self._images = parts, list(images)
        self._originals = sources if self._keep_originals else []

    def _part(self, image: Image, sources: Sequence[Tensor]) -> Tensor:
        size = image.nbytes // self.degree
        first = dist.get_rank(self._group) * size
        part = torch.zeros(size, dtype=torch.uint8, device=self._device)
        for run, source in zip(image.runs, sources, strict=True):
            begin, end = max(run.start, first), min(run.start + run.nbytes, first + size)
            if begin < end:
                part[begin - first : end - first].copy_(source[begin - run.start : end - run.start])
        return part

    def begin(self, number: int, out: Tensor) -> dist.Work:
        """Starts to write an image into `out` (nbytes,). Ranks must begin in the same order, each in one thread."""
        return gather_into(out, self._parts[number], self._group)

    def read(self, number: int, out: Tensor) -> None:
        self.begin(number, out).wait()

    def runs(self, number: int) -> list[Tensor]:
        """Collective, but where originals are kept."""
        if self._keep_originals:
            return [source.to("cpu", copy=True) for source in self._originals[number]]
        image = self._images[number]
        whole = torch.empty(image.nbytes, dtype=torch.uint8, device=self._device)
        self.read(number, whole)
        return [run.to("cpu", copy=True) for run in image.split(whole)]

    def close(self) -> None:
        self._parts, self._images, self._originals = [], [], []
