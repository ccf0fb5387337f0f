"""Which stream of a denoiser is a video, and its grid of frames, rows and columns: found out from one real call.

The model runs up to its first block with one index of one argument changed at a time. A dim of the latents is one of
position because its indices move tokens of their own, and the sets of these tokens must be those of a row-major grid.
Latents that come as tokens have no such dims: their grid is told by the tables of positions that come with them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from parafuse.engine.grid_tables import fineness, fits, grids_of_numbers, grids_of_tables
from parafuse.engine.probe import leaf_name, owned
from parafuse.engine.rewrites.rewrite import bare
from parafuse.engine.stack import block_stack
from parafuse.errors import UnsupportedError
from parafuse.parallel.hooks import override
from parafuse.sparse import Shape

WAY_OUT = "give it with grid=FRAMESxROWSxCOLUMNS of the video's tokens, or leave sparse attention out"


@dataclass(frozen=True)
class VideoStream:
    """Where the tokens of a video enter the blocks. Frames may be 1: a picture."""

    grid: Shape
    """Of its tokens, row-major in their order."""
    block: nn.Module
    """The first block that is given them."""
    leaf: int
    """Of that block's arguments, flattened as (args, kwargs): the one that has them."""
    name: str
    """Of that argument, as messages say it: argument 'hidden_states', argument 0."""
    dims: tuple[int, ...]
    """Of that argument, which count tokens: (1,) of (B, S, D), (1, 2, 3) of (B, F, R, C, D): row-major."""
    first: int
    """The first token of the video in it; those before it are something else."""
    total: int
    """Tokens in it; those from `first` + `length` on are something else too."""
    source: str
    """What it was found from, for receipts."""

    @property
    def length(self) -> int:
        """Tokens of the video."""
        return math.prod(self.grid)


def video_stream(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Shape | None = None
) -> VideoStream:
    """The video among what the model's first block is given in a call with these arguments.

    Runs the model up to its blocks, some dozens of times, as its classes have it: local, nothing is exchanged, and
    nothing is left behind. `grid`: given by the user; then only the stream is found, which must have as many tokens.
    Raises UnsupportedError with what was seen where it cannot be told."""
    with bare(model) as forward, torch.no_grad():
        prologue = _Prologue(model, forward, args, kwargs)
        try:
            return _stream_of(prologue, prologue.latents(), grid)
        except _NoGrid as reason:
            where = type(model).__name__
            if grid is not None:
                raise UnsupportedError(
                    f"{where}: grid={_shown(grid)}: has {math.prod(grid)} tokens, which are not found in its call "
                    f"({reason}); give the frames, rows and columns of its tokens, or leave sparse attention out."
                ) from None
            raise UnsupportedError(
                f"{where}: the grid of the video's tokens cannot be told from its call ({reason}); {WAY_OUT}."
            ) from None


class _NoGrid(Exception):
    """Why an argument is not, or has not, a video that can be told."""


class _Arrived(Exception):
    """The block that is looked for is called: what with."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.block = block
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in self.leaves]


@dataclass(frozen=True)
class _Entry:
    """Where an argument of the model enters the blocks."""

    leaf: int
    """Of the model's arguments."""
    skip: int
    """Calls of blocks before it."""
    arrived: _Arrived
    """The first call that goes by it."""
    streams: list[int]
    """That call's leaves that go by it, those with most tokens first."""


