"""Attention over spread tokens equals attention over all of them: masks, causal, scale, any heads and lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parafuse.config import Axis
from parafuse.kernels.attention import Call
from parafuse.parallel.attention import SequenceAttention
from parafuse.parallel.comm import counters
from parafuse.parallel.layout import Layout
from parafuse.parallel.mesh import Mesh, make_mesh
from parafuse.parallel.shard import SequenceGroup
from tests.dist.ranks import COLLECTIVE_S, run_ranks

LAYOUTS = [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2)]
EXACT = 1e-5
on_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "ring{}-ulysses{}".format(*layout))


@dataclass(frozen=True)
class Case:
    """One attention call. Lengths are those of text and image, neither of which divides by 2, 3 or 4."""

    queries: tuple[int, ...] = (13, 35)
    keys: tuple[int, ...] | None = None
    """None: as the queries."""
    kept: tuple[int | None, int | None] = (None, None)
    """The segments of queries and keys that every rank has."""
    heads: int = 4
    key_heads: int | None = None
    size: int = 8
    value_size: int = 8
    mask: str = ""
    causal: bool = False
    scale: float | None = None
    batch: int = 2


CASES = {
    "plain": Case(),
    "one stream": Case(queries=(35,)),
    "equal streams": Case(queries=(35, 35)),
    "three streams": Case(queries=(5, 13, 7)),
    "divides": Case(queries=(24, 48)),
    "an empty stream": Case(queries=(0, 35)),
    "queries are a part of the keys": Case(queries=(35,), keys=(13, 35)),
    "text on every rank": Case(kept=(0, 0)),
    "text on every rank, in the middle, grouped": Case(queries=(5, 13, 7), kept=(1, 1), heads=6, key_heads=2),
    "text on every rank, masks": Case(kept=(0, 0), mask="full", heads=5),
    "text on every rank, causal": Case(queries=(35, 13), kept=(1, 1), causal=True),
    "no text on any rank": Case(queries=(35, 0), kept=(1, 1)),
    "one text token, few others": Case(queries=(2, 1), kept=(1, 1)),
    "keys on every rank": Case(queries=(35,), keys=(13, 35), kept=(None, 0), mask="keys"),
    "queries on every rank": Case(queries=(13,), keys=(35,), kept=(0, None), value_size=12),
    "fewer tokens than ranks": Case(queries=(1, 2)),
    "one token": Case(queries=(1,)),
    "batch 1": Case(batch=1),
    "heads do not divide": Case(heads=5),
    "fewer heads than ranks": Case(heads=1),
    "grouped": Case(heads=6, key_heads=2),
    "grouped, nothing divides": Case(heads=10, key_heads=5),
    "one key head": Case(heads=7, key_heads=1),
    "other size of values": Case(value_size=12),
    "scale": Case(scale=0.7),
    "causal": Case(causal=True),
    "causal, one stream, scale": Case(queries=(35,), causal=True, scale=0.4),
    "key mask": Case(mask="keys"),
    "key mask, few tokens": Case(queries=(2, 3), mask="keys"),
    "full mask": Case(mask="full"),
    "full mask of two dims": Case(mask="two dims"),
    "a mask for each head": Case(mask="heads", heads=5),
    "a mask for each head of three dims": Case(mask="three dims", heads=5),
    "bias": Case(mask="bias"),
    "bias and grouped": Case(mask="bias", heads=6, key_heads=3),
    "a column of queries": Case(mask="queries"),
    "rows without keys": Case(mask="empty rows"),
    "keys of one rank only": Case(mask="first keys"),
}


def make_mask(kind: str, b: int, h: int, n: int, m: int) -> Tensor | None:
    """Masks that a model may pass: True or a number means attend."""
    keys = torch.rand(b, 1, 1, m) < 0.6
    keys[..., -1] = True
    full = torch.rand(b, 1, n, m) < 0.5
    full[..., 0] = True
    empty = full.clone()
    empty[:, :, n // 2 :: 3] = False
    first = torch.zeros(1, 1, 1, m, dtype=torch.bool)
    first[..., : max(1, m // 5)] = True
    masks = {
        "": None,
        "keys": keys,
        "full": full,
        "two dims": full[0, 0],
        "heads": (torch.rand(b, h, n, m) < 0.5) | full,
        "three dims": (torch.rand(h, n, m) < 0.5) | full[0],
        "bias": 3 * torch.randn(1, h, n, m),
        "queries": torch.randn(b, 1, n, 1),
        "empty rows": empty,
        "first keys": first,
    }
    return masks[kind]


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, Call]:
    """q, k, v over all tokens; the keys of every fourth run of 5 tokens are 4x larger."""
    keys = case.keys or case.queries
    n, m = sum(case.queries), sum(keys)
    key_heads = case.key_heads or case.heads
    q = torch.randn(case.batch, case.heads, n, case.size)
    k = torch.randn(case.batch, key_heads, m, case.size)
    v = torch.randn(case.batch, key_heads, m, case.value_size)
    k[:, :, torch.arange(m) // 5 % 4 == 1] *= 4.0
    return q, k, v, Call(make_mask(case.mask, case.batch, case.heads, n, m), case.scale, case.causal)


def mesh_of(layout: tuple[int, int]) -> Mesh:
    degrees = dict.fromkeys(Axis, 1) | {Axis.RING: layout[0], Axis.ULYSSES: layout[1]}
    return make_mesh(degrees, "cpu", COLLECTIVE_S)


def spread(case: Case, mesh: Mesh) -> tuple[Tensor, Tensor, Layout, SequenceGroup]:
    """(result for this rank's rows, result for all rows by torch, layout of the queries, this rank's group)."""
    q, k, v, call = tensors(case)
    ranks = SequenceGroup(mesh.sequence_degree, mesh.sequence_rank, mesh.sequence)
    queries = Layout(case.queries, ranks.degree, case.kept[0])
    keys = Layout(case.keys or case.queries, ranks.degree, case.kept[1])
    whole = F.scaled_dot_product_attention(
        q, k, v, attn_mask=call.mask, is_causal=call.is_causal, scale=call.scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    local = SequenceAttention(mesh)(
        ranks.take(q, 2, queries), ranks.take(k, 2, keys), ranks.take(v, 2, keys), queries, keys, call
    )
    return local, whole, queries, ranks


def compare(layout: tuple[int, int]) -> dict[str, Any]:
    """Case -> error of this rank's rows, largest value of its filler rows."""
    mesh = mesh_of(layout)
    out: dict[str, Any] = {}
    for name, case in CASES.items():
        local, whole, queries, ranks = spread(case, mesh)
        filler = ranks.take(torch.ones_like(whole), 2, queries) == 0
        difference = local - ranks.take(whole, 2, queries)
        out[name] = (largest(difference) / largest(whole), largest(local[filler]))
    return out


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


