"""The grid of tokens that come in a row, told by tables of positions (ids, coordinates, rotary embedding) and numbers.

In a row-major grid each column of such a table goes by one axis alone. So what it is at the first token comes to an end
after 1, C or R*C tokens, for a column that goes by columns, rows or frames.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parafuse.sparse import Shape

MAX_COLUMNS = 1024
"""Columns of a table that are looked at, evenly over it."""
ALIKE = 1e-5
"""Of a column's largest value: tables that are computed token by token differ by rounding."""
REGULAR = 1e-3
"""Of a column's largest value: how far positions may be from evenly spaced ones."""
MAX_NUMBERS = 8
"""A tensor of integers with more of them is no grid."""


class _Table(NamedTuple):
    """Numbers of tokens that may be their positions."""

    rows: Tensor
    """(tokens, columns) fp64, on the host."""
    rounding: float
    """Of the numbers, over a column's largest."""


def grids_of_tables(tables: Sequence[tuple[str, Tensor]], length: int, first: int, total: int) -> dict[Shape, str]:
    """Grid -> the name of the tensor that says it, for `length` tokens from token `first` on of a stream of `total`.

    Tables of as many tokens go before those of the whole stream, and these before longer ones, of which the video may
    be any end. Finer grids come first; those that are one row of tokens are left out."""
    found: dict[Shape, str] = {}
    for sizes in (range(length, length + 1), range(total, total + 1), range(length + 1, sys.maxsize)):
        for name, tensor in tables:
            for table in _tables(tensor, length, first, sizes):
                grid = _grid(table, length)
                if grid is not None:
                    found.setdefault(grid, name)
        if found:
            break
    return dict(sorted(found.items(), key=lambda item: -fineness(item[0])))


def grids_of_numbers(leaves: Sequence[Any], length: int) -> list[Shape]:
    """What three whole numbers after each other in the arguments, or two, say of `length` tokens, each once."""
    numbers: list[int] = []
    for leaf in leaves:
        if isinstance(leaf, int) and not isinstance(leaf, bool):
            numbers.append(leaf)
        elif isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.numel() <= MAX_NUMBERS:
            numbers += [int(x) for x in leaf.flatten().tolist()] if leaf.dtype != torch.bool else []
        elif isinstance(leaf, (float, str)) or leaf is None:
            numbers.append(0)  # what stands between two numbers parts them
    three = [(a, b, c) for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False) if a * b * c == length]
    two = [(1, a, b) for a, b in pairwise(numbers) if a * b == length]
    found = dict.fromkeys(grid for grid in (*three, *two) if min(grid) > 0 and fineness(grid) > 1)
    return list(found)


def fits(tables: Iterable[tuple[str, Tensor]], grid: Shape, first: int) -> bool:
    """Whether one of the tables goes by all axes of this grid that are longer than 1."""
    length = math.prod(grid)
    return any(
        _goes_by(table, grid) == {d for d in range(3) if grid[d] > 1}
        for _, tensor in tables
        for table in _tables(tensor, length, first, range(length, sys.maxsize))
    )


def _tables(tensor: Tensor, length: int, first: int, sizes: range) -> Iterator[_Table]:
    """The parts of a tensor that may be positions of the tokens: along dims of such sizes."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.ndim < 2 or tensor.dtype == torch.bool or length < 2:
        return
    rounding = 4 * torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
    for dim, size in enumerate(tensor.shape):
        if size not in sizes:
            continue
        for start in dict.fromkeys((first, 0, size - length)):
            if start + length > size:
                continue
            rows = tensor.movedim(dim, 0)[start : start + length].reshape(length, -1)
            step = -(-rows.shape[1] // MAX_COLUMNS)
            yield _Table(rows[:, ::step].double().cpu(), max(rounding, REGULAR))


def _grid(table: _Table, length: int) -> Shape | None:
    """The finest grid of several rows and columns whose axes the table's columns go by; None where there is none."""
    changed = table.rows != table.rows[0]
    ends = torch.where(changed.any(dim=0), changed.to(torch.uint8).argmax(dim=0), length)
    strides = [end for end in {*map(int, ends.unique().tolist()), length} if length % end == 0]
    grids = {(length // plane, plane // row, row) for row in strides for plane in strides if plane % row == 0}
    grids = [grid for grid in grids if min(grid[1:]) > 1]
    for grid in sorted(grids, key=fineness, reverse=True):
        if _goes_by(table, grid) == {d for d in range(3) if grid[d] > 1}:
            return grid
    return None


def _goes_by(table: _Table, grid: Shape) -> set[int] | None:
    """The axes that columns go by; None where one of them goes by several, or rows or columns of tokens are not evenly
    spaced: then they are of several pictures. Frames may be: the first one often stands for less time."""
    cells = table.rows.view(*grid, -1)
    limit = ALIKE * table.rows.abs().amax(dim=0).clamp_min(1e-30)
    by = torch.stack(
        [((cells - cells.narrow(dim, 0, 1)).abs() > limit).flatten(0, 2).any(dim=0) for dim in range(3)]
    )  # (3, columns)
    if bool((by.sum(dim=0) > 1).any()):
        return None
    rows, columns = cells[0, :, 0][:, by[1]], cells[0, 0][:, by[2]]
    if not (_is_even(rows, table.rounding) and _is_even(columns, table.rounding)):
        return None
    return {dim for dim in range(3) if bool(by[dim].any())}


def _is_even(lines: Tensor, rounding: float) -> bool:
    """Whether each column of lines (size, columns) is a number, a sine or a cosine of evenly spaced positions: then
    x[i - 1] + x[i + 1] is the same multiple of x[i] all along."""
    around, middle = lines[:-2] + lines[2:], lines[1:-1]
    multiple = (around * middle).sum(dim=0) / middle.square().sum(dim=0).clamp_min(1e-30)
    return bool(((around - multiple * middle).abs() <= rounding * lines.abs().amax(dim=0)).all())


def fineness(grid: Shape) -> int:
    """Axes that are longer than 1."""
    return sum(size > 1 for size in grid)
