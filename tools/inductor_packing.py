"""Counts what Inductor makes of a block on one of 8 ranks: attention's packing hidden in an operator, and standing in
the graph. As `inductor_kernels.py`, for an H200 that need not be there; needs the `triton` package.

    PYTHONPATH=. python tools/inductor_packing.py [flux] [--show]
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from inductor_kernels import Case, _joint, _of, _rope_order, _tables, capture, kernels, pretend
from torch import Tensor, nn
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

from parafuse.parallel.attention_mode import AttentionMode

RANKS = 8
FLUX, WAN = "diffusers.models.transformers.transformer_flux", "diffusers.models.transformers.transformer_wan"
IMAGE, TEXT, VIDEO = 4096 // RANKS, 512 // RANKS, 75600 // RANKS


def _wan_inputs() -> tuple[Any, ...]:
    tables = _of(1, VIDEO, 1, 128, dtype=torch.float32), _of(1, VIDEO, 1, 128, dtype=torch.float32)
    return _of(1, VIDEO, 5120), _of(1, 512, 5120), _of(1, 6, 5120, dtype=torch.float32), tables


CASES = {
    "flux double": (
        Case(
            FLUX, "FluxTransformerBlock", (3072, 24, 128), lambda: (*_joint(IMAGE, TEXT, 3072), _tables(IMAGE + TEXT))
        ),
        (TEXT, IMAGE),
    ),
    "flux single": (
        Case(
            FLUX,
            "FluxSingleTransformerBlock",
            (3072, 24, 128),
            lambda: (*_joint(IMAGE, TEXT, 3072), _tables(IMAGE + TEXT)),
        ),
        (TEXT, IMAGE),
    ),
    "wan": (Case(WAN, "WanTransformerBlock", (5120, 13824, 40, "rms_norm_across_heads", True), _wan_inputs), (VIDEO,)),
}


@torch.library.custom_op("count::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    return q.new_empty(b, s, h, d).transpose(1, 2)


@torch.library.custom_op("count::exchange", mutates_args=())
def exchange(x: Tensor) -> Tensor:
    raise NotImplementedError


@exchange.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def hidden(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Packing, exchanges and attention as one operator."""
    return attention(q, k, v)


def visible(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Packing in the graph, without writes in place: (P, B, S, 3, h, D) goes out, (P, B, S, h, D) comes back."""
    packed = torch.stack([x.unflatten(1, (RANKS, -1)).permute(1, 0, 3, 2, 4) for x in (q, k, v)], dim=3)
    received = exchange(packed).transpose(0, 1)
    joined = [part.flatten(1, 2) for part in received.split(list(lengths), dim=2)]
    q, k, v = (x.transpose(1, 2) for x in torch.cat(joined, dim=1).unbind(2))
    out = attention(q, k, v).transpose(1, 2)
    parts = out.split([length * RANKS for length in lengths], dim=1)
    send = torch.cat([x.unflatten(1, (RANKS, -1)) for x in parts], dim=2).transpose(0, 1)
    return exchange(send.contiguous()).permute(1, 2, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def inside(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """As `hidden`; its block has no norm of queries and keys, and no rotary embedding: a kernel inside does them."""
    return attention(q, k, v)


def without_norm_and_rope(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Takes them from the block's self-attention; the arguments without rotary tables."""
    attn: Any = getattr(block, "attn", None) or block.attn1
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        if getattr(attn, name, None) is not None:
            setattr(attn, name, nn.Identity())
    return (*args[:-1], None)


WAYS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "hidden": (hidden, False),
    "hidden, rope order": (hidden, True),
    "visible": (visible, False),
    "visible, rope order": (visible, True),
    "norm and rope inside": (inside, False),
}


def main(names: list[str], *, shows: bool) -> None:
    """Prints a line for each case and way."""
    graphs: dict[tuple[str, str], Any] = {}
    for name, (case, lengths) in CASES.items():
        if names and not any(part in name for part in names):
            continue
        for way, (attend, orders) in WAYS.items():
            with FakeTensorMode(allow_non_fake_inputs=True):
                torch.set_default_dtype(torch.bfloat16)
                block: nn.Module = getattr(importlib.import_module(case.module), case.name)(*case.sizes).eval()
                torch.set_default_dtype(torch.float32)
                args = case.inputs() if way != "norm and rope inside" else without_norm_and_rope(block, case.inputs())

                def run(*args: Any, block: nn.Module = block, attend: Any = attend, lengths: Any = lengths) -> Any:
                    def at(site: int, q: Tensor, k: Tensor, v: Tensor, call: Any, given: Any) -> Tensor:
                        if site:  # cross-attention exchanges nothing
                            return F.scaled_dot_product_attention(q, k, v)
                        return attend(q, k, v, lengths)

                    with AttentionMode(at):
                        return block(*args)

                options = {"post_grad_custom_pre_pass": _rope_order()} if orders else {}
                graphs[name, way] = capture(run, args, options)
    pretend()
    for (name, way), (graph, inputs) in graphs.items():
        with config.patch({"fx_graph_cache": False}):
            found = kernels(graph, inputs)
        print(f"{name:12s} {way:22s} {len(found.triton):3d} Triton kernels, {found.moved_bytes / 1e6:6.1f} MB moved")
        if shows:
            print("".join(f"    {kernel}\n" for kernel in found.triton), end="")


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if not word.startswith("--")], shows="--show" in sys.argv)
