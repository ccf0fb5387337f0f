"""What of a model's weights is in memory, looked at from outside of what moves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from parafuse.parallel.image import carriers


class Watch(TorchDispatchMode):
    """Counts, at every operator, the bytes of weights that are no stand-ins for what is away."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._tensors = [x for weight in model.parameters() for x in carriers(weight) if x.numel() > 1]
        self.most_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = sum(x.nbytes for x in self._tensors if any(x.stride()))
        self.most_bytes = max(self.most_bytes, there)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def on(self) -> Iterator[None]:
        with self:
            yield
