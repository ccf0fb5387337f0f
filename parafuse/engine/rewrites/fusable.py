"""Which attentions can have one product for queries, keys and values: tried on a small call of a copy with random
weights, since diffusers' own fused form is not used by every processor, and leaves out norms in some."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parafuse.parallel.fingerprint import fingerprint

SOURCES = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""A joint projection that diffusers makes -> what it stands for, in the order of its rows."""
PROJECTIONS = tuple(dict.fromkeys(name for names in SOURCES.values() for name in names))
EXACT = 1e-5
TEXTS = (2, 515)
"""Tokens of text that are tried; Wan takes what is over 512 as tokens of a picture."""


def attentions(module: nn.Module) -> list[tuple[str, Any]]:
    """(name, attention) of all that diffusers could fuse."""
    found = [(name, part) for name, part in module.named_modules() if callable(getattr(part, "fuse_projections", None))]
    return [(name, part) for name, part in found if isinstance(getattr(part, "to_q", None), nn.Module)]


def projections(attention: nn.Module) -> dict[str, nn.Module]:
    """Its own, by name."""
    found = attention._modules
    return {name: part for name in PROJECTIONS if (part := found.get(name)) is not None}


def why_not_plain(attention: nn.Module) -> str:
    """Why its projections cannot be read now; empty where they can."""
    for part in projections(attention).values():
        if hasattr(part, "lora_A") or hasattr(part, "base_layer"):
            return "an adapter is on its projections"
        if type(part) is not nn.Linear:
            return f"its projections are {type(part).__name__}"
        if type(part.weight.data) is not Tensor or not part.weight.is_floating_point() or part.weight.itemsize < 2:
            return "its weights are quantized"
        if part.weight.is_meta:
            return "its weights are offloaded"
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            return "another library stands on its projections"
    return ""


class Trials:
    """What was found out for each kind of attention. Draws from its own generator, changes nothing."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[Any, str]] = {}

    def __call__(self, attention: Any) -> tuple[Any, str]:
        """(processor for the fused form, why there is none): its own one, or a new one of the class that diffusers has
        for it."""
        key = (fingerprint(attention), type(attention.processor).__qualname__)
        if key not in self._known:
            self._known[key] = _try(attention)
        processor, why_not = self._known[key]
        if why_not or isinstance(processor, type(attention.processor)):
            return attention.processor, why_not
        return type(processor)(), ""


def _try(attention: Any) -> tuple[Any, str]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        plain = _randomized(copy.deepcopy(attention).to("cpu", torch.float32))
        tried = next(((values, found) for values in _calls(plain) if (found := _outputs(plain, values))), None)
        if tried is None:
            return None, "it cannot be tried by itself"
        values, want = tried
        why_not = ""
        for processor in (attention.processor, *_fused_form(attention.processor)):
            fused: Any = copy.deepcopy(plain)
            try:
                fused.fuse_projections()
                fused.set_processor(processor)
            except (AttributeError, RuntimeError, TypeError) as error:
                return None, f"diffusers cannot fuse it ({str(error).partition(chr(10))[0]})"
            joint = [name for name in SOURCES if name in fused._modules]
            if not joint:
                return None, "its class has no joint projection"
            _spoil(fused, joint)
            got = _outputs(fused, values)
            if got and all(_error(a, b) <= EXACT for a, b in zip(got, want, strict=True)):
                return processor, ""
            why_not = why_not or f"{type(processor).__name__} does not use a joint projection"
            if processor is not attention.processor:
                why_not = f"{type(processor).__name__} gives something else than {type(attention.processor).__name__}"
        return None, why_not


def _fused_form(processor: Any) -> list[Any]:
    """What diffusers puts in the place of a processor that knows no joint projection."""
    from diffusers.models import attention_processor

    found = getattr(attention_processor, f"Fused{type(processor).__name__}", None)
    return [found()] if found is not None else []


def _calls(attention: Any) -> Iterator[dict[str, Tensor]]:
    """Arguments of small calls: with text where it takes one, else without; last with text as wide as its tokens."""
    generator = torch.Generator().manual_seed(1)
    wide, text = attention.to_q.in_features, 0
    if getattr(attention, "is_cross_attention", False) or attention.to_k.in_features != wide:
        text = attention.to_k.in_features
    elif getattr(attention, "add_k_proj", None) is not None:
        text = attention.add_k_proj.in_features
    knows_text = "encoder_hidden_states" in inspect.signature(attention.processor.__call__).parameters
    tokens = torch.randn(2, 5, wide, generator=generator)
    for length in TEXTS if text else ():
        yield {"hidden_states": tokens, "encoder_hidden_states": torch.randn(2, length, text, generator=generator)}
    if not text:
        yield {"hidden_states": tokens}
    if not text and knows_text:
        yield {"hidden_states": tokens, "encoder_hidden_states": torch.randn(2, 3, wide, generator=generator)}


def _outputs(attention: Any, values: dict[str, Tensor]) -> list[Tensor]:
    """Of one call; empty where it fails, or gives what is no number."""
    try:
        result = attention(**values)
    except Exception:  # whatever a processor says to arguments that are not there
        return []
    found = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]
    return found if all(bool(x.isfinite().all()) for x in found) else []


def _randomized(attention: nn.Module) -> nn.Module:
    """With random weights, none of them zero, so that every path counts."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in attention.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.copy_(noise / math.sqrt(weight[0].numel()))
        else:
            weight.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
    return attention


def _spoil(attention: nn.Module, joint: list[str]) -> None:
    """What is replaced must not be used."""
    for name in joint:
        for source in SOURCES[name]:
            attention.get_submodule(source).get_parameter("weight").fill_(math.nan)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max()) if got.shape == want.shape else math.inf
