"""What of a pipeline, a manager or a module parafuse works on, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import nn

from parafuse.config import VAE_AUTO, VAE_REPLICATED, VAE_TILED, Axis
from parafuse.encoding import Encoding
from parafuse.engine.following import Component, is_manager, managed
from parafuse.engine.quantize.settle import TEXT_ENCODERS
from parafuse.engine.vae.tiled import has_tiling
from parafuse.errors import ConfigError

STACKS = ("transformer", "transformer_2", "unconditional_transformer")
"""Pipeline components that hold a block stack, where they are present: what sequence parallel splits."""
DENOISERS = (
    *STACKS, "unet", "image_unet", "text_unet", "prior", "prior_prior", "decoder", "super_res_first", "super_res_last",
)  # fmt: skip
"""Components that a pipeline calls in every step."""
DECODERS = ("vae", "movq", "vqgan", "vqvae")
DECODE = "decode"
"""By which an autoencoder is found; what stands there stands on `encode` too."""
AUTOENCODERS = (*DECODERS, "audio_vae")
"""Components that turn latents into pictures or sound, and back."""


Modules = list[tuple[str, nn.Module]]
"""(name, component)."""


def denoisers(target: Any, names: Sequence[str] = STACKS, *, required: bool = True) -> list[tuple[str, nn.Module]]:
    """(name, module) of a pipeline's denoisers, or of the target itself where it is a module. Raises ConfigError where
    there is none, unless that is allowed."""
    if isinstance(target, nn.Module):
        return [(type(target).__name__, target)]
    modules = [(name, module) for name, module in _named(target, names) if isinstance(module, nn.Module)]
    if not modules and required:
        raise ConfigError(
            f"target={type(target).__name__}: must be a torch module, or a pipeline or a ComponentsManager with "
            f"one of {', '.join(names)}."
        )
    return modules


def device_of(target: Any) -> str:
    """cuda or cpu: where the weights of its denoisers are."""
    parts = (module for _, module in denoisers(target, DENOISERS, required=False))
    first = next((x for part in parts for x in chain(part.parameters(), part.buffers())), None)
    return "cuda" if first is not None and first.is_cuda else "cpu"


def _named(target: Any, names: Sequence[str]) -> list[Component]:
    """(name, component or None) of those names."""
    if is_manager(target):
        return [(name, part) for name, part in managed(target) if name.partition(" ")[0] in names]
    return [(name, getattr(target, name, None)) for name in names]


Wanted = tuple[str, nn.Module, str]
"""Name, component, and the method of it that is to be shared."""


def wanted_of(target: Any, degree: Callable[[Axis], int], encoding: Encoding, vae: str) -> list[Wanted]:
    """What parafuse is to stand on: denoisers, text encoders where they are not simply run everywhere, and autoencoders
    where ranks share a call of one. `vae`: how they do."""
    if is_autoencoder(target):
        return [] if vae == VAE_REPLICATED else [(type(target).__name__, target, DECODE)]
    splits = degree(Axis.RING) * degree(Axis.ULYSSES) > 1
    modules = denoisers(target, STACKS if splits else DENOISERS, required=False)
    found = [(*one, "forward") for one in modules]
    if _are_shared(vae, degree):
        shared = [one for one in autoencoders(target) if vae != VAE_TILED or has_tiling(one[1])]
        found += [(name, module, DECODE) for name, module in shared]
    elif degree(Axis.DATA) > 1:
        found = _batched(target, modules)
    if encoding.acts and not isinstance(target, nn.Module):
        named = _named(target, TEXT_ENCODERS)
        found += [(name, module, "forward") for name, module in named if isinstance(module, nn.Module)]
    return [one for i, one in enumerate(found) if not any(one[1:] == other[1:] for other in found[:i])]


def _are_shared(vae: str, degree: Callable[[Axis], int]) -> bool:
    """Whether something is to stand on autoencoders: with `auto` samples are cut, where an axis is for that."""
    num_ranks = math.prod(degree(axis) for axis in Axis)
    if vae == VAE_AUTO:
        return num_ranks > 1 and degree(Axis.DATA) == 1
    return vae != VAE_REPLICATED and (num_ranks > 1 or vae == VAE_TILED)


def is_autoencoder(target: Any) -> bool:
    """Whether the target itself is one: a module that decodes."""
    return isinstance(target, nn.Module) and callable(getattr(target, DECODE, None))


def autoencoders(target: Any) -> Modules:
    """(name, module) of a pipeline's autoencoders, or of the target itself."""
    if isinstance(target, nn.Module):
        return [(type(target).__name__, target)] if is_autoencoder(target) else []
    named = _named(target, AUTOENCODERS)
    return [(name, one) for name, one in named if isinstance(one, nn.Module) and hasattr(one, DECODE)]


def is_encoder(name: str) -> bool:
    """Whether a component of this name reads the prompt."""
    return name.partition(" ")[0] in TEXT_ENCODERS


def _batched(target: Any, modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module, str]]:
    """(name, module, method) of what a pipeline calls with a batch of samples: its denoisers, and the VAE's decoder."""
    found = [(name, module, "forward") for name, module in modules]
    for name, vae in () if isinstance(target, nn.Module) else _named(target, DECODERS):
        if isinstance(vae, nn.Module) and hasattr(vae, "decode"):
            found.append((f"{name}.decode", vae, "decode"))
    return found


def weighty(target: Any, arriving: Sequence[Component] = ()) -> tuple[Modules, Modules]:
    """(denoisers, text encoders) of a target and of what it is about to get: what may be quantized."""
    found: list[Component] = [*denoisers(target, DENOISERS, required=False)]
    encoders: list[Component] = [] if isinstance(target, nn.Module) else _named(target, TEXT_ENCODERS)
    found += [one for one in arriving if one[0] in DENOISERS]
    encoders += [one for one in arriving if one[0] in TEXT_ENCODERS]
    parts = [(name, one) for name, one in found if isinstance(one, nn.Module)]
    return parts, [(name, one) for name, one in encoders if isinstance(one, nn.Module)]
