"""Who has memory, operator by operator: every storage that is alive, and the most there was of them in each phase.

Runs on real tensors and on fake ones alike, side by side: what has a fake argument gives a fake result, and all else
(latents, tables of positions, timesteps) has its values.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS, EXCHANGE, PIPELINE, WEIGHTS = "activations", "exchange", "pipeline", "weights"
"""What a storage is for: of the components, of what goes between ranks, of the pipeline's own code between them."""
MAIN = "0"
"""Of a rank's devices, the one that computes what belongs to no other."""
START = "start"
"""The phase before any component is called."""
LARGE = float(1 << 30)
"""For a number that is asked of a fake tensor: a change that no rule takes for small."""

Body = Callable[..., Any]


@dataclass
class Peak:
    """The most memory of a phase."""

    nbytes: int = 0
    """Of all storages at one time, and what one operator takes beside them while it runs."""
    by_kind: Counter[str] = field(default_factory=Counter[str])
    """Of these, what each kind has at that time."""
    workspace: int = 0
    """Of these, what the operator takes at that time."""
    at: str = ""
    """The operator."""
    module: str = ""
    """The component that ran."""


@dataclass
class Span:
    """What a piece of a run took."""

    began: int = 0
    """Bytes that were alive before it."""
    most: int = 0
    """The most at a time in it."""
    at: str = ""
    """The operator."""


