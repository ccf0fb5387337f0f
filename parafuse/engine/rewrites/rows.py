"""Linear layers whose results are known beforehand: each gives the row of the step at hand, out of one buffer that is
filled once a step. Compiled graphs see the same tensor in every step."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parafuse.parallel.held import OF_THE_CALL


class RowLinear(nn.Linear):
    """What an `nn.Linear` is while its results are looked up. Its weights, names and hooks are its own."""

    _of_the_call: Tensor
    """The row; nothing where the layer runs."""

    def forward(self, input: Tensor) -> Tensor:
        row = self._of_the_call
        return row if row.numel() else F.linear(input, self.weight, self.bias)

    def _get_name(self) -> str:
        return nn.Linear.__name__


class Rows:
    """The layers of one denoiser that give rows. `fill` before a call, `empty` after it."""

    def __init__(self) -> None:
        self._none = _still(torch.empty(0))
        self._ready: list[nn.Linear] = []
        self._on: dict[nn.Linear, None] = {}
        self._buffers: dict[Any, tuple[list[Tensor], dict[nn.Linear, Tensor]]] = {}
        """By shapes: one flat buffer for each dtype, and the views of them that layers give."""

    def prepare(self, module: nn.Module) -> None:
        """Gives each linear layer the place for a row at once: what watches the module sees no change later."""
        self._ready += [part for part in module.modules() if type(part) is nn.Linear]
        for layer in self._ready:
            vars(layer)[OF_THE_CALL] = self._none

    def add(self, layers: list[nn.Linear]) -> None:
        """Makes layers give rows, where there are any."""
        for layer in layers:
            if layer not in self._on:
                layer.__class__ = RowLinear
                vars(layer)[OF_THE_CALL] = self._none
                self._on[layer] = None

    def remove(self) -> None:
        """Puts all layers back as they were."""
        for layer in self._on:
            layer.__class__ = nn.Linear
        for layer in (*self._ready, *self._on):
            vars(layer).pop(OF_THE_CALL, None)
        self._ready.clear()
        self._on.clear()
        self._buffers.clear()

    def buffers(self, like: dict[nn.Linear, Tensor]) -> tuple[list[Tensor], dict[nn.Linear, Tensor]]:
        """Flat buffers for results like these, one for each dtype, and the views that layers give. The same for the
        same shapes, so that what was compiled or captured stays right."""
        key = tuple((id(layer), x.shape, x.dtype, x.device) for layer, x in like.items())
        if key not in self._buffers:
            flats: list[Tensor] = []
            views: dict[nn.Linear, Tensor] = {}
            with torch.inference_mode(False), torch.no_grad():
                for group in by_dtype(like):
                    flat = torch.empty(sum(like[layer].numel() for layer in group), dtype=like[group[0]].dtype)
                    flats.append(flat.to(like[group[0]].device))
                    sizes = [like[layer].numel() for layer in group]
                    for layer, part in zip(group, flats[-1].split(sizes), strict=True):
                        views[layer] = _still(part.view(like[layer].shape))
            self._buffers[key] = flats, views
        return self._buffers[key]

    def show(self, views: dict[nn.Linear, Tensor]) -> None:
        for layer, view in views.items():
            vars(layer)[OF_THE_CALL] = view

    def hide(self, views: dict[nn.Linear, Tensor]) -> None:
        for layer in views:
            vars(layer)[OF_THE_CALL] = self._none


def by_dtype(like: dict[nn.Linear, Tensor]) -> list[list[nn.Linear]]:
    """Layers whose results have the same dtype."""
    found: dict[torch.dtype, list[nn.Linear]] = {}
    for layer, x in like.items():
        found.setdefault(x.dtype, []).append(layer)
    return list(found.values())


def bytes_of(like: dict[nn.Linear, Tensor]) -> int:
    """Of the results of one step."""
    return sum(x.numel() * x.element_size() for x in like.values())


def weight_bytes(layers: list[nn.Linear]) -> int:
    """Read from memory where these layers run."""
    return sum(math.prod(p.shape) * p.element_size() for layer in layers for p in layer.parameters(recurse=False))


def _still(x: Tensor) -> Tensor:
    """As a parameter: what watches a module for changes does not take its values for a part of it."""
    return nn.Parameter(x, requires_grad=False)
