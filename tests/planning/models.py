"""Facts and machines that tests of the planner share: small numbers that can be worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from parafuse.engine.planning.facts import (
    ATTENTION,
    DECODE,
    DENOISE,
    ENCODE,
    GEMM,
    Amount,
    Exchanges,
    Facts,
    Operator,
    Part,
)
from parafuse.engine.planning.machine import Device, Link, Machine

TOKENS, WIDTH, HEADS, BLOCKS = 4096, 3072, 24, 20
ITEM = 2


def denoiser(**changes: Any) -> Part:
    """Blocks of one product and one attention; a tenth of the products is the same on every rank."""
    product, pairs = 2.0 * TOKENS * WIDTH * WIDTH, 4.0 * TOKENS * TOKENS * WIDTH
    moved, weights = 2.0 * TOKENS * WIDTH * ITEM, float(WIDTH * WIDTH * ITEM)

    def blocks(shared: bool) -> tuple[Operator, ...]:
        def amount(number: float, part: float = 1.0) -> Amount:
            return Amount(number * (1 - part), number * part) if shared else Amount(number)

        common: dict[str, Any] = {"where": "Block", "dtype": "bfloat16", "count": float(BLOCKS)}
        return (
            Operator(family=GEMM, flops=amount(product, 0.9), bytes=amount(moved), weights=weights, **common),
            Operator(family=ATTENTION, flops=amount(pairs), bytes=amount(2 * moved), columns=WIDTH // HEADS, **common),
            Operator(family="mul", bytes=amount(4 * moved), **common),
            Operator(family="fused", bytes=amount(moved), **common),
        )

    values: dict[str, Any] = {
        "name": "transformer",
        "phase": DENOISE,
        "calls": 10.0,
        "alone": blocks(shared=False),
        "shared": blocks(shared=True),
        "exchanges": Exchanges(
            attention_calls=float(BLOCKS),
            ulysses_bytes=4.0 * TOKENS * WIDTH * ITEM * BLOCKS,
            ulysses_calls=2.0 * BLOCKS,
            ring_bytes=2.0 * TOKENS * WIDTH * ITEM * BLOCKS,
            gather_bytes=float(TOKENS * 64 * ITEM),
            gather_calls=1.0,
        ),
        "peak": Amount(1e8, 4e8),
        "peak_alone": 5e8,
        "heads": (HEADS,),
        "tokens": TOKENS,
        "blocks": {"Block": BLOCKS},
    }
    return Part(**values | changes)


def facts(**changes: Any) -> Facts:
    """A denoiser of 10 steps without guidance, an encoder and a decoder that take little."""
    little = Operator(where="", family="mul", dtype="bfloat16", count=1.0, bytes=Amount(1e6))
    values: dict[str, Any] = {
        "model": "small",
        "model_id": "0",
        "dtype": "bfloat16",
        "call": {"width": 1024, "height": 1024},
        "steps": 10,
        "pictures": 1,
        "branches": 1,
        "stacked": False,
        "weights": {"transformer": int(4e9), "vae": int(1e8), "text_encoder": int(1e9)},
        "parts": (
            Part(name="text_encoder", phase=ENCODE, calls=1.0, alone=(little,), peak_alone=1e7),
            denoiser(),
            Part(name="vae", phase=DECODE, calls=1.0, alone=(little,), peak_alone=2e8, tokens=16384),
        ),
        "result_bytes": float(TOKENS * 64 * ITEM),
    }
    return Facts(**values | changes)


def guided(**changes: Any) -> Facts:
    """The same with two calls of the denoiser in a step."""
    parts = tuple(dataclasses.replace(one, calls=20.0) if one.phase == DENOISE else one for one in facts().parts)
    return facts(**{"branches": 2, "parts": parts} | changes)


DEVICE = Device(
    name="even",
    kind="cuda",
    memory_bytes=int(80e9),
    bytes_per_s=1e12,
    flops={"bfloat16": 1e14, "float32": 1e13, "fp8": 2e14, "int8": 2e14},
    attention={"bfloat16": 1e14, "float32": 1e13, "fp8": None},
    units=1,
)
FAST = Link(name="fast", bytes_per_s=1e12, latency_s=1e-6)
SLOW = Link(name="slow", bytes_per_s=5e9, latency_s=1e-4)


def machine(ranks: int = 8, **changes: Any) -> Machine:
    """Ranks of one node, with fast links."""
    values: dict[str, Any] = {
        "name": f"{ranks}xeven", "device": DEVICE, "per_node": ranks, "nodes": 1, "inside": FAST, "across": SLOW,
    }  # fmt: skip
    return Machine(**values | changes)