class Allocator:
    """What a device's allocator makes of a size, and what its kernels take beside their results."""

    lets_go_late = False
    """What exchanges buffers holds the last one until after the next exchange."""

    def size(self, nbytes: int) -> int:
        return nbytes

    def workspace(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Bytes that an operator takes beside its results while it runs."""
        return 0


class Ledger(TorchDispatchMode):
    """Inside of it, storages are counted from their first operator to their death. Not for several threads.

    `bodies`: operator -> the Python function that it runs, so that what it takes inside is counted too."""

    def __init__(self, allocator: Allocator | None = None, bodies: dict[Any, Body] | None = None):
        super().__init__()
        self.allocator, self.bodies = allocator or Allocator(), bodies or {}
        self.peaks: dict[str, Peak] = {}
        """By phase; of another device of the rank by `phase, device 1`."""
        self.phase, self.kind, self.module = START, PIPELINE, ""
        self._number, self._is_silent = LARGE, False
        self._largest = self._late = 0
        self._live: dict[int, _Entry] = {}
        self._outer: set[int] = set()
        self._device = MAIN
        self._now: defaultdict[str, Counter[str]] = defaultdict(Counter[str])
        """By device."""
        self._spans: list[Span] = []
        self._mode: FakeTensorMode | None = None
        self._eager: list[Any] = []

    def __enter__(self) -> Self:
        # What is compiled runs as it is: its operators are seen, and no trace of Dynamo fails in here. One that has
        # failed (flex_attention's, under a mode) is not tried again by its process.
        self._eager.append(torch.compiler.set_stance("force_eager"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._eager.pop().__exit__(*error)

    def know(self, module: nn.Module) -> None:
        """A component that is followed. Where its weights are fake, so is what would take too much memory."""
        self._mode = self._mode or next((x.fake_mode for x in module.parameters() if isinstance(x, FakeTensor)), None)

    @property
    def nbytes(self) -> int:
        """Of what is alive now, on all devices."""
        return sum(one.total() for one in self._now.values())

    @contextmanager
    def as_kind(self, kind: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """What is made inside goes between ranks; the largest of it may be held for a while."""
        self._largest = 0
        with self.as_kind(EXCHANGE):
            yield
        self._late = self._largest if self.allocator.lets_go_late else 0

    @contextmanager
    def silent(self) -> Iterator[None]:
        """What runs inside makes no peak."""
        before, self._is_silent = self._is_silent, True
        try:
            yield
        finally:
            self._is_silent = before

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Numbers that are asked of fake tensors inside are 0: two results that are compared do not differ."""
        before, self._number = self._number, 0.0
        try:
            yield
        finally:
            self._number = before

    def fake(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without values that is alive from here on."""
        with self._mode or nullcontext():
            x = torch.empty_strided(size, stride, dtype=dtype)
        self.adopt(x)
        return x

    @contextmanager
    def span(self) -> Iterator[Span]:
        """What runs inside is told in what is given, for `again`."""
        began = self._now[self._device].total()
        one = Span(began, began)
        self._spans.append(one)
        try:
            yield one
        finally:
            self._spans.pop()

    def again(self, span: Span) -> None:
        """The same runs once more."""
        self._mark(span.most - span.began, span.at)

    def adopt(self, tensor: Tensor) -> None:
        """Counts a tensor that was made without an operator."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            self._add(storage, storage._cdata)
        self._mark(0, "")

    def peak(self, phase: str) -> Peak:
        """Of a phase; of a new one what is alive now."""
        if phase not in self.peaks:
            self.peaks[phase] = Peak()
        return self.peaks[phase]

    def weigh(self, nbytes: int, device: str = MAIN) -> None:
        """So many bytes of weights have come to a device, or, less than nothing, have gone."""
        self._now[device][WEIGHTS] += nbytes
        self._mark(0, "weights")

    @contextmanager
    def on(self, device: str, given: list[Tensor]) -> Iterator[None]:
        """What is made inside is on that device, and so are copies of what is given."""
        if device == self._device:
            yield
            return
        before, self._device = self._device, device
        there = {x.untyped_storage()._cdata: x for x in given}
        copies = sum(one.nbytes for key in there if (one := self._live.get(key)) and one.device != device)
        self._now[device][EXCHANGE] += copies
        self._mark(0, "copies of what is given")
        try:
            yield
        finally:
            self._now[device][EXCHANGE] -= copies
            self._device = before

    def moved(self, tensors: list[Tensor]) -> None:
        """These are on the device at hand from here on."""
        for x in tensors:
            one = self._live.get(x.untyped_storage()._cdata)
            if one is not None and one.device != self._device:
                self._now[one.device][one.kind] -= one.nbytes
                one.device = self._device
                self._now[one.device][one.kind] += one.nbytes
        self._mark(0, "copies of what was given back")

    def enter(self, phase: str) -> None:
        """What runs from here on belongs to that phase."""
        self._late = self._late if phase == self.phase else 0
        self.phase = phase
        self._mark(0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        own = next((kind for kind in types if _is_own(kind)), None)
        if own is not None:  # a tensor type with rules of its own: these are to be seen as well
            with self:
                return own.__torch_dispatch__(func, types, args, kwargs)
        body = self.bodies.get(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if func in ASKS and any(isinstance(x, FakeTensor) for x in args):
            return self._answer(func, args[0])
        if func in BY_PLACES:
            args = (args[0], _places(args[1]), *args[2:])
        with self._mode if self._mode and self._is_too_large(func, types, args) else nullcontext():
            result = func(*args, **kwargs)
        if isinstance(result, FakeTensor) and 1 in result.shape:
            result = _laid_out(func, args, result)
        self._record(func, args, kwargs, result)
        return result

    def _is_too_large(self, func: Any, types: Any, args: Any) -> bool:
        """Whether real tensors would become one that takes too much memory: a mask over all pairs of pixels."""
        if self.kind != ACTIVATIONS or any(issubclass(kind, FakeTensor) for kind in types):
            return False
        if func in MAKES:
            return math.prod(args[0]) > MOST_VALUES
        sizes = [x.shape for x in args if isinstance(x, Tensor)] if torch.Tag.pointwise in func.tags else []
        return bool(sizes) and math.prod(torch.broadcast_shapes(*sizes)) > MOST_VALUES

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        made = [x for x in _leaves(result) if isinstance(x, Tensor)]
        if not made:
            return
        given: set[int] | None = None
        for x in made:
            if x.layout is not torch.strided or x.device.type == "meta":
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key in self._live:
                continue
            if given is None:
                given = {y.untyped_storage()._cdata for y in _leaves((args, kwargs)) if _has_storage(y)}
            if key not in given:
                self._add(storage, key)
        self._mark(self.allocator.workspace(func, args, kwargs, result), str(func))

    def _add(self, storage: Any, key: int) -> None:
        nbytes = self.allocator.size(storage.nbytes())
        self._live[key] = _Entry(storage, self._gone, key, self.kind, nbytes, self._device)
        self._now[self._device][self.kind] += nbytes
        self._largest = max(self._largest, nbytes)

    def _gone(self, entry: Any) -> None:
        if self._live.get(entry.key) is entry:
            del self._live[entry.key]
            self._now[entry.device][entry.kind] -= entry.nbytes

    def _answer(self, func: Any, x: Tensor) -> Any:
        """What a fake tensor says of its value: that it differs, yes to a condition, and of numbers a large one: so no
        cache finds that little has changed, and what is held against a limit is within it."""
        if func is torch.ops.aten.equal.default:  # of a sample in two steps, say
            return self._number != LARGE
        if func is torch.ops.aten.is_nonzero.default or x.dtype == torch.bool:
            return True
        return self._number if x.is_floating_point() else 0

    def _mark(self, workspace: int, at: str) -> None:
        if self._is_silent:
            return
        here = self.peak(self.phase if self._device == MAIN else f"{self.phase}, device {self._device}")
        now = self._now[self._device]
        total = now.total() + workspace + self._late
        for span in self._spans:
            if total > span.most:
                span.most, span.at = total, at
        if total > here.nbytes:
            here.nbytes, here.workspace, here.at, here.module = total, workspace, at, self.module
            here.by_kind = now + Counter({EXCHANGE: self._late})


class _Entry(weakref.ref[Any]):
    """One storage."""

    __slots__ = ("device", "key", "kind", "nbytes")

    def __new__(cls, storage: Any, gone: Any, key: int, kind: str, nbytes: int, device: str) -> _Entry:
        self = super().__new__(cls, storage, gone)
        self.key, self.kind, self.nbytes, self.device = key, kind, nbytes, device
        return self

    def __init__(self, *_: object):
        """A weak reference is whole when it is made."""


MAKES = {torch.ops.aten.full.default, torch.ops.aten.ones.default, torch.ops.aten.zeros.default}
"""Operators that make a real tensor of the size that they are given."""
MOST_VALUES = 1 << 28
"""Of a real tensor that is made inside of a component."""
BY_PLACES = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
"""Operators that a mask of booleans may choose places for."""
ASKS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}
"""Operators that give a value to Python."""


def _laid_out(func: Any, args: Any, result: FakeTensor) -> Tensor:
    """The result of a view or a pointwise operator with the strides that torch gives it: fake tensors have others along
    dims of size 1, and by these a convolution tells whether channels come last."""
    wanted = result.stride()
    if func is torch.ops.aten.view.default:
        x, shape = args
        wanted = torch.empty_strided(x.size(), x.stride(), device="meta").view(shape).stride()
    elif torch.Tag.pointwise in func.tags:
        alike = {x.stride() for x in args if isinstance(x, Tensor) and x.shape == result.shape}
        wanted = alike.pop() if len(alike) == 1 else wanted
    sizes = zip(result.shape, result.stride(), wanted, strict=True)
    if wanted == result.stride() or any(size > 1 and mine != other for size, mine, other in sizes):
        return result
    return torch.ops.aten.as_strided.default(result, result.size(), wanted, result.storage_offset())


def _places(indices: Any) -> list[Any]:
    """The same places by their numbers, where they are given by a mask that has values: a fake tensor can be asked for
    these."""
    found: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        found += index.nonzero().unbind(1) if is_mask and not isinstance(index, FakeTensor) else [index]
    return found


def _is_own(kind: type[Any]) -> bool:
    return kind not in (Tensor, torch.nn.Parameter, FakeTensor) and "__torch_dispatch__" in kind.__dict__


def _has_storage(x: Any) -> bool:
    return isinstance(x, Tensor) and type(x) in _PLAIN and x.layout is torch.strided


_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


def _leaves(tree: Any) -> list[Any]:
    return [tree] if isinstance(tree, Tensor) else tree_leaves(tree)
