"""A second device on a machine that has none: tensors carry a mark of where they are, and an operator that is given
tensors of two places fails, as it does on GPUs. What is computed is computed on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from parafuse.engine.placement.put_on import Placing
from parafuse.parallel.hops import Hop
from parafuse.parallel.shard import Sharded

MAIN, OTHER = torch.device("cpu"), torch.device("cuda", 1)
COPIES = ("copy_", "type_as")


class Places(TorchFunctionMode):
    """Where each tensor is. Inside, all operators look."""

    def __init__(self) -> None:
        super().__init__()
        self._of = WeakTensorKeyDictionary()
        self.num_there = 0
        """Operators that ran on the other device."""

    def where(self, x: Tensor) -> torch.device:
        return self._mark(x) or MAIN

    def _mark(self, x: Tensor) -> torch.device | None:
        return self._of.get(x.local if isinstance(x, Sharded) else x, MAIN)

    def put(self, x: Tensor, device: torch.device | None) -> None:
        """None: made inside, where its maker has asked for, which cannot be seen here."""
        self._of[x.local if isinstance(x, Sharded) else x] = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = [self._mark(x) for x in given if x.dim()]  # GPUs take numbers of the CPU
        known = list(dict.fromkeys(place for place in places if place is not None))
        if len(known) > 1 and getattr(func, "__name__", "") not in COPIES:
            raise RuntimeError(f"Expected all tensors to be on the same device: {getattr(func, '__name__', func)}")
        place = known[0] if known else None
        result = func(
            *args, **kwargs
        )  # a tensor says of itself that it is on the CPU: to(x.device) leaves it where it is
        self.num_there += place == OTHER
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not any(x is one for one in given):
                self.put(x, place)
        return result


class StandInHop(Hop):
    """Marks instead of copies."""

    def __init__(self, there: torch.device, places: Places):
        super().__init__(there)
        self._places = places

    def where(self, x: Tensor) -> torch.device:
        return self._places.where(x)

    def move(self, x: Tensor, device: torch.device) -> Tensor:
        if self.where(x) == device:
            return x
        with torch._C.DisableTorchFunction() if type(x) is Tensor else nullcontext():
            moved = x.clone()
        self._places.put(moved, device)
        return moved

    def on(self) -> AbstractContextManager[Any]:
        return nullcontext()


class StandInPlacing(Placing):
    """Device 0 is the CPU, device 1 is made up."""

    marks: Places

    @classmethod
    def over(cls, places: Places) -> Any:
        """In the place of `Placing.of`."""

        def of(method: Any, target: Any) -> Placing:
            one = cls(method, lambda number: OTHER if number == "1" else MAIN, target)
            one.marks = places
            return one

        return of

    def send(self, x: Tensor, device: torch.device) -> None:
        self.marks.put(x, device)

    def hop(self, device: torch.device) -> Hop:
        return StandInHop(device, self.marks)
