"""Negative controls: each safeguard is broken on purpose, and it must show. Else the tests beside these are blind."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import parafuse
from parafuse.engine import standing as standing_module
from parafuse.engine.probe import probe
from parafuse.parallel import attention, attention_mode, pack, ring
from parafuse.parallel.attention import RankAttention
from parafuse.parallel.block_plan import BlockPlan, Site
from parafuse.parallel.comm import Rotation
from parafuse.parallel.layout import Layout
from tests.dist.ranks import run_ranks
from tests.dist.test_attention import Case, mesh_of, spread
from tests.dist.test_sequence import parallel
from tests.models import ODD, build, call, error, inputs

EXACT, VISIBLE = 1e-5, 1e-3
MASKED = Case(mask="keys")
DIVIDES = Case(queries=(12, 36), mask="keys")
Patch = tuple[Any, str, Any]


def filler_is_attended() -> list[Patch]:
    """Faults 5 and 7: rows that pad the tail are keys like others."""

    def keep(x_BHND: Tensor, layout: Layout, first: int, count: int) -> Tensor:
        return x_BHND

    def columns(layout: Layout, first: int, count: int, device: torch.device) -> Tensor:
        found = ring_index(layout, first, count, device)
        return torch.cat([found, found[-1:].expand(count * layout.local - len(found))])

    ring_index = ring.token_index
    return [(ring, "drop_filler", keep), (ring, "token_index", _keys_only(columns))]


def _keys_only(replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The ring asks for its query rows first, then for each block of keys: replace the latter only."""
    original, calls = ring.token_index, [0]

    def index(layout: Layout, *args: Any) -> Tensor:
        calls[0] += 1
        return original(layout, *args) if calls[0] == 1 else replacement(layout, *args)

    return index


def filler_is_unpacked() -> list[Patch]:
    """Fault 7, in Ulysses: only the tail of the whole is trimmed, not the tail of each stream."""
    original = pack.join_rows

    def join(x_PBS: Tensor, lengths: list[int], parts: tuple[int, ...]) -> Tensor:
        joined = original(x_PBS, [len(x_PBS) * part for part in parts], parts)
        return joined[:, : sum(lengths)]

    return [(pack, "join_rows", join)]


def mask_is_of_the_local_rows() -> list[Patch]:
    """Fault 6: the keys that arrive meet the mask of the keys that left."""
    original, own = ring.token_index, []

    def index(layout: Layout, first: int, count: int, device: torch.device) -> Tensor:
        own.append(first)
        return original(layout, own[0], count, device)

    return [(ring, "token_index", index)]


def mask_is_in_another_order() -> list[Patch]:
    """Rows are told apart as if the streams were one, while the mask is in the model's order."""

    def index(layout: Layout, first: int, count: int, device: torch.device) -> Tensor:
        start = sum(n for _, n in layout.spans(0, first))
        return torch.arange(start, start + sum(n for _, n in layout.spans(first, count)), device=device)

    return [(ring, "token_index", index)]


def rows_are_in_another_order() -> list[Patch]:
    """Ulysses that leaves rows as the ranks sent them, rank by rank, while the mask is in the model's order."""
    original = pack.join_rows

    def join(x_PBS: Tensor, lengths: list[int], parts: tuple[int, ...]) -> Tensor:
        return original(x_PBS, [sum(lengths)], [x_PBS.shape[2]])

    return [(pack, "join_rows", join)]


def heads_come_back_in_another_order() -> list[Patch]:
    """The way back takes the ranks' heads from the last rank on."""
    original, gather = attention.head_range, RankAttention._gather_heads

    def backwards(self: RankAttention, *args: Any) -> Tensor:
        with patch.object(attention, "head_range", lambda n, degree, index: original(n, degree, degree - 1 - index)):
            return gather(self, *args)

    return [(RankAttention, "_gather_heads", backwards)]


def another_key_head() -> list[Patch]:
    """Grouped heads: each query head takes the next group's keys."""
    original = attention._key_of_head

    def shifted(*args: Any) -> list[int]:
        found = original(*args)
        return [(key + 1) % (max(found) + 1) for key in found]

    return [(attention, "_key_of_head", shifted)]


