"""Calls of a module captured as CUDA graphs, one for each shape: a call then costs the host one launch.

Captured by hand, not by torch.compile's own CUDA graphs, which write the results of one compiled block over those of
another that are still in use. Here every call copies its arguments into tensors that the graph reads, and copies the
results out of those that it writes, so nothing that a caller holds is ever written again.

What is captured is what the device did. So a graph holds for what the module was made of and held then: that is looked
at before each replay, and where it is another (an adapter, a scale, a weight in another place), it is captured anew;
also where a call itself replaced something, since other graphs may read what it let go. Weights that are changed in
place are read where they are. What rewrites set for a call (rows, masks left out) has graphs of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.errors import ConfigError, UnsupportedError
from parafuse.log import note
from parafuse.parallel.held import Held
from parafuse.parallel.hooks import Forward, OnForward
from parafuse.parallel.traced import LITERALS, settings

MAX_SHAPES = 8
"""Kinds of calls of a module whose graphs are kept; the one that was used longest ago goes first."""
MOST_ANEW = 16
"""Times that a module may be another than it was, one call after another, before it is taken for one that moves."""


class Capture(Protocol):
    """Runs a function once so that it can be run again without its Python."""

    def __call__(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """(tensors, what writes the function's results into them, from what is then in the tensors that it reads)."""
        ...


class CudaCapture:
    """By `torch.cuda.CUDAGraph`. Graphs of one of these share their memory: they never run at the same time, and what
    they give is copied before the next one runs."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # libraries set themselves up in a first run on another stream
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        graph.replay()  # capturing runs nothing
        return out, graph.replay


def make_capture(device: str) -> Capture:
    """What captures on a device. Raises ConfigError for one that has no graphs."""
    refuse_without_graphs(device)
    return CudaCapture()


def refuse_without_graphs(device: str) -> None:
    """Raises ConfigError for a device that has no graphs."""
    if device != "cuda":
        raise ConfigError(
            f"cuda_graphs=True: needs a GPU, and the device is {device!r}; leave it out (compile=True works there)."
        )


@dataclass
class _Captured:
    """One graph."""

    given: list[Tensor]
    """What it reads its arguments from."""
    made: list[Tensor]
    replay: Callable[[], None]
    leaves: list[Any]
    """Of the result; tensors are put in their places."""
    spec: TreeSpec


class CapturedCalls(OnForward):
    """What stands for the forward of a module: the first call of each kind runs as it is, the second is captured, later
    ones replay it. Calls inside must not exchange anything with other ranks."""

    def __init__(self, module: nn.Module, capture: Capture):
        super().__init__(module)
        self.capture = capture
        self.num_captured = 0
        """Graphs made so far."""
        self._graphs: dict[Any, _Captured | None] = {}
        """None: it has run once."""
        self._held: Held | None = None
        self._places: tuple[int, ...] = ()
        self._anew = 0
        self._said: set[str] = set()

    def remove(self) -> None:
        """Frees the graphs and their memory. No communication."""
        super().remove()
        self._graphs.clear()
        self._held = None

    def _forward(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            why_not = self._why_not(leaves)
            if why_not:
                self._say(why_not)
                return original(*args, **kwargs)
            held = self._look()
            key = (str(spec), _facts(leaves), torch.is_grad_enabled(), settings(), held.of_the_call())
            known = key in self._graphs
            graph = self._graphs.pop(key, None)
            if not known:
                result = original(*args, **kwargs)
                self._look_again()
                self._keep(key, None)
                return result
            if graph is None:
                graph = self._captured(original, leaves, spec)
            else:
                self._anew = 0
                for x, new in zip(graph.given, _tensors(leaves), strict=True):
                    x.copy_(new)
                graph.replay()
            self._keep(key, graph)
            return _copied(graph)

        return forward

    def _keep(self, key: Any, graph: _Captured | None) -> None:
        self._graphs[key] = graph  # the newest last
        while len(self._graphs) > MAX_SHAPES:
            del self._graphs[next(iter(self._graphs))]

    def _why_not(self, leaves: list[Any]) -> str:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
            return "gradients are recorded"
        other = next((type(x).__name__ for x in leaves if not isinstance(x, (Tensor, *LITERALS))), "")
        return f"an argument is a {other}, which may change unseen" if other else ""

    def _say(self, why_not: str) -> None:
        if why_not not in self._said:
            self._said.add(why_not)
            note(f"{type(self.module).__name__}: a call runs without a CUDA graph ({why_not})")

    def _look(self) -> Held:
        """Drops all graphs where the module is another than they were captured of. Gives what it is now."""
        if self._held is not None and not self._is_same(self._held):
            self._anew += 1
            self._held = None
        if self._anew > MOST_ANEW:
            raise UnsupportedError(
                f"{type(self.module).__name__}: is another in every call (are its weights offloaded?), so it cannot be "
                "captured; leave cuda_graphs=True out, or the offload."
            )
        return self._held or self._hold()

    def _look_again(self) -> None:
        """After a call that ran: what it changed in the module (tables that it keeps) is no change, but other graphs
        may read what was replaced."""
        if self._held is None or self._is_same(self._held):
            return
        if any(self._graphs.values()):
            self._say("a call before it replaced what the module keeps, a table for another size, say")
        self._hold()

    def _is_same(self, held: Held) -> bool:
        return held.is_same(exactly=True) and self._places == _places(self.module)

    def _hold(self) -> Held:
        self._graphs.clear()
        self._held, self._places = Held(self.module), _places(self.module)
        if self._held.unknown:
            raise UnsupportedError(
                f"{type(self.module).__name__}: {self._held.unknown} may change unseen, so its calls cannot be "
                "captured; leave cuda_graphs=True out."
            )
        return self._held

    def _captured(self, original: Forward, leaves: list[Any], spec: TreeSpec) -> _Captured:
        given = [x.clone(memory_format=torch.preserve_format) for x in _tensors(leaves)]
        before = [_version(x) for x in given]
        new = dict(zip(map(id, _tensors(leaves)), given, strict=True))
        found: list[Any] = []

        def run() -> list[Tensor]:
            args, kwargs = tree_unflatten([new.get(id(x), x) if isinstance(x, Tensor) else x for x in leaves], spec)
            flat, out_spec = tree_flatten(original(*args, **kwargs))
            found[:] = [flat, out_spec]
            return [x for x in flat if isinstance(x, Tensor)]

        with _no_kept_casts():
            made, replay = self.capture(run)
        if [_version(x) for x in given] != before:
            raise UnsupportedError(
                f"{type(self.module).__name__}: writes into what it is given, so its calls cannot be captured; leave "
                "cuda_graphs=True out."
            )
        self.num_captured += 1
        self._look_again()
        return _Captured(given, made, replay, *found)


@contextmanager
def _no_kept_casts() -> Iterator[None]:
    """Inside, autocast keeps no copies of weights: it lets these go at its end, and a graph would read them."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def _copied(graph: _Captured) -> Any:
    """The result in memory of its own: the graph's is written again by its next run."""
    own = iter([x.clone(memory_format=torch.preserve_format) for x in graph.made])
    leaves = [next(own) if isinstance(x, Tensor) else x for x in graph.leaves]
    return tree_unflatten(leaves, graph.spec)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    """Each once."""
    return list({id(x): x for x in leaves if isinstance(x, Tensor)}.values())


def _facts(leaves: list[Any]) -> tuple[Any, ...]:
    """What a graph is for: sizes, literals, and which tensors are the same one."""
    places: dict[int, int] = {}
    return tuple(
        (places.setdefault(id(x), len(places)), x.shape, x.stride(), x.dtype, x.device)
        if isinstance(x, Tensor)
        else (type(x), x)
        for x in leaves
    )


def _places(module: nn.Module) -> tuple[int, ...]:
    """Where its weights are."""
    return tuple(_place(x) for x in (*module.parameters(), *module.buffers()))


def _place(x: Tensor) -> int:
    try:
        return x.data_ptr()
    except RuntimeError:  # it wraps others
        return id(x)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
