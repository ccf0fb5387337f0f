"""How tokens are spread over the ranks of a sequence. Pure arithmetic: no torch, no sizes exchanged.

A *segment* is a run of tokens that is split as one (a stream, or the text or image part of a joint stream). A segment
of `length` rows over `degree` ranks is cut into contiguous parts of `ceil(length / degree)` rows; the tail of the last
parts is filler, so that every rank runs the same shapes. A rank holds its part of the first segment, then its part of
the second, and so on. In the layout of an attention, one segment may be *kept*: all its rows are on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass


def part_rows(length: int, degree: int) -> int:
    """Rows that each rank holds of a segment, filler included."""
    return -(-length // degree)


@dataclass(frozen=True)
class Layout:
    """Segments in the model's order, each spread over `degree` ranks."""

    lengths: tuple[int, ...]
    degree: int
    kept: int | None = None
    """The segment that every rank has whole."""

    @property
    def total(self) -> int:
        """True rows of all segments together."""
        return sum(self.lengths)

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of each segment on every rank, filler included."""
        return tuple(
            length if i == self.kept else part_rows(length, self.degree) for i, length in enumerate(self.lengths)
        )

    @property
    def local(self) -> int:
        """Rows on every rank, filler included."""
        return sum(self.parts)

    def spans(self, first: int, count: int = 1) -> list[tuple[int, int]]:
        """(start, number) of the true rows, within each segment, held by `count` ranks from rank `first` on."""
        out: list[tuple[int, int]] = []
        for i, (length, part) in enumerate(zip(self.lengths, self.parts, strict=True)):
            start = 0 if i == self.kept else min(first * part, length)
            out.append((start, min((first + count) * part, length) - start))
        return out

    @property
    def spread(self) -> Layout:
        """The same segments, none kept."""
        return Layout(self.lengths, self.degree)

    def with_kept(self, length: int) -> Layout:
        """The same, where the kept segment has `length` rows; itself where none is kept."""
        if self.kept is None:
            return self
        lengths = (*self.lengths[: self.kept], length, *self.lengths[self.kept + 1 :])
        return Layout(lengths, self.degree, self.kept)

    def select(self, start: int, stop: int) -> tuple[Layout, int, int] | None:
        """Layout, first local row and number of local rows of the segments in [start, stop).

        None when a bound falls inside a segment: then the slice is not a whole number of parts."""
        bounds = [0]
        for length in self.lengths:
            bounds.append(bounds[-1] + length)
        if start not in bounds or stop not in bounds or stop < start:
            return None
        first, last = bounds.index(start), bounds.index(stop)
        sub = Layout(self.lengths[first:last], self.degree)
        return sub, sum(self.parts[:first]), sub.local


def head_range(num_heads: int, degree: int, index: int) -> tuple[int, int]:
    """[first, last) of the heads of one rank: contiguous, the first `num_heads % degree` ranks have one more."""
    base, more = num_heads // degree, num_heads % degree
    first = index * base + min(index, more)
    return first, first + base + (1 if index < more else 0)


def key_head_range(query_range: tuple[int, int], group_size: int) -> tuple[int, int]:
    """[first, last) of the key heads that serve a range of query heads, `group_size` query heads to a key head."""
    first, last = query_range
    return (first // group_size, -(-last // group_size)) if last > first else (0, 0)


def ulysses_bytes(*, rows: int, width: int, item_bytes: int, degree: int) -> float:
    """Bytes that a rank sends per self-attention with Ulysses: q, k, v out and the result back, of `width` each."""
    return 4 * rows * width * item_bytes / degree * (degree - 1) / degree


def ring_bytes(*, rows: int, width: int, item_bytes: int, degree: int) -> float:
    """Bytes that a rank sends per self-attention with ring: k and v, once to each other rank."""
    return 2 * rows * width * item_bytes * (degree - 1) / degree
