"""How tokens and heads are spread: every row on exactly one rank, in order, and the byte formulas counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parafuse.parallel.layout import Layout, head_range, key_head_range, part_rows, ring_bytes, ulysses_bytes

layouts = st.builds(Layout, st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple), st.integers(1, 7))


def held(layout: Layout, rank: int) -> list[tuple[int, int]]:
    """(segment, row) of everything a rank holds, filler left out."""
    return [(i, start + r) for i, (start, n) in enumerate(layout.spans(rank)) for r in range(n)]


@given(layouts)
def test_every_row_is_on_one_rank_in_order(layout: Layout) -> None:
    for segment, length in enumerate(layout.lengths):
        rows = [row for rank in range(layout.degree) for s, row in held(layout, rank) if s == segment]
        assert rows == list(range(length))
    assert layout.total == sum(len(held(layout, rank)) for rank in range(layout.degree))


@given(layouts)
def test_all_ranks_hold_parts_of_one_size_with_little_filler(layout: Layout) -> None:
    assert layout.local == sum(layout.parts)
    for length, part in zip(layout.lengths, layout.parts, strict=True):
        assert part == part_rows(length, layout.degree)
        assert part * layout.degree - length in range(layout.degree)
    for rank in range(layout.degree):
        assert all(n <= part for (_, n), part in zip(layout.spans(rank), layout.parts, strict=True))


@given(layouts, st.data())
def test_the_span_of_several_ranks_is_their_spans_together(layout: Layout, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, layout.degree - 1))
    count = data.draw(st.integers(1, layout.degree - first))
    single = [layout.spans(rank) for rank in range(first, first + count)]
    for segment, (start, number) in enumerate(layout.spans(first, count)):
        assert number == sum(spans[segment][1] for spans in single)
        assert start == single[0][segment][0]


@given(layouts, st.data())
def test_whole_segments_can_be_selected(layout: Layout, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(layout.lengths)))
    last = data.draw(st.integers(first, len(layout.lengths)))
    start, stop = sum(layout.lengths[:first]), sum(layout.lengths[:last])
    found = layout.select(start, stop)
    assert found is not None
    sub, offset, rows = found
    assert (sub.total, sub.degree, sub.local) == (stop - start, layout.degree, rows)
    assert [n for n in sub.lengths if n] == [n for n in layout.lengths[first:last] if n]  # empty ones go either way
    assert offset + rows <= layout.local


def test_selecting_the_second_stream() -> None:
    assert Layout((13, 35), 4).select(13, 48) == (Layout((35,), 4), 4, 9)
    assert Layout((13, 35), 4).select(0, 13) == (Layout((13,), 4), 0, 4)
    assert Layout((13, 35), 4).select(0, 48) == (Layout((13, 35), 4), 0, 13)


@pytest.mark.parametrize("bounds", [(0, 12), (1, 13), (14, 48), (13, 47), (48, 13), (0, 49)])
def test_a_part_of_a_segment_cannot_be_selected(bounds: tuple[int, int]) -> None:
    assert Layout((13, 35), 4).select(*bounds) is None


@given(st.integers(1, 64), st.integers(1, 9))
def test_heads_are_spread_evenly_and_in_order(num_heads: int, degree: int) -> None:
    ranges = [head_range(num_heads, degree, index) for index in range(degree)]
    assert [head for first, last in ranges for head in range(first, last)] == list(range(num_heads))
    sizes = [last - first for first, last in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 9))
def test_key_heads_are_those_that_the_query_heads_need(key_heads: int, group_size: int, degree: int) -> None:
    for index in range(degree):
        query_range = head_range(key_heads * group_size, degree, index)
        first, last = key_head_range(query_range, group_size)
        assert set(range(first, last)) == {head // group_size for head in range(*query_range)}


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_ulysses_bytes_count_what_leaves_a_rank(degree: int) -> None:
    rows, heads, size, item = 24 * degree, 2 * degree, 16, 2
    sent = 0
    for other in range(1, degree):
        first, last = head_range(heads, degree, other)
        sent += (
            3 * (rows // degree) * (last - first) * size * item
        )  # q, k and v of the local rows, to whom has the heads
        sent += (
            (rows // degree) * (heads // degree) * size * item
        )  # the result of the local heads, to whom has the rows
    assert ulysses_bytes(rows=rows, width=heads * size, item_bytes=item, degree=degree) == sent


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_ring_bytes_count_what_leaves_a_rank(degree: int) -> None:
    rows, width, item = 24 * degree, 80, 4
    sent = sum(2 * (rows // degree) * width * item for _ in range(degree - 1))
    assert ring_bytes(rows=rows, width=width, item_bytes=item, degree=degree) == sent


def test_one_rank_sends_nothing() -> None:
    assert ulysses_bytes(rows=10, width=8, item_bytes=4, degree=1) == 0
    assert ring_bytes(rows=10, width=8, item_bytes=4, degree=1) == 0