def the_wait_is_dropped() -> list[Patch]:
    """Attention goes on with what the receive buffer held before: here, the block that was sent."""
    original = Rotation.post

    def post(self: Rotation, send_N: Tensor, step: int) -> tuple[Tensor, list[Any]]:
        _, pending = original(self, send_N, step)
        for work in pending:
            work.wait()
        return send_N.clone(), []

    return [(Rotation, "post", post)]


def the_merge_is_blind() -> list[Patch]:
    """Fault 8: a backend without a log-sum-exp is merged as if it were zero."""
    original = attention.attention_lse

    def blind(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = original(*args, **kwargs)
        return out, torch.zeros_like(lse)

    return [(attention, "attention_lse", blind)]


BROKEN: list[tuple[Callable[[], list[Patch]], tuple[int, int], Case]] = [
    (filler_is_attended, (3, 1), Case()),
    (filler_is_attended, (2, 2), Case()),
    (filler_is_unpacked, (1, 3), Case()),
    (filler_is_unpacked, (1, 4), Case()),
    (mask_is_of_the_local_rows, (2, 1), DIVIDES),
    (mask_is_of_the_local_rows, (3, 1), DIVIDES),
    (mask_is_in_another_order, (3, 1), MASKED),
    (mask_is_in_another_order, (2, 2), MASKED),
    (rows_are_in_another_order, (1, 2), DIVIDES),
    (rows_are_in_another_order, (1, 3), DIVIDES),
    (heads_come_back_in_another_order, (1, 2), DIVIDES),
    (another_key_head, (1, 2), Case(heads=8, key_heads=4)),
    (another_key_head, (3, 1), Case(heads=8, key_heads=4)),
    (the_wait_is_dropped, (2, 1), Case()),
    (the_wait_is_dropped, (4, 1), DIVIDES),
    (the_merge_is_blind, (2, 1), Case()),
    (the_merge_is_blind, (4, 1), Case()),
]


def with_and_without(breakage: Callable[[], list[Patch]], layout: tuple[int, int], case: Case) -> tuple[float, float]:
    """Errors of the gathered result: as it is, and with the safeguard broken."""
    mesh = mesh_of(layout)
    errors = []
    for patches in ([], breakage()):
        torch.manual_seed(0)
        with ExitStack() as stack:
            for target, name, replacement in patches:
                stack.enter_context(patch.object(target, name, replacement))
            local, whole, queries, ranks = spread(case, mesh)
        errors.append(error(ranks.gather(local, 2, queries), whole))
    return errors[0], errors[1]


@pytest.mark.parametrize(
    ("breakage", "layout", "case"),
    BROKEN,
    ids=[f"{breakage.__name__}-ring{layout[0]}-ulysses{layout[1]}" for breakage, layout, _ in BROKEN],
)
def test_a_broken_safeguard_shows(breakage: Any, layout: tuple[int, int], case: Case) -> None:
    for whole, broken in run_ranks(with_and_without, layout[0] * layout[1], breakage, layout, case):
        assert whole <= EXACT
        assert VISIBLE < broken < math.inf


def without_exchange(block: Any, *args: Any) -> BlockPlan:
    """A plan in which self-attention sees the rank's own rows only, as cross-attention may."""
    plan = probe(block, *args[:3])
    return BlockPlan(
        plan.arguments, (plan.sites[0], *(Site(site.queries, None) for site in plan.sites[1:])), plan.results
    )


def model_errors(layout: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """What -> (error as it is, error when broken) of whole models."""
    out = {}
    for name, family, target, attribute, broken in (
        ("the dual attention stays local", "sd3", standing_module, "derive", without_exchange),
        (
            "the mask is dropped",
            "weaver",
            attention_mode,
            "Call",
            lambda mask, scale, causal: attention.Call(None, scale, causal),
        ),
    ):
        model, values = build(family), inputs(family, ODD)
        plain = call(model, values)
        errors = []
        for replacement in (getattr(target, attribute), broken):
            with patch.object(target, attribute, replacement), parafuse.apply(model, parallel(layout)):
                errors.append(error(call(model, values), plain))
        out[name] = (errors[0], errors[1])
    return out


@pytest.mark.parametrize("layout", [(1, 3), (3, 1)], ids=str)
def test_a_wrong_plan_shows_in_the_output(layout: tuple[int, int]) -> None:
    for found in run_ranks(model_errors, 3, layout):
        assert {
            name: pair for name, pair in found.items() if not (pair[0] <= EXACT and VISIBLE < pair[1] < math.inf)
        } == {}
        assert len(found) == 2