@on_layouts
def test_equals_attention_over_all_tokens(layout: tuple[int, int]) -> None:
    for found in run_ranks(compare, layout[0] * layout[1], layout):
        assert {name: pair for name, pair in found.items() if not pair[0] <= EXACT or pair[1] != 0.0} == {}
        assert len(found) == len(CASES)


def halves(layout: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """Case -> root mean square errors against fp32 of (spread, torch) attention in bf16.

    Not the largest: a ring rounds each block's result and then the sum, torch rounds once, so that one value in
    thousands may be off by a little over twice torch's half unit in the last place."""
    mesh = mesh_of(layout)
    out = {}
    for name in ("plain", "heads do not divide", "key mask", "grouped", "bias"):
        case = CASES[name]
        q, k, v, call = tensors(case)
        q, k, v = (x.bfloat16() for x in (q, k, v))
        mask = call.mask if call.mask is None or call.mask.dtype == torch.bool else call.mask.bfloat16()
        grouped = k.shape[1] != q.shape[1]
        exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        truth = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), exact_mask, enable_gqa=grouped)
        plain = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)
        ranks = SequenceGroup(mesh.sequence_degree, mesh.sequence_rank, mesh.sequence)
        rows = Layout(case.queries, ranks.degree)
        mine = [ranks.take(x, 2, rows) for x in (q, k, v)]
        local = SequenceAttention(mesh)(mine[0], mine[1], mine[2], rows, rows, Call(mask))
        got = ranks.gather(local, 2, rows)
        out[name] = (float((got - truth).square().mean().sqrt()), float((plain - truth).square().mean().sqrt()))
    return out


@pytest.mark.parametrize("layout", [(1, 3), (3, 1), (4, 1), (2, 2)], ids=str)
def test_bfloat16_error_is_at_most_twice_that_of_torch(layout: tuple[int, int]) -> None:
    for found in run_ranks(halves, layout[0] * layout[1], layout):
        assert {name: pair for name, pair in found.items() if not 0 < pair[0] <= 2 * pair[1]} == {}
        assert len(found) == 5


def traced(layout: tuple[int, int]) -> list[str] | None:
    """Ring events of one attention."""
    mesh = mesh_of(layout)
    log = counters(mesh.groups[Axis.RING])
    log.trace = []
    try:
        spread(CASES["plain"], mesh)
        return log.trace
    finally:
        log.trace = None


@pytest.mark.parametrize("layout", [(2, 1), (3, 1), (4, 1), (2, 2)], ids=str)
def test_the_next_block_is_sent_before_the_one_at_hand_is_attended(layout: tuple[int, int]) -> None:
    ring = layout[0]
    events = [f"{what} {step}" for step in range(ring - 1) for what in ("send", "attend")] + [f"attend {ring - 1}"]
    assert run_ranks(traced, ring * layout[1], layout) == [events] * (ring * layout[1])


def sent(layout: tuple[int, int]) -> tuple[dict[str, tuple[int, int]], int]:
    """Calls and bytes of one Ulysses attention by kind, and the number of other custom exchanges."""
    mesh = mesh_of(layout)
    group = counters(mesh.groups[Axis.ULYSSES])
    before = {kind: (count.calls, count.bytes) for kind, count in group.kinds.items()}
    spread(CASES["divides"], mesh)
    now = {
        kind: (count.calls - before.get(kind, (0, 0))[0], count.bytes - before.get(kind, (0, 0))[1])
        for kind, count in group.kinds.items()
    }
    return {kind: pair for kind, pair in now.items() if pair != (0, 0)}, mesh.sequence_degree


def test_ulysses_packs_q_k_and_v_in_one_exchange() -> None:
    rows, width = 24 + 48, 4 * 8
    for kinds, degree in run_ranks(sent, 2, (1, 2)):
        assert kinds == {"all_to_all": (2, 2 * 4 * 4 * rows * width // degree * (degree - 1) // degree)}
