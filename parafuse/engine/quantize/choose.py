"""Which linear layers are quantized, and for each other one why not: by full name, kind and size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from parafuse.engine.quantize.pack import is_packed, method_of
from parafuse.engine.quantize.roles import pattern_of, sees_samples
from parafuse.engine.stack import named_blocks
from parafuse.errors import ConfigError, nearest
from parafuse.quantization import Quantize

OUTSIDE = "outside of the repeated blocks"
MODULATION = "sees one row for each sample"
ADAPTER = "of an adapter"
NAMED = "named in skip"
EARLIER = "left when the others were quantized"
BASE = ".base_layer"
"""What PEFT puts between an adapted layer's name and its weights."""


@dataclass
class Choice:
    """Of one component."""

    component: str
    layers: dict[str, nn.Linear] = field(default_factory=dict[str, nn.Linear])
    """Full name -> layer that is to be quantized."""
    there: dict[str, Quantize] = field(default_factory=dict[str, Quantize])
    """Full name -> what it is quantized with already."""
    left: dict[str, str] = field(default_factory=dict[str, str])
    """Full name -> why it stays as it is."""


def choose(component: str, model: nn.Module, method: Quantize) -> Choice:
    """Looks through a component's linear layers. Raises ConfigError for a name in `skip` that it has not."""
    blocks = named_blocks(model)
    choice = Choice(component)
    shared = Counter(id(module.weight) for module in model.modules() if isinstance(module, nn.Linear))
    skipped = _skipped(component, model, method)
    own: Any = getattr(model, "dtype", None)  # diffusers looks through all weights for it
    for name, holder, layer in _linears(model):
        known = name.removesuffix(BASE)
        packed = method_of(layer.weight)
        if packed is not None:
            choice.there[known] = packed
            continue
        reason = (
            _place(model, known, holder, blocks)
            or (NAMED if pattern_of(known) in skipped or known in skipped else "")
            or _kind(layer, shared, own)
            or _size(layer, method)
        )
        if reason:
            choice.left[known] = reason
        else:
            choice.layers[known] = layer
    if choice.there:  # such a component stays as it is
        choice.left |= dict.fromkeys(choice.layers, EARLIER)
        choice.layers.clear()
    return choice


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Linear]]:
    """(full name, module that holds it, layer), each once."""
    seen: set[int] = set()
    for path, holder in model.named_modules():
        for name, layer in holder.named_children():
            if isinstance(layer, nn.Linear) and id(layer) not in seen:
                seen.add(id(layer))
                yield f"{path}.{name}" if path else name, holder, layer


def _place(model: nn.Module, name: str, holder: nn.Module, blocks: dict[str, nn.Module]) -> str:
    parts = name.split(".")
    if not any(".".join(parts[:length]) in blocks for length in range(1, len(parts))):
        return OUTSIDE
    if isinstance(holder, nn.ModuleDict):
        return ADAPTER  # PEFT's lora_A and lora_B
    return MODULATION if sees_samples(model, name, holder) else ""


def _kind(layer: nn.Linear, shared: Counter[int], own: Any) -> str:
    weight: Any = layer.weight
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, no plain linear layer"
    if is_packed(weight):
        return f"quantized by another library ({type(weight).__name__})"
    if shared[id(weight)] > 1:
        return "its weight is another layer's too"
    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        return f"kept in {dtype}"
    other = str(own).removeprefix("torch.")
    return f"kept in {dtype}, the model in {other}" if own is not None and weight.dtype != own else ""


def _size(layer: nn.Linear, method: Quantize) -> str:
    sizes = {"inputs": layer.in_features, "outputs": layer.out_features}
    for what, size in sizes.items():
        if size < method.min_features:
            return f"{size} {what}, fewer than {method.min_features}"
    for what, size in sizes.items():
        if size % method.block:
            return f"{size} {what}, no multiple of {method.block}"
    return ""


def _skipped(component: str, model: nn.Module, method: Quantize) -> set[str]:
    """Names in `skip` of this component, without it. Raises ConfigError for one that no layer has."""
    names = [name.removesuffix(BASE) for name, _, _ in _linears(model)]
    known = {*names, *map(pattern_of, names)}
    found: set[str] = set()
    for full in method.skipped:
        part, _, name = full.partition(".")
        if part != component:
            continue
        if name not in known:
            hint = nearest(name, known) or "; names are full, with * for a number."
            raise ConfigError(f"quantize {method.method}: skip={full!r}: {component} has no such layer{hint}")
        found.add(name)
    return found


def check_skip(method: Quantize, components: Sequence[str]) -> None:
    """Raises ConfigError for a name in `skip` of a component that is not quantized."""
    for full in method.skipped:
        part = full.partition(".")[0]
        if part not in components:
            raise ConfigError(
                f"quantize {method.method}: skip={full!r}: begins with no component that is quantized here "
                f"({', '.join(components)})."
            )