class _Prologue:
    """What a model does before one of its calls of blocks, run again and again with small changes."""

    def __init__(self, model: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.model, self.forward, self.blocks = model, forward, block_stack(model)
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.names = [leaf_name(i, self.spec, self.leaves) for i in range(len(self.leaves))]
        self._bases: dict[int, _Arrived | None] = {}

    def latents(self) -> _Entry:
        """Of the arguments that may be latents the first, in the order of the forward's parameters, that a block goes
        by: that is the custom. Others with as many tokens (text) must not be taken for it: none is tried after it."""
        names = list(inspect.signature(self.forward).parameters)
        places, named = tree_unflatten(list(range(len(self.leaves))), self.spec)
        order = [leaf for tree in places for leaf in tree_flatten(tree)[0]]
        known = sorted(named, key=lambda name: names.index(name) if name in names else len(names))
        order += [leaf for name in known for leaf in tree_flatten(named[name])[0]]
        for leaf in order:
            x = self.leaves[leaf]
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 3:
                entry = self._entry(leaf)
                if entry is not None:
                    return entry
        raise _NoGrid("no block goes by an argument of three dims or more")

    def _entry(self, leaf: int) -> _Entry | None:
        """Where an argument enters the blocks; None: nowhere."""
        skip = 0
        while (base := self.base(skip)) is not None:
            other = self.changed(leaf, None, 0, skip)
            if other is None or len(other.leaves) != len(base.leaves):
                raise _NoGrid(f"the values of {self.names[leaf]} decide which blocks run")
            moved = [
                i
                for i, (x, y) in enumerate(zip(base.leaves, other.leaves, strict=True))
                if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and _differ(x, y)
            ]
            if moved:
                return _Entry(leaf, skip, base, sorted(moved, key=lambda i: -base.leaves[i][..., 0].numel()))
            skip += 1
        return None

    def run(self, leaves: list[Any], skip: int) -> _Arrived | None:
        """What the call of a block after `skip` others is given; None where there is none."""
        calls = 0

        def arrive(block: nn.Module, original: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > skip:
                    raise _Arrived(block, args, kwargs)
                return original(*args, **kwargs)

            return forward

        args, kwargs = tree_unflatten([owned(x) for x in leaves], self.spec)
        undo = [override(block, "forward", arrive(block, block.forward)) for block in self.blocks]
        try:
            self.forward(*args, **kwargs)
        except _Arrived as arrived:
            return arrived
        finally:
            for put_back in reversed(undo):
                put_back()
        return None

    def base(self, skip: int) -> _Arrived | None:
        if skip not in self._bases:
            self._bases[skip] = self.run(self.leaves, skip)
        return self._bases[skip]

    def changed(self, leaf: int, dim: int | None, index: int, skip: int) -> _Arrived | None:
        """The same with noise in one index along a dim of one argument, or in all of it."""
        return self.run([*self.leaves[:leaf], _noisy(self.leaves[leaf], dim, index), *self.leaves[leaf + 1 :]], skip)


class _Moved:
    """Which tokens of one stream move as an argument of the model is changed."""

    def __init__(self, prologue: _Prologue, entry: _Entry, stream: int):
        self.prologue, self.entry, self.stream = prologue, entry, stream
        self.given: Tensor = prologue.leaves[entry.leaf]
        self.base: Tensor = entry.arrived.leaves[stream]
        base = self.base
        starts = {d: self._differs(d, 0) for d in range(self.given.ndim) if self.given.shape[d] > 1}
        self.dims = self._token_dims(self._differs(None, 0), starts)
        self.total = math.prod(base.shape[d] for d in self.dims)
        self.all = self.tokens(None, 0)

    def _token_dims(self, every: Tensor, starts: dict[int, Tensor]) -> tuple[int, ...]:
        """The stream's dims along which other dims of the argument than that of its samples move a part."""
        whole = [_along(every, dim) for dim in range(every.ndim)]
        parts = {
            d: [i for i, x in enumerate(whole) if not torch.equal(_along(differs, i), x)]
            for d, differs in starts.items()
        }
        dims = tuple(sorted({i for d, some in parts.items() if d for i in some}))
        if not dims:
            raise _NoGrid(
                f"no dim of it moves a part of the first block's {tuple(self.base.shape)} and leaves the rest"
            )
        if set(parts.get(0, ())) & set(dims) or (self.base.ndim == 3 and len(dims) > 1):
            raise _NoGrid(
                "frames are folded into the samples of the first block's stream, or each sample's tokens are in "
                "another place"
            )
        return dims

    def tokens(self, dim: int | None, index: int) -> Tensor:
        """(total,) bool: those that move in any sample."""
        differs = self._differs(dim, index)
        others = [i for i in range(differs.ndim) if i not in self.dims]
        return (differs.any(dim=others) if others else differs).flatten()

    def _differs(self, dim: int | None, index: int) -> Tensor:
        """Bool, of the stream's shape without its last dim."""
        arrived = self.prologue.changed(self.entry.leaf, dim, index, self.entry.skip)
        other = None if arrived is None or len(arrived.leaves) <= self.stream else arrived.leaves[self.stream]
        if not isinstance(other, Tensor) or other.shape != self.base.shape:
            raise _NoGrid("another value of it gives a stream of another shape")
        return ((other != self.base) & ~(other.isnan() & self.base.isnan())).any(dim=-1).cpu()


def _along(differs: Tensor, dim: int) -> Tensor:
    """(size of the dim,) bool: where any index along it moves."""
    others = [i for i in range(differs.ndim) if i != dim]
    return differs.any(dim=others) if others else differs


def _stream_of(prologue: _Prologue, entry: _Entry, grid: Shape | None) -> VideoStream:
    """The first stream that has a grid. Raises _NoGrid."""
    arrived, reasons = entry.arrived, list[str]()
    for stream in entry.streams:
        try:
            moved = _Moved(prologue, entry, stream)
            found, first, how = _grid_of(moved, grid)
        except _NoGrid as reason:
            reasons.append(str(reason))
            continue
        name = leaf_name(stream, arrived.spec, arrived.leaves)
        source = f"{prologue.names[entry.leaf]}, {how}"
        return VideoStream(found, arrived.block, stream, name, moved.dims, first, moved.total, source)
    raise _NoGrid(f"{prologue.names[entry.leaf]}: {reasons[0]}")


def _grid_of(moved: _Moved, given: Shape | None) -> tuple[Shape, int, str]:
    """(grid, first token, what it was found from)."""
    places = torch.nonzero(moved.all).flatten()
    first, length = int(places[0]), len(places)
    if int(places[-1]) != first + length - 1:
        raise _NoGrid("its tokens do not follow each other in the first block's stream")
    axes = [axis for dim in range(moved.given.ndim) if (axis := _axis(moved, dim))]
    _check_sets(moved, axes, first, length)
    dims = ", ".join(str(axis.dim) for axis in axes)
    if len(axes) > 1:
        sizes = [axis.count for axis in axes]
        frames, rows, columns = (1, *sizes) if len(sizes) == 2 else sizes
        grid = frames, rows, columns
        if given and given != grid:
            raise _NoGrid(f"it has {_shown(grid)} tokens, not {_shown(given)}")
        return grid, first, f"dims {dims}"
    if given:
        if math.prod(given) != length:
            raise _NoGrid(f"it has {length} tokens")
        return given, first, f"dim {dims}, and the grid that was given"
    grid, how = _packed(moved, first, length)
    return grid, first, f"dim {dims}, and {how}"


@dataclass(frozen=True)
class _Axis:
    """A dim of an argument whose indices move tokens of their own: `patch` of them the same ones."""

    dim: int
    patch: int
    count: int
    probed: tuple[tuple[int, Tensor], ...]
    """(index, tokens that it moves)."""


def _axis(moved: _Moved, dim: int) -> _Axis | None:
    """None for a dim that moves all tokens with every index (channels, samples), or has one index."""
    size = moved.given.shape[dim]
    if size == 1:
        return None
    start = moved.tokens(dim, 0)
    if torch.equal(start, moved.all):
        return None
    patch, probed = 1, [(0, start)]
    while patch < size and torch.equal(tokens := moved.tokens(dim, patch), start):
        probed.append((patch, tokens))
        patch += 1
    count = -(-size // patch)
    middle = count // 2 * patch
    others = dict.fromkeys(i for i in (patch, middle - 1, middle, size - 1) if patch <= i < size)
    probed += [(index, moved.tokens(dim, index)) for index in others]
    return _Axis(dim, patch, count, tuple(probed))


def _check_sets(moved: _Moved, axes: list[_Axis], first: int, length: int) -> None:
    """Raises _NoGrid where the tokens that move are not those of a row-major grid in the order of the dims."""
    sizes = [axis.count for axis in axes]
    shown = " x ".join(f"{axis.count} along dim {axis.dim}" for axis in axes)
    if math.prod(sizes) != length or len(axes) > 3:
        raise _NoGrid(f"it moves {length} tokens of the first block's stream, {shown}: no frames, rows and columns")
    cells = torch.arange(length).view(sizes)
    for place, axis in enumerate(axes):
        for index, tokens in axis.probed:
            want = torch.zeros_like(moved.all)
            want[first + cells.select(place, index // axis.patch).flatten()] = True
            if not torch.equal(tokens, want):
                raise _NoGrid(
                    f"index {index} of dim {axis.dim} moves {int(tokens.sum())} tokens of the first block's stream "
                    f"that are not those of a row-major grid ({shown}): the model shuffles its tokens, or mixes them"
                )


def _packed(moved: _Moved, first: int, length: int) -> tuple[Shape, str]:
    """The grid of tokens that come in a row, and what said it."""
    tables = list(_positions(moved))
    told = grids_of_tables(tables, length, first, moved.total)
    numbers = grids_of_numbers(moved.prologue.leaves, length)
    fine = [grid for grid in numbers if fits(tables, grid, first)]
    if len(fine) == 1:
        return fine[0], "numbers among the arguments that its positions agree with"
    finest = [grid for grid in told if fineness(grid) == fineness(next(iter(told)))]
    if len(finest) == 1:
        return finest[0], f"the positions in {told[finest[0]]}"
    if finest:
        raise _NoGrid(f"its {length} tokens are told to be {' and '.join(map(_shown, finest))}")
    if len(numbers) == 1:
        return numbers[0], "numbers among the arguments"
    what = f"numbers that say {' and '.join(map(_shown, numbers))}" if numbers else "no numbers that say a grid"
    raise _NoGrid(f"its {length} tokens come in a row, with no table of positions of a grid, and {what}")


def _positions(moved: _Moved) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the arguments of the call and of the first block that may hold positions."""
    prologue, arrived = moved.prologue, moved.entry.arrived
    for i, x in enumerate(prologue.leaves):
        if isinstance(x, Tensor) and i != moved.entry.leaf:
            yield prologue.names[i], x
    for i, x in enumerate(arrived.leaves):
        if isinstance(x, Tensor) and i not in moved.entry.streams:
            yield f"{leaf_name(i, arrived.spec, arrived.leaves)} of the first block", x


def _shown(grid: Shape) -> str:
    return "x".join(map(str, grid))


def _differ(x: Tensor, y: Any) -> bool:
    return not isinstance(y, Tensor) or x.shape != y.shape or not torch.equal(x.nan_to_num(), y.nan_to_num())


def _noisy(x: Tensor, dim: int | None, index: int) -> Tensor:
    """A copy with noise of its size in one index along a dim, or in all."""
    out = x.clone()
    part = out if dim is None else out.narrow(dim, index, 1)
    noise = torch.randn(part.shape, generator=torch.Generator("cpu").manual_seed(11)).to(x.device, x.dtype)
    part.add_(noise * (1 + x.abs().nan_to_num(0, 0, 0).max()))
    return out
