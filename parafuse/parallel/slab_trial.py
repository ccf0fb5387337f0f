"""A run on slabs without values and without the other ranks: it finds an operator that has no rule before anything is
computed or exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from parafuse.errors import UnsupportedError
from parafuse.parallel.slab import SlabRanks


class Alone(SlabRanks):
    """One rank of several, of which the others are not there: what they would send has no values."""

    def __init__(self, ranks: SlabRanks):
        self.degree, self.rank = ranks.degree, ranks.rank

    def gather(self, x: Tensor) -> Tensor:
        return x.new_empty((self.degree, *x.shape))

    def sum(self, x: Tensor) -> Tensor:
        return x.clone()

    def exchange(self, pieces: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        return [like.new_empty(size) for size in sizes]


def refusal(run: Callable[[Any, SlabRanks], Any], given: Any, ranks: SlabRanks) -> UnsupportedError | None:
    """What `run(given, ranks)` would refuse on this rank. None also where that is not to be known without values.
    Local. Does not put back what the run leaves in modules."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            run(tree_map_only(Tensor, mode.from_tensor, given), Alone(ranks))
        except UnsupportedError as error:
            return error
        except Exception:  # a look at values, or what is a fault of the call: the call itself tells
            return None
    return None
