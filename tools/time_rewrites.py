"""Times blocks of diffusers' models with the rewrites `qkv` and `rope` and without, on this machine: ratios of medians,
variants in turns, exactness beside each.

    python tools/time_rewrites.py qkv --tokens 256,1024 --dtype float32
    python tools/time_rewrites.py qkv --compile
    python tools/time_rewrites.py rope --width 768
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parafuse.engine.rewrites.qkv import FusedProjections
from parafuse.engine.rewrites.rope import compile_options, lines_of

Call = Callable[[], Any]
TEXT = 0.125
"""Tokens of text for each of the image."""


def flux(width: int, tokens: int) -> tuple[nn.Module, tuple[Any, ...]]:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    text, heads = int(tokens * TEXT), width // 128
    rows = (torch.randn(1, tokens, width), torch.randn(1, text, width), torch.randn(1, width))
    return FluxTransformerBlock(width, heads, 128), (*rows, _tables(tokens + text, 128))


def flux_single(width: int, tokens: int) -> tuple[nn.Module, tuple[Any, ...]]:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    text, heads = int(tokens * TEXT), width // 128
    rows = (torch.randn(1, tokens, width), torch.randn(1, text, width), torch.randn(1, width))
    return FluxSingleTransformerBlock(width, heads, 128), (*rows, _tables(tokens + text, 128))


def sd3(width: int, tokens: int) -> tuple[nn.Module, tuple[Any, ...]]:
    from diffusers.models.attention import JointTransformerBlock

    text = int(tokens * TEXT)
    rows = (torch.randn(1, tokens, width), torch.randn(1, text, width), torch.randn(1, width))
    return JointTransformerBlock(width, width // 64, 64), rows


def sdxl(width: int, tokens: int) -> tuple[nn.Module, tuple[Any, ...]]:
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(width, width // 64, 64, cross_attention_dim=2048)
    return block, (torch.randn(2, tokens, width), None, torch.randn(2, 77, 2048))


BLOCKS = {"flux": (flux, 3072), "flux single": (flux_single, 3072), "sd3": (sd3, 1536), "sdxl": (sdxl, 1280)}


def _tables(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(tokens, width // 2).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


def medians(variants: dict[str, Call], runs: int) -> dict[str, float]:
    """Seconds of each, run in turns after one call each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(runs):
        for name, call in variants.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def error(got: Any, want: Any) -> float:
    """Largest difference over largest value, of all results."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def time_qkv(name: str, width: int, tokens: int, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    block, values = BLOCKS[name][0](width, tokens)
    other, _ = BLOCKS[name][0](width, tokens)
    other.load_state_dict(block.state_dict())
    block, other = (one.eval().requires_grad_(False).to(args.dtype) for one in (block, other))
    FusedProjections(other).install()
    plain, fused = block, other
    if args.compile:
        plain, fused = (torch.compile(one, fullgraph=True, dynamic=False) for one in (block, other))
    values = _to(values, args.dtype)
    shown = f"error {error(fused(*values), plain(*values)):.1e}"
    found = medians({"plain": lambda: plain(*values), "fused": lambda: fused(*values)}, args.runs)
    ratio = found["plain"] / found["fused"]
    return f"{1e3 * found['plain']:8.1f} ms -> {1e3 * found['fused']:8.1f} ms, {ratio:.3f}x, {shown}"


def time_rope(name: str, width: int, tokens: int, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    block, values = BLOCKS[name][0](width, tokens)
    block, values = block.eval().requires_grad_(False).to(args.dtype), _to(values, args.dtype)
    want = block(*values)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    options: dict[str, dict[str, Any]] = {}
    for way, names in (("plain", ()), ("rope", ("rope",))):
        torch._dynamo.reset()
        options[way] = compile_options(names, {"fx_graph_cache": False})
        one: Any = torch.compile(block, fullgraph=True, dynamic=False, options=options[way])
        errors[way] = error(one(*values), want)
        calls[way] = lambda one=one: one(*values)
    found = medians(calls, args.runs)
    ratio = found["plain"] / found["rope"]
    shown = f"error {errors['plain']:.1e} -> {errors['rope']:.1e}; {lines_of(options['rope'])[0]}"
    return f"{1e3 * found['plain']:8.1f} ms -> {1e3 * found['rope']:8.1f} ms, {ratio:.3f}x, {shown}"


def _to(values: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Tables stay in fp32, as models have them."""
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewrite", choices=("qkv", "rope"))
    parser.add_argument("--blocks", default="flux,sd3,sdxl", help=f"of {', '.join(BLOCKS)}")
    parser.add_argument("--tokens", default="64,256,1024")
    parser.add_argument("--width", type=int, default=0, help="in the place of the published one")
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    run = time_qkv if args.rewrite == "qkv" else time_rope
    with torch.no_grad():
        for name in args.blocks.split(","):
            for tokens in map(int, args.tokens.split(",")):
                torch._dynamo.reset()
                width = args.width or BLOCKS[name][1]
                print(f"{name:12s} {width:5d} wide, {tokens:5d} tokens: {run(name, width, tokens, args)}", flush=True)


if __name__ == "__main__":
    main()
