"""One function compiled at most twice for a bucket of calls: for its first sizes as they are, and once with symbols in
their place for all others.

A bucket is what calls have in common: the structure of their arguments, dtypes, the number of samples, which sizes are
1, whether gradients are recorded, and a variant that the caller names (which parts of a block a cache reuses). Prompt
lengths and resolutions differ inside of a bucket; so may numbers that a block holds (the scale of an adapter): where
one is another, the graph with symbols takes over for good.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed

from parafuse.parallel.layout import Layout

BACKEND = "inductor"
"""torch's name of what makes code of graphs."""
MAX_KNOWN = 4096
"""Sizes of calls that are kept in mind."""
LONGEST_WAIT_S = 300.0
"""How long a rank waits for another of its node that compiles the same graph, before it compiles that itself."""
LOOK_S = 0.02
FEW = 32
"""A size below that is no length where weights have it (the parts of a modulation, heads)."""


@dataclass
class Tally:
    """What was compiled of one denoiser."""

    graphs: Counter[str] = field(default_factory=Counter[str])
    """By class of block."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of Inductor, for every graph."""
    recorded_s: float = 0.0
    """Spent on recording blocks that torch.compile cannot look into; the rest torch counts itself."""


class AnotherGraphError(Exception):
    """A graph that is made for one purpose alone does not serve another."""


class Compiler:
    """torch's own compiler, counted; with a limit, it makes no more graphs than that. Ranks of a node that need the
    same graph at the same time compile it once: one does, the others find it in torch's cache."""

    def __init__(self, name: str, tally: Tally, most: int | None = None):
        self.name, self.tally, self.most, self.made = name, tally, most, 0
        self._make: Any = lookup_backend(BACKEND)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        if self.most is not None and self.made >= self.most:
            raise AnotherGraphError
        patches = {"config_patches": self.tally.options} if self.tally.options else {}
        with one_at_a_time(_name_of(graph, inputs)):
            run = self._make(graph, inputs, **patches)
        self.made += 1  # not where it is stopped to be traced in another way
        self.tally.graphs[self.name] += 1
        return run


@contextlib.contextmanager
def one_at_a_time(name: str, longest_s: float = LONGEST_WAIT_S) -> Iterator[bool]:
    """Waits while another process of this machine and user holds this name; gives whether it has the name now. A holder
    that dies lets go; one that takes too long is waited for no more."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if os.name != "posix":
        yield False
        return
    import fcntl

    with contextlib.ExitStack() as stack:
        try:
            folder = Path(cache_dir()) / "parafuse"
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / f"{name}.lock").open("w"))
        except OSError:  # a folder that cannot be written: nothing is shared there
            yield False
            return
        deadline = time.monotonic() + longest_s
        has_it = is_held = False
        while not has_it and (not is_held or time.monotonic() < deadline):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                has_it = True
            except BlockingIOError:  # another has it
                is_held = True
                time.sleep(LOOK_S)
            except OSError:  # a file system without locks, or with no more: nobody waits there
                break
        yield has_it


def _name_of(graph: Any, inputs: Any) -> str:
    """Equal for graphs that compile to the same."""
    shapes = [(tuple(map(str, x.shape)), str(x.dtype)) if isinstance(x, Tensor) else str(x) for x in inputs]
    return hashlib.sha256(repr((graph.code, shapes)).encode()).hexdigest()[:32]


class Tiers:
    """`function(forward, args, kwargs, *rest)`, compiled by buckets of `args`, `kwargs` and the first of `rest`."""

    def __init__(self, function: Callable[..., Any], name: str, tally: Tally):
        self.function, self.name, self.tally = function, name, tally
        self._buckets: dict[Any, _Bucket] = {}
        self._known: dict[Any, tuple[_Bucket, Any, tuple[int, ...]]] = {}
        """What calls look like -> their bucket, sizes, and which tensors are to be laid out anew."""

    def __call__(self, variant: Any, forward: Any, args: Any, kwargs: Any, *rest: Any) -> Any:
        looks: list[Any] = [variant, torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
        tensors: list[Tensor] = []
        _look((args, kwargs, rest[:1]), looks, tensors)
        key = tuple(looks)
        found = self._known.get(key)
        if found is None:
            found = self._learn(key, tensors, forward)
        bucket, sizes, odd = found
        if not odd:
            return bucket(sizes, tensors, forward, args, kwargs, *rest)
        moved = {id(tensors[i]): _laid_out(tensors[i]) for i in odd}
        own = [moved.get(id(x), x) for x in tensors]
        result = bucket(sizes, own, forward, _with(args, moved), _with(kwargs, moved), *rest)
        for i in odd:
            _write_back(tensors[i], moved[id(tensors[i])])
        return result

    def _learn(self, key: Any, tensors: list[Tensor], forward: Any) -> tuple[_Bucket, Any, tuple[int, ...]]:
        kind, sizes = (*map(_kind, key), _samples(tensors)), tuple(map(_size, key))
        if kind not in self._buckets:
            self._buckets[kind] = _Bucket(self, _features(forward))
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        odd = tuple(i for i, x in enumerate(tensors) if _is_slice(x))
        self._known[key] = self._buckets[kind], sizes, odd
        return self._known[key]


class _Bucket:
    """Two compiled forms of one function."""

    def __init__(self, owner: Tiers, features: set[int]):
        self.first: Any = None
        """Sizes of the first call."""
        self.features = features
        self._fixed: Callable[..., Any] | None = _compiled(owner, dynamic=False, most=1)
        self._open = _compiled(owner, dynamic=True)
        self._is_open = False

    def __call__(self, sizes: Any, tensors: list[Tensor], *args: Any) -> Any:
        if self.first is None:
            self.first = sizes
        if self._fixed is not None and sizes == self.first:
            try:
                return self._fixed(*args)
            except BackendCompilerFailed as error:
                if not isinstance(error.inner_exception, AnotherGraphError):
                    raise
                self._fixed = None  # something beside sizes varies
        if self._is_open:
            return self._open(*args)
        before = [size for size in self.first if isinstance(size, torch.Size)]
        with marked(tensors, before, self.features):
            result = self._open(*args)
        self._is_open = True
        return result


@contextlib.contextmanager
def marked(tensors: list[Tensor], before: list[torch.Size], features: set[int]) -> Iterator[None]:
    """Tells torch which sizes are no lengths, so that it makes no symbols of them, which takes time: the number of
    samples, and features. What differs from `before` is a length; where another one is taken for features, it is one
    more graph for each value."""
    for x, old in zip(tensors, before, strict=True):
        same = [i for i, size in enumerate(x.shape) if size == old[i] and size in features]
        like_pictures = x.ndim > 3 and 1 in same  # (B, C, H, W)
        fixed = [i for i in same if (i == 1 if like_pictures else i == x.ndim - 1 or x.shape[i] < FEW)]
        fixed = [i for i in fixed if i and x.is_floating_point()]
        torch._dynamo.mark_static(x, fixed + [0] * (x.ndim > 0 and x.shape[0] == tensors[0].shape[0]))
    try:
        yield
    finally:
        for x in tensors:  # marks are guarded: no later call is to have any
            for name in [name for name in vars(x) if "_dynamo" in name]:
                delattr(x, name)


def _features(forward: Any) -> set[int]:
    """What the sizes of features may be: those of a block's weights."""
    block = getattr(forward, "__self__", None)
    weights = block.parameters() if isinstance(block, nn.Module) else ()
    return {1, *(size for weight in weights for size in weight.shape)}


