"""Quantizes the components of a pipeline in place, layer by layer, and takes it off where the originals are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from parafuse.engine.plan import Plan
from parafuse.engine.quantize.choose import Choice, check_skip, choose
from parafuse.engine.quantize.mark import mark
from parafuse.engine.quantize.pack import kernel_works, packed, set_weight
from parafuse.engine.quantize.saved import fits
from parafuse.engine.quantize.settle import TEXT_ENCODERS, settled
from parafuse.engine.quantized import compute_dtype
from parafuse.errors import ConfigError
from parafuse.quantization import CALIBRATED, NONE, Fp8, Int8Weight, Quantize, quantize_of

Parts = Sequence[tuple[str, nn.Module]]
"""(name, component) of a pipeline."""


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


def asked_of(denoisers: Parts, encoders: Parts, method: Quantize, *, required: bool = True) -> list[Asked]:
    """What is quantized, each module once. Raises ConfigError where text encoders are asked for and there are none."""
    found = [Asked(name, model, method) for name, model in denoisers]
    own = method.for_text_encoders()
    if own is not None:
        if not encoders and required:
            raise ConfigError(
                f"quantize {method.method}: text_encoders={method.text_encoders}: there is none of "
                f"{', '.join(TEXT_ENCODERS)} here; use text_encoders={NONE}."
            )
        found += [Asked(name, model, own) for name, model in encoders]
    return list({id(one.model): one for one in reversed(found)}.values())[::-1]


def existing(parts: Parts) -> dict[str, Quantized]:
    """Component -> what of it is quantized by torchao already, whoever did it."""
    found: dict[str, Quantized] = {}
    for name, model in parts:
        choice = choose(name, model, Int8Weight(min_features=1))
        if choice.there:
            found[name] = Quantized(choice, next(iter(choice.there.values())), None, model)
    return found


def checked(
    method: Quantize | str | None, denoisers: Parts, encoders: Parts, world_size: int, device: str | None = None
) -> Quantize | None:
    """The method with nothing left to be told, for where the models are, or where they compute (`device`). Raises
    ConfigError for what cannot be had, and for what is quantized already and cannot be used."""
    method = quantize_of(method)
    there = existing([*denoisers, *encoders])
    for name, one in there.items():
        _check_existing(name, one, method, world_size, device)
    if method is None:
        return None
    asked = asked_of(denoisers, encoders, method)
    if not asked:
        raise ConfigError(f"quantize {method.method}: there is no denoiser to quantize; leave quantize out.")
    done = [_settled(one.method, one.model, world_size, device, is_saved=one.name in there) for one in asked]
    method = replace(done[0], text_encoders=method.text_encoders)
    chosen(asked_of(denoisers, encoders, method), method)
    return method


def _check_existing(
    name: str, one: Quantized, method: Quantize | None, world_size: int, device: str | None = None
) -> None:
    """Raises ConfigError for fp8 weights that are there and cannot be used here, or would give another picture."""
    is_allowed = isinstance(method, Fp8) and method.reference
    for found in {it.brief: it for it in one.choice.there.values()}.values():
        if isinstance(found, Fp8):
            try:
                _settled(replace(found, reference=is_allowed), one.model, world_size, device, is_saved=True)
            except ConfigError as error:
                raise ConfigError(f"{name}: is quantized already: {error}") from error


def _settled(
    method: Quantize, model: nn.Module, world_size: int, device: str | None = None, *, is_saved: bool
) -> Quantize:
    first: Any = next(iter(model.parameters()))
    where: Any = first.device if device is None else torch.device(device)
    return settled(
        replace(method, text_encoders=NONE),
        device=where.type,
        capability=torch.cuda.get_device_capability(where) if where.type == "cuda" else None,
        dtype=compute_dtype(model) or "packed",
        world_size=world_size,
        saved=is_saved,
    )


def chosen(asked: list[Asked], method: Quantize) -> list[Choice]:
    """Looks through all of them before anything is changed. Raises ConfigError for what cannot be quantized so. A
    component that is quantized already stays as it is."""
    check_skip(method, [one.name for one in asked])
    found = [choose(one.name, one.model, one.method) for one in asked]
    for one, choice in zip(asked, found, strict=True):
        other = next((f"{name} is {it.brief}" for name, it in choice.there.items() if not fits(it, one.method)), None)
        if other:
            raise ConfigError(
                f"quantize {one.method.method}: {one.name} is quantized already ({other}); leave quantize out, or load "
                "the model as it was."
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
    anything is changed; where something fails later, what was kept of the originals is put back."""
    choices = chosen(asked, method)
    for one, choice in zip(asked, choices, strict=True):
        is_calibrated = isinstance(one.method, Fp8) and one.method.scale == CALIBRATED
        if is_calibrated and not all((largest or {}).get(one.name, {}).get(name) for name in choice.layers):
            raise ConfigError(f"quantize {one.method.method}: scale={CALIBRATED}: {one.name} was not measured.")
    _probe(asked, device)
    done: list[Quantized] = []
    with ExitStack() as back:
        for one, choice in zip(asked, choices, strict=True):
            if choice.there:
                done.append(Quantized(choice, one.method, None, one.model))
                continue
            originals: list[tuple[nn.Linear, nn.Parameter]] = []
            undo = _putting_back(originals, mark(one.model, one.method))
            back.callback(undo)
            keep = originals if method.keep_originals else None
            _pack(choice, one.method, device, (largest or {}).get(one.name, {}), keep)
            done.append(Quantized(choice, one.method, undo if method.keep_originals else None, one.model))
        back.pop_all()
    return done


