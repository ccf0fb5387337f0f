"""Quantizes the components of a pipeline in place, layer by layer, and takes it off where the originals are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from parafuse.engine.plan import Plan
from parafuse.engine.quantize.choose import Choice, check_skip, choose
from parafuse.engine.quantize.mark import mark
from parafuse.engine.quantize.pack import kernel_works, packed, set_weight
from parafuse.engine.quantize.settle import settled
from parafuse.engine.quantized import compute_dtype
from parafuse.errors import ConfigError
from parafuse.quantization import NONE, Fp8, Quantize, quantize_of

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "mllm", "llm")
"""Pipeline components that read the prompt, where they are present."""


@dataclass
class Asked:
    """A component, and what it is to be quantized with."""

    name: str
    model: nn.Module
    method: Quantize


@dataclass
class Quantized:
    """What was done to one component."""

    choice: Choice
    method: Quantize
    undo: Callable[[], None] | None = None
    """Puts the original weights back; None where they were not kept."""
    model: nn.Module = field(default_factory=nn.Module)


def asked_of(
    denoisers: Iterable[tuple[str, nn.Module]], pipeline: Any, method: Quantize, *, required: bool = True
) -> list[Asked]:
    """What is quantized, each module once. Raises ConfigError where text encoders are asked for and there are none."""
    found = [Asked(name, model, method) for name, model in denoisers]
    encoders = method.for_text_encoders()
    if encoders is not None:
        there = [(name, getattr(pipeline, name, None)) for name in TEXT_ENCODERS]
        there = [(name, model) for name, model in there if isinstance(model, nn.Module)]
        if not there and required:
            raise ConfigError(
                f"quantize {method.method}: text_encoders={method.text_encoders}: there is none of "
                f"{', '.join(TEXT_ENCODERS)} here; use text_encoders={NONE}."
            )
        found += [Asked(name, model, encoders) for name, model in there]
    return list({id(one.model): one for one in reversed(found)}.values())[::-1]


def checked(
    method: Quantize | str | None, denoisers: Iterable[tuple[str, nn.Module]], pipeline: Any, world_size: int
) -> Quantize | None:
    """The method with nothing left to be told, for where the models are. Raises ConfigError for what cannot be had."""
    method = quantize_of(method)
    if method is None:
        return None
    asked = asked_of(denoisers, pipeline, method)
    if not asked:
        raise ConfigError(f"quantize {method.method}: there is no denoiser to quantize; leave quantize out.")
    first: Any = next(iter(asked[0].model.parameters()))
    is_done = any(choose(one.name, one.model, one.method).there for one in asked)
    method = settled(
        method,
        device=first.device.type,
        capability=torch.cuda.get_device_capability(first.device) if first.is_cuda else None,
        dtype=compute_dtype(asked[0].model) or "packed",
        world_size=world_size,
        saved=is_done,
    )
    chosen(asked, method)
    return method


def chosen(asked: list[Asked], method: Quantize) -> list[Choice]:
    """Looks through all of them before anything is changed. Raises ConfigError for what cannot be quantized so."""
    check_skip(method, [one.name for one in asked])
    found = [choose(one.name, one.model, one.method) for one in asked]
    for one, choice in zip(asked, found, strict=True):
        other = next((f"{name} is {kind}" for name, kind in choice.there.items() if kind != one.method.method), None)
        if other or (choice.there and choice.layers):
            raise ConfigError(
                f"quantize {one.method.method}: {one.name} is quantized already ({other or 'in part'}); leave quantize "
                "out, or load the model as it was."
            )
        if not choice.there and not choice.layers:
            reasons = sorted(set(choice.left.values())) or ["no linear layers"]
            raise ConfigError(
                f"quantize {one.method.method}: {one.name} has no layer to quantize ({'; '.join(reasons[:4])}); "
                "leave quantize out, or lower min_features."
            )
    return found


def quantize(
    asked: list[Asked],
    method: Quantize,
    *,
    device: torch.device | None = None,
    largest: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Quantized]:
    """Quantizes them in place, each layer on `device` (None: where it is), so that beside what is quantized one layer
    at most is there in both forms. Local; the same on every rank.

    `largest`: component -> layer -> largest value that it is given, for calibrated scales. Raises ConfigError before
    anything is changed."""
    choices = chosen(asked, method)
    _probe(asked, device)
    done: list[Quantized] = []
    for one, choice in zip(asked, choices, strict=True):
        originals = _pack(choice, one.method, device, (largest or {}).get(one.name, {}), method.keep_originals)
        taken_off = mark(one.model, one.method) if choice.layers else None
        undo = None
        if originals is not None:
            undo = _putting_back(originals, taken_off)
        done.append(Quantized(choice, one.method, undo, one.model))
    return done


def _probe(asked: list[Asked], device: torch.device | None) -> None:
    """Raises ConfigError where the GPU refuses a small product of a method after all."""
    for method in {one.method for one in asked if one.method.computes}:
        why = kernel_works(device, method) if device is not None and device.type == "cuda" else ""
        if why:
            more = ", or another scale" if isinstance(method, Fp8) else ""
            raise ConfigError(
                f"quantize {method.method}: this GPU refuses its products ({why}); use fp8-weight or int8-weight{more}."
            )


def _pack(
    choice: Choice, method: Quantize, device: torch.device | None, largest: Mapping[str, float], keeps: bool
) -> list[tuple[nn.Linear, nn.Parameter]] | None:
    """The original weights, in the host's memory, where they are to be kept."""
    originals: list[tuple[nn.Linear, nn.Parameter]] = []
    with torch.no_grad():
        for name, layer in choice.layers.items():
            weight: Any = layer.weight
            there = weight.data if device is None else weight.data.to(device)
            set_weight(layer, packed(there, method, largest.get(name)))
            if keeps:
                if weight.device.type != "cpu":
                    weight.data = weight.data.cpu()
                originals.append((layer, weight))
    return originals if keeps else None


def _putting_back(
    originals: list[tuple[nn.Linear, nn.Parameter]], taken_off: Callable[[], None] | None
) -> Callable[[], None]:
    def undo() -> None:
        for layer, weight in originals:
            device = layer.weight.device
            if weight.device != device:
                weight.data = weight.data.to(device)
            layer.weight = weight
        originals.clear()
        if taken_off is not None:
            taken_off()

    return undo


def quantize_loaded(
    pipeline: Any, plan: Plan, denoisers: Iterable[tuple[str, nn.Module]], device: torch.device
) -> None:
    """Quantizes what has just been loaded, on its way to the device: there only what is quantized arrives, and one
    layer at a time. Local; every rank calls it."""
    method = quantize_of(plan.quantize or None)
    if method is not None:
        quantize(asked_of(denoisers, pipeline, method), method, device=device)
