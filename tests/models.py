"""Small models with seeded weights and their inputs: real diffusers classes, and a transformer that is in no library.

Every family is data: how to build it, its inputs for given sizes, and the self-attentions of one forward. Sizes by
default divide by nothing, the batch is 2, and the keys of the first block are 4x larger than the others'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.weaver import Weaver

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Tokens of one call."""

    grid: tuple[int, int, int] = (1, 5, 7)
    """Frames, rows and columns of image tokens."""
    text: int = 13
    batch: int = 2

    @property
    def image(self) -> int:
        return math.prod(self.grid)


ODD = Sizes()
EVEN = Sizes(grid=(2, 4, 6), text=24)
"""Divides by 2, 3 and 4."""
EQUAL = Sizes(grid=(1, 5, 7), text=35)
TINY = Sizes(grid=(1, 1, 3), text=2)
"""Fewer tokens than ranks."""
ONE = Sizes(grid=(1, 1, 1), text=1)
SINGLE = Sizes(batch=1)


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    build: Callable[[int], nn.Module]
    """Number of heads -> a model in eval mode, weights not set yet."""
    inputs: Callable[[Sizes], Inputs]
    head_size: int
    attends: Callable[[Sizes], list[int]]
    """Tokens of every self-attention of one forward, in order."""
    num_cross: int = 0
    """Attention calls to replicated keys in one forward."""


def flux(heads: int) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=heads, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def flux2(heads: int) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=heads, joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def sd3(heads: int) -> nn.Module:
    """Two attentions in the first block, and a last block that drops the text."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=heads,
        joint_attention_dim=32, caption_projection_dim=8 * heads, pooled_projection_dim=32, out_channels=4,
        dual_attention_layers=(0,), qk_norm="rms_norm", pos_embed_max_size=16,
    )  # fmt: skip


def wan(heads: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip


def positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """(S, width) of (0, ..., row, column)."""
    rows = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid))
    return F.pad(rows[:, 1:], (1, width - 3))


def flux_inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=torch.randn(sizes.batch, sizes.image, 4),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        pooled_projections=torch.randn(sizes.batch, 32),
        timestep=torch.rand(sizes.batch),
        img_ids=positions(sizes.grid, 3),
        txt_ids=torch.zeros(sizes.text, 3),
        return_dict=False,
    )


def flux2_inputs(sizes: Sizes) -> Inputs:
    text_positions = F.pad(torch.arange(sizes.text, dtype=torch.float32)[:, None], (3, 0))
    inputs = flux_inputs(sizes) | dict(
        guidance=torch.ones(sizes.batch), img_ids=positions(sizes.grid, 4), txt_ids=text_positions
    )
    del inputs["pooled_projections"]
    return inputs


def sd3_inputs(sizes: Sizes) -> Inputs:
    frames, rows, columns = sizes.grid
    return dict(
        hidden_states=torch.randn(sizes.batch, 4, 2 * frames * rows, 2 * columns),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 32),
        pooled_projections=torch.randn(sizes.batch, 32),
        timestep=torch.rand(sizes.batch) * 1000,
        return_dict=False,
    )


def wan_inputs(sizes: Sizes) -> Inputs:
    frames, rows, columns = sizes.grid
    return dict(
        hidden_states=torch.randn(sizes.batch, 4, frames, 2 * rows, 2 * columns),
        timestep=torch.randint(0, 999, (sizes.batch,)),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        return_dict=False,
    )


def wan_ti2v_inputs(sizes: Sizes) -> Inputs:
    """A timestep for every token: the conditioning of a block has a token dim."""
    return wan_inputs(sizes) | dict(timestep=torch.randint(0, 999, (sizes.batch, sizes.image)))


def weaver_inputs(sizes: Sizes) -> Inputs:
    """The second sample's text has holes: its first and its last words are masked."""
    legible = torch.ones(sizes.batch, sizes.text, dtype=torch.bool)
    legible[-1, :1] = False
    legible[-1, sizes.text // 2 :] = False
    return dict(
        cloth=torch.randn(sizes.batch, sizes.image, 4),
        words=torch.randn(sizes.batch, sizes.text, 16),
        legible=legible,
        mood=torch.randn(sizes.batch, 16),
    )


def _joint(count: int) -> Callable[[Sizes], list[int]]:
    return lambda sizes: [sizes.image + sizes.text] * count


FAMILIES: dict[str, Family] = {
    "flux": Family(flux, flux_inputs, 16, _joint(4)),
    "flux2": Family(flux2, flux2_inputs, 16, _joint(4)),
    "sd3": Family(sd3, sd3_inputs, 8, lambda s: [s.image + s.text, s.image, s.image + s.text, s.image + s.text]),
    "wan": Family(wan, wan_inputs, 12, lambda s: [s.image] * 2, num_cross=2),
    "wan_ti2v": Family(wan, wan_ti2v_inputs, 12, lambda s: [s.image] * 2, num_cross=2),
    "weaver": Family(lambda heads: Weaver(heads=heads, key_heads=heads), weaver_inputs, 8, _joint(3)),
    "weaver_gqa": Family(lambda heads: Weaver(heads=2 * heads, key_heads=heads), weaver_inputs, 8, _joint(3)),
}


def build(family: str, *, heads: int = 3, seed: int = 0) -> nn.Module:
    """The family's model with random weights: equal on all ranks, and none zero, so that every path counts."""
    model = FAMILIES[family].build(heads).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith(_SCALES) else 0.0))
    for name, parameter in model.named_parameters():
        if name.startswith(_FIRST_BLOCKS) and any(part in name for part in _KEY_SCALES):
            parameter.mul_(4.0)
    return model


_SCALES = tuple(f"{norm}.weight" for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "norm2", "calm"))
_FIRST_BLOCKS = ("transformer_blocks.0.", "single_transformer_blocks.0.", "blocks.0.", "weaves.0.")
_KEY_SCALES = ("norm_k.", "norm_added_k.", "key_calm.")


def inputs(family: str, sizes: Sizes, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Inputs:
    """Arguments of one call, equal on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = FAMILIES[family].inputs(sizes)
    floats = {name for name, x in values.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {name: x.to(dtype) if name in floats and not name.endswith("_ids") else x for name, x in values.items()}


def call(model: nn.Module, values: Inputs) -> Tensor:
    """The model's output tensor."""
    with torch.no_grad():
        out = model(**values)
    return out[0] if isinstance(out, tuple) else out


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over largest value; inf where shapes differ or a value is no number."""
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return math.inf
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())
