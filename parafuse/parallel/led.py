"""What the first branch of a step decided, where the others are to do the same: on the rank that computed it, and told
to those that compute the others. They do so at the same time, so it is sent as soon as it is decided."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from parafuse.parallel.comm import broadcast


@dataclass
class Led:
    """Of one denoiser. Every rank of the `cfg` axis passes with every call, and expects what it will not compute."""

    group: str
    """Of the `cfg` axis; empty where its degree is 1."""
    _skips: dict[int, bool] = field(default_factory=dict[int, bool])
    """Place of the sample in the batch -> whether it is skipped."""
    _coming: tuple[dist.Work, Tensor] | None = None
    _to_tell: tuple[int, int, torch.device] | None = None
    """(number of samples, this rank, device) where the others wait to be told."""

    def expect(self, samples: int, owner: int, rank: int, device: torch.device) -> None:
        """The first call of a step is at hand, and `owner` makes it alone. Collective on the group, with `finish`."""
        self._settle()
        self._skips = {}
        if not self.group:
            return
        if owner == rank:
            self._to_tell = (samples, rank, device)
            return
        received = torch.zeros(samples, dtype=torch.uint8, device=device)
        self._coming = broadcast(received, owner, self.group), received

    def tell(self, skips: Iterable[tuple[int, bool]]) -> None:
        """It is decided."""
        self._settle()
        self._skips = dict(skips)
        if self._to_tell is None:
            return
        (samples, rank, device), self._to_tell = self._to_tell, None
        flags = torch.tensor([self._skips.get(place, False) for place in range(samples)], dtype=torch.uint8)
        sent = flags.to(device)
        self._coming = broadcast(sent, rank, self.group), sent

    def forget(self) -> None:
        """A loop over steps begins."""
        self._settle()
        self._skips, self._to_tell = {}, None

    def finish(self) -> None:
        """The call has ended: where nothing was decided, nothing was skipped."""
        if self._to_tell is not None:
            self.tell([])

    def skips(self, place: int) -> bool:
        """Whether the first branch skipped a sample. Waits for the rank that computes it."""
        self._settle()
        return self._skips.get(place, False)

    def _settle(self) -> None:
        if self._coming is None:
            return
        (work, flags), self._coming = self._coming, None
        work.wait()
        self._skips = dict(enumerate(bool(flag) for flag in flags.tolist()))
