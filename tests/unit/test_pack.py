"""Packing: rows into each rank's part and back, filler zero, against rows picked one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parafuse.parallel.layout import Layout
from parafuse.parallel.pack import join_rows, split_rows
from parafuse.parallel.ring import drop_filler, token_index
from parafuse.parallel.shard import SequenceGroup

layouts = st.builds(Layout, st.lists(st.integers(0, 23), min_size=1, max_size=4).map(tuple), st.integers(1, 6))
B, H, D = 2, 3, 2


def numbered(rows: int, batch: int = B) -> Tensor:
    """(B, N, H, D) of different values, none zero."""
    return torch.arange(1, batch * H * rows * D + 1, dtype=torch.float32).view(batch, rows, H, D)


def taken(x_BN: Tensor, layout: Layout) -> Tensor:
    """(P, B, S, ...): what each rank takes, row by row."""
    return torch.stack([SequenceGroup(layout.degree, r, None).take(x_BN, 1, layout) for r in range(layout.degree)])


@given(layouts, st.integers(1, 2))
def test_split_gives_each_rank_its_rows(layout: Layout, batch: int) -> None:
    x = numbered(layout.total, batch)
    parts = split_rows(x, layout.lengths, layout.parts, layout.degree)
    assert parts.shape == (layout.degree, batch, layout.local, H, D)
    assert parts.is_contiguous()
    assert torch.equal(parts, taken(x, layout))


@given(layouts)
def test_filler_is_zero_and_nothing_else(layout: Layout) -> None:
    parts = split_rows(numbered(layout.total), layout.lengths, layout.parts, layout.degree)
    assert int((parts[:, 0, :, 0, 0] != 0).sum()) == layout.total


@given(layouts, st.integers(1, 2))
def test_join_is_the_inverse_of_split(layout: Layout, batch: int) -> None:
    x = numbered(layout.total, batch)
    parts = split_rows(x, layout.lengths, layout.parts, layout.degree).clone()
    parts[parts == 0] = torch.nan  # filler may hold anything: it is dropped
    assert torch.equal(join_rows(parts, layout.lengths, layout.parts), x)


@given(layouts)
def test_split_is_the_inverse_of_join(layout: Layout) -> None:
    parts = taken(numbered(layout.total), layout)
    again = split_rows(join_rows(parts, layout.lengths, layout.parts), layout.lengths, layout.parts, layout.degree)
    assert torch.equal(again, parts)


@given(st.lists(st.integers(0, 23), min_size=1, max_size=3).map(tuple), st.integers(1, 4), st.integers(1, 4))
def test_the_chunk_of_a_ring_rank(lengths: tuple[int, ...], ring: int, ulysses: int) -> None:
    """Ring outside Ulysses: each ring rank joins the true rows of its Ulysses ranks, in the model's order."""
    layout = Layout(lengths, ring * ulysses)
    x = numbered(layout.total)
    everyone = taken(x, layout)
    for rank in range(ring):
        first = rank * ulysses
        mine = everyone[first : first + ulysses]
        true = join_rows(mine, [n for _, n in layout.spans(first, ulysses)], layout.parts)
        columns = token_index(layout, first, ulysses, x.device)
        assert torch.equal(true, x[:, columns])
        filled = join_rows(mine, [part * ulysses for part in layout.parts], layout.parts)
        assert torch.equal(drop_filler(filled.transpose(1, 2), layout, first, ulysses), true.transpose(1, 2))


@given(layouts)
def test_all_ranks_together_have_every_position_once(layout: Layout) -> None:
    found = [int(i) for rank in range(layout.degree) for i in token_index(layout, rank, 1, torch.device("cpu"))]
    assert sorted(found) == list(range(layout.total))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool])
def test_dtype_and_strides_are_kept(dtype: torch.dtype) -> None:
    layout = Layout((5, 6), 3)
    x = (numbered(11) % 2 > 0).to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
    parts = split_rows(x, layout.lengths, layout.parts, 3)
    assert parts.dtype == dtype
    assert torch.equal(join_rows(parts, layout.lengths, layout.parts), x)