def _compiled(owner: Tiers, *, dynamic: bool, most: int | None = None) -> Callable[..., Any]:
    backend: Any = Compiler(owner.name, owner.tally, most)
    return torch.compile(own_code(owner.function, owner.name), fullgraph=True, dynamic=dynamic, backend=backend)


def own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy with a code object of its own: torch counts graphs, and gives up, by code object."""
    code = function.__code__.replace(co_name=f"{name}.{function.__name__}")
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def _look(x: Any, looks: list[Any], tensors: list[Tensor]) -> None:
    """What a graph may depend on, but for numbers that are no sizes."""
    if isinstance(x, Tensor):
        looks.append((x.shape, x.dtype, x.stride()) if x.layout is torch.strided else (x.shape, x.dtype, ()))
        tensors.append(x)
    elif x is None or isinstance(x, (bool, int, str, Layout)):
        looks.append(x)
    elif isinstance(x, (tuple, list)):
        looks.append(len(x))
        for item in x:
            _look(item, looks, tensors)
    elif isinstance(x, dict):
        looks.append(tuple(x))
        for item in x.values():
            _look(item, looks, tensors)
    else:
        looks.append(type(x))


def _samples(tensors: list[Tensor]) -> int:
    return tensors[0].shape[0] if tensors and tensors[0].ndim else 0


def _kind(look: Any) -> Any:
    """What calls of a bucket have in common."""
    if isinstance(look, tuple) and len(look) == 3 and isinstance(look[0], torch.Size):
        return (look[1], tuple(min(size, 2) for size in look[0]))
    if isinstance(look, Layout):
        return (look.degree, look.kept, tuple(min(length, 2) for length in look.lengths))
    return int if type(look) is int else look


def _size(look: Any) -> Any:
    """What they may differ in."""
    if isinstance(look, tuple) and len(look) == 3 and isinstance(look[0], torch.Size):
        return look[0]
    if isinstance(look, Layout):
        return look.lengths
    return look if type(look) is int else None


def _is_slice(x: Tensor) -> bool:
    """Whether it is a part or a view of another tensor (the text in a joint stream), which the first block gets as a
    tensor of its own: the same to a graph once it lies like that. Torch also looks at what a view is of."""
    if x.layout is not torch.strided or x.ndim < 2:
        return False
    if x._base is not None and not x.requires_grad:
        return True
    return x.stride() != _dense(x) if x.is_contiguous() else _has_dense_samples(x)


def _has_dense_samples(x: Tensor) -> bool:
    """Whether each sample lies in one piece, with something between them."""
    own = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != own:
            return False
        own *= size
    return x.stride(0) > own


def _dense(x: Tensor) -> tuple[int, ...]:
    strides: list[int] = []
    own = 1
    for size in reversed(x.shape):
        strides.insert(0, own)
        own *= size
    return tuple(strides)


def _laid_out(x: Tensor) -> Tensor:
    """With the strides of a tensor of its own; a copy only where it has several samples."""
    x = x if x.requires_grad else x.detach()
    if x.is_contiguous():
        return x if x.stride() == _dense(x) else x.as_strided(x.shape, _dense(x)).detach()
    return x.contiguous() if _has_dense_samples(x) else x


def _write_back(x: Tensor, moved: Tensor) -> None:
    """What a block has written into an argument is the argument's."""
    if moved.is_inference() or moved.data_ptr() == x.data_ptr() or not moved._version:
        return
    x.copy_(moved)


def _with(x: Any, moved: dict[int, Tensor]) -> Any:
    if isinstance(x, Tensor):
        return moved.get(id(x), x)
    if type(x) in (tuple, list):
        return type(x)(_with(item, moved) for item in x)
    if type(x) is dict:
        return {name: _with(item, moved) for name, item in x.items()}
    return x