def _probe(asked: list[Asked], device: torch.device | None) -> None:
    """Raises ConfigError where the GPU refuses a small product of a method after all."""
    for one in asked:
        first: Any = next(iter(one.model.parameters()))
        where = device or first.device
        if where.type != "cuda" or not one.method.computes:
            continue
        why = kernel_works(where, one.method, getattr(torch, compute_dtype(one.model) or "bfloat16"))
        if why:
            more = ", or another scale" if isinstance(one.method, Fp8) else ""
            raise ConfigError(
                f"quantize {one.method.method}: this GPU refuses its products for {one.name} ({why}); use fp8-weight "
                f"or int8-weight{more}."
            )


def _pack(
    choice: Choice,
    method: Quantize,
    device: torch.device | None,
    largest: Mapping[str, float],
    keep: list[tuple[nn.Linear, nn.Parameter]] | None,
) -> None:
    """`keep`: gets the original weights, in the host's memory."""
    with torch.no_grad():
        for name, layer in choice.layers.items():
            weight: Any = layer.weight
            there = weight.data if device is None else weight.data.to(device)
            set_weight(layer, packed(there, method, largest.get(name)))
            if keep is not None:
                if weight.device.type != "cpu":
                    weight.data = weight.data.cpu()
                keep.append((layer, weight))


def _putting_back(
    originals: list[tuple[nn.Linear, nn.Parameter]], taken_off: Callable[[], None] | None
) -> Callable[[], None]:
    """Goes on where it was left, when it is called again."""
    marks = [taken_off] if taken_off is not None else []

    def undo() -> None:
        while originals:
            layer, weight = originals[-1]
            device = layer.weight.device
            if weight.device != device:
                weight.data = weight.data.to(device)
            layer.weight = weight
            originals.pop()
        while marks:
            marks[-1]()
            marks.pop()

    return undo


def quantize_loaded(plan: Plan, denoisers: Parts, encoders: Parts, device: torch.device) -> list[Quantized]:
    """Quantizes what has just been loaded, on its way to the device: there only what is quantized arrives, and one
    layer at a time. Local; every rank calls it."""
    method = quantize_of(plan.quantize or None)
    return [] if method is None else quantize(asked_of(denoisers, encoders, method), method, device=device)
