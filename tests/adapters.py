"""Adapters with random weights, in the forms in which diffusers takes them: LoRA, IP-Adapter, textual inversion."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.collect import randomized

Weights = dict[str, Tensor]
IMAGE_WIDTH = 20
"""Features of a picture for an IP-Adapter."""


def lora(pipeline: Any, names: Iterable[str], *, rank: int, seed: int, every: int = 1, size: float = 0.6) -> Weights:
    """A LoRA of `rank` for each linear layer and convolution of components, in peft's format; `every`: of so many
    layers one only. `size`: of what it adds to a layer, against the layer."""
    generator, found = torch.Generator().manual_seed(seed), {}

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    for name in names:
        for number, (layer, module) in enumerate(_layers(getattr(pipeline, name))):
            if number % every:
                continue
            inner = list(module.weight.shape[1:])
            found[f"{name}.{layer}.lora_A.weight"] = drawn(rank, *inner)
            found[f"{name}.{layer}.lora_B.weight"] = size * drawn(module.weight.shape[0], rank, *[1 for _ in inner[1:]])
    return found


def _layers(component: nn.Module) -> list[tuple[str, Any]]:
    """Those that the component has without adapters; of text encoders the attention alone, which diffusers has names
    for."""
    is_text = "Text" in type(component).__name__
    return [
        (name.removesuffix(".base_layer"), module)
        for name, module in component.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and ".lora_" not in name
        if not is_text or ".self_attn." in name
    ]


def _randomized(module: nn.Module, seed: int) -> Weights:
    with torch.no_grad():
        return dict(randomized(module, seed).state_dict())


def _projection(width: int, seed: int) -> Weights:
    """Of a picture to 4 tokens of `width` features."""
    parts = nn.ModuleDict(dict(proj=nn.Linear(IMAGE_WIDTH, 4 * width), norm=nn.LayerNorm(width)))
    return _randomized(parts, seed)


def ip_adapter_for_unet(unet: Any, *, seed: int) -> dict[str, Weights]:
    """Keys and values for each cross-attention, by number as published: 1, 3, 5 and so on."""
    width = unet.config.cross_attention_dim
    sites = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    weights: Weights = {}
    # diffusers' order is that of `attn_processors`: down, up, then mid.
    order = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    assert len(order) == len(sites)
    for number, name in enumerate(order):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        parts = nn.ModuleDict({kind: nn.Linear(width, attention.inner_dim, bias=False) for kind in ("k", "v")})
        drawn = _randomized(parts, seed + number)
        weights |= {f"{2 * number + 1}.to_{kind}_ip.weight": drawn[f"{kind}.weight"] for kind in ("k", "v")}
    return {"image_proj": _projection(width, seed), "ip_adapter": weights}


def ip_adapter_for_flux(transformer: Any, *, seed: int) -> dict[str, Weights]:
    """Keys and values for each block of two streams."""
    width = transformer.config.joint_attention_dim
    weights: Weights = {}
    for number in range(transformer.config.num_layers):
        parts = nn.ModuleDict({f"to_{kind}_ip": nn.Linear(width, transformer.inner_dim) for kind in ("k", "v")})
        weights |= {f"{number}.{name}": x for name, x in _randomized(parts, seed + number).items()}
    return {"image_proj": _projection(width, seed), "ip_adapter": weights}


def ip_adapter_for_sd3(transformer: Any, *, seed: int) -> dict[str, Weights]:
    """A resampler to 5 tokens that knows the time, and what each block's attention adds."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    width, hidden = transformer.inner_dim, 64
    resampler = IPAdapterTimeImageProjection(
        embed_dim=IMAGE_WIDTH, output_dim=width, hidden_dim=hidden, heads=1, num_queries=5, timestep_in_dim=16
    )
    weights: Weights = {}
    for number in range(len(transformer.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=width,
            ip_hidden_states_dim=width,
            head_dim=transformer.config.attention_head_dim,
            timesteps_emb_dim=hidden,
        )
        weights |= {f"{number}.{name}": x for name, x in _randomized(processor, seed + number).items()}
    return {"image_proj": _randomized(resampler, seed), "ip_adapter": weights}


def inversion(text_encoder: Any, count: int, *, seed: int) -> Tensor:
    """(count, width): embeddings of a word that stands for `count` tokens."""
    width = text_encoder.get_input_embeddings().weight.shape[-1]
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
