"""What can be placed by itself: small components, the blocks of others, and what these have beside their blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from parafuse.engine.placement.unbuilt import Unbuilt
from parafuse.engine.quantize.choose import choose
from parafuse.engine.quantize.settle import TEXT_ENCODERS
from parafuse.engine.stack import named_blocks
from parafuse.engine.targets import DECODERS, DENOISERS
from parafuse.quantization import Quantize

SCALE_BYTES = 4
"""Of a quantized layer, for each row of outputs."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A module that has weights of its own."""

    path: str
    component: str
    block: str | None
    """Path of the block that it is in."""
    weights: tuple[str, ...]
    """Paths of those that are saved: a map must give them a place. Other buffers go with them."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """It is in one place, and runs as one."""

    path: str
    """The component, for its rest or all of it; or a block."""
    component: str
    num_bytes: int


def pieces_of(owners: Iterable[Owner]) -> list[Piece]:
    """Of all components, the rest of each before its blocks, and these in order."""
    sizes: dict[tuple[str, str], int] = {}
    for one in sorted(owners, key=lambda one: one.block is not None):  # stable: else in their order
        place = (one.component, one.block or one.component)
        sizes.setdefault((one.component, one.component), 0)
        sizes[place] = sizes.get(place, 0) + one.num_bytes
    components = list(dict.fromkeys(component for component, _ in sizes))
    ordered = sorted(sizes.items(), key=lambda item: components.index(item[0][0]))
    return [Piece(path=path, component=component, num_bytes=size) for (component, path), size in ordered]


def owners_of(found: Unbuilt, method: Quantize | None) -> list[Owner]:
    """All that have weights, in order of execution as far as modules stand in it. Weights that are tied count once."""
    owners = [one for name, model in found.modules.items() for one in _of_module(name, model, method)]
    whole = [(name, size) for name, size in found.others.items()]
    return owners + [
        Owner(path=name, component=name, block=None, weights=(name,), num_bytes=size) for name, size in whole
    ]


def _of_module(name: str, model: nn.Module, method: Quantize | None) -> Iterator[Owner]:
    blocks = [f"{name}.{path}" for path in ({} if name in DECODERS else named_blocks(model))]
    small = _quantized(name, model, method)
    counted: set[int] = set()
    for path, owner in model.named_modules(prefix=name):
        tensors = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
        weights = {f"{path}.{leaf}": tensor for leaf, tensor in tensors}
        if not weights:
            continue
        named = [f"{path}.{leaf}" for leaf, _ in tensors if leaf not in owner._non_persistent_buffers_set]
        new = {key: tensor for key, tensor in weights.items() if id(tensor) not in counted}
        counted.update(id(tensor) for tensor in new.values())
        sizes = [small[path] if key == f"{path}.weight" and path in small else _bytes(one) for key, one in new.items()]
        block = next((one for one in blocks if f"{path}.".startswith(f"{one}.")), None)
        yield Owner(path=path, component=name, block=block, weights=tuple(named), num_bytes=sum(sizes))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _quantized(name: str, model: nn.Module, method: Quantize | None) -> dict[str, int]:
    """Path of a layer -> bytes of its weight in 8 bits, of those that are to be quantized."""
    wanted = method if name in DENOISERS else method.for_text_encoders() if method and name in TEXT_ENCODERS else None
    if wanted is None:
        return {}
    layers = choose(name, model, wanted).layers
    return {f"{name}.{path}": one.weight.numel() + SCALE_BYTES * one.out_features for path, one in layers.items()}
