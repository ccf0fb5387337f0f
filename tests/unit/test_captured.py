"""Captured calls, with a stand-in for CUDA graphs that runs the same operators on the same tensors at every replay, as
these do, and no Python."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import parafuse
from parafuse.engine.rewrites.gates import Gate
from parafuse.engine.rewrites.rows import Rows
from parafuse.errors import ConfigError, UnsupportedError
from parafuse.parallel import captured, tiers
from parafuse.parallel.captured import MAX_SHAPES, MOST_ANEW, CapturedCalls
from parafuse.parallel.held import Held
from tests.caches.steps import later, letters
from tests.models import ODD, build, error, inputs


class Operators(TorchDispatchMode):
    """Notes each operator that runs, and all tensors that it has and gives. What was there before is held weakly: a
    graph keeps the memory that it makes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any]] = []
        self.made: dict[int, Tensor] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled code runs below it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made.update((id(x), x) for x in tree_leaves(out) if isinstance(x, Tensor))
        self.done.append((func, *tree_map(self._place, ((args, kwargs or {}), out))))
        return out

    def _place(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return Made(id(x)) if id(x) in self.made else weakref.ref(x)


@dataclass(frozen=True)
class Made:
    """A tensor that an operator gave."""

    number: int


class Recorded:
    """Keeps the operators of a run and runs them again, into the tensors that it gave at first."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        with Operators() as operators:
            found = run()
        made = [x.clone() for x in found]
        places = [id(x) for x in found]

        def replay() -> None:
            self.replays += 1
            values: dict[int, Any] = {}

            def now(x: Any) -> Any:
                if isinstance(x, weakref.ref):
                    there = x()
                    assert there is not None, "the graph reads memory that was let go"
                    return there
                return values.get(x.number, operators.made[x.number]) if isinstance(x, Made) else x

            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                for func, given, out in operators.done:
                    args, kwargs = tree_map(now, given)
                    again = func(*args, **kwargs)
                    named = zip(tree_leaves(out), tree_leaves(again), strict=True)
                    values |= {x.number: new for x, new in named if isinstance(x, Made)}
                for x, place in zip(made, places, strict=True):
                    x.copy_(values.get(place, x))

        return made, replay


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.scaling = {"a": 1.0}

    def forward(self, x: Tensor, by: float = 1.0, note: Any = None) -> tuple[Tensor, str]:
        return self.inner(x) * self.scaling["a"] * by, "told"


def standing(module: nn.Module, kind: type[CapturedCalls] = CapturedCalls) -> tuple[CapturedCalls, Recorded]:
    capture = Recorded()
    calls = kind(module, capture)
    calls.install()
    return calls, capture


@torch.no_grad()
def test_the_second_call_is_captured_and_later_ones_replay_it_for_each_shape() -> None:
    module = Scaled()
    calls, capture = standing(module)
    for turn in range(3):
        for rows in (2, 5):
            x = torch.randn(rows, 3)
            got, told = module(x)
            assert torch.equal(got, module.inner(x))
            assert told == "told"
        assert calls.num_captured == (0 if turn == 0 else 2)
        assert capture.replays == (2 if turn == 2 else 0)
    module(torch.randn(2, 3), by=2.0)
    assert torch.equal(module(torch.ones(2, 3), by=2.0)[0], 2 * module.inner(torch.ones(2, 3)))
    calls.remove()
    assert "forward" not in vars(module)


class Uncopied(CapturedCalls):
    """Gives the graph's own tensors away."""

    def _forward(self, original: Any) -> Any:
        forward = super()._forward(original)

        def uncopied(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(captured, "_copied", lambda graph: (graph.made[0], "told")):
                return forward(*args, **kwargs)

        return uncopied


@torch.no_grad()
def results_stay(kind: type[CapturedCalls]) -> bool:
    """Whether a result is still what it was when the next call has been made."""
    module = Scaled()
    standing(module, kind)
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    for _ in range(3):
        module(x)
    first = module(x)[0]
    module(y)
    return torch.equal(first, module.inner(x))


def test_no_replay_overwrites_a_result_that_is_in_use() -> None:
    assert results_stay(CapturedCalls)
    assert not results_stay(Uncopied)


@torch.no_grad()
def test_what_changes_in_place_is_read_and_what_is_replaced_is_captured_anew() -> None:
    module, x = Scaled(), torch.randn(2, 3)
    calls, _ = standing(module)

    def made_for(change: Callable[[], Any]) -> int:
        before = calls.num_captured
        change()
        for _ in range(3):
            want = nn.functional.linear(x, module.inner.weight, module.inner.bias) * module.scaling["a"]
            assert error(module(x)[0], want) <= 1e-6
        return calls.num_captured - before

    assert made_for(lambda: None) == 1
    assert made_for(lambda: module.inner.weight.mul_(2)) == 0
    assert made_for(lambda: module.scaling.update(a=3.0)) == 1
    assert made_for(lambda: setattr(module.inner, "weight", nn.Parameter(torch.randn(3, 3)))) == 1
    assert made_for(lambda: setattr(module.inner.weight, "data", torch.randn(3, 3))) == 1
    assert made_for(lambda: setattr(module, "inner", nn.Linear(3, 3))) == 1


@torch.no_grad()
def test_graphs_are_bounded_and_what_cannot_be_captured_is_refused_or_said(capsys: pytest.CaptureFixture[str]) -> None:
    module = Scaled()
    calls, _ = standing(module)
    for rows in range(1, MAX_SHAPES + 4):
        for _ in range(2):
            module(torch.randn(rows, 3))
    assert len(calls._graphs) == MAX_SHAPES
    made = calls.num_captured
    for _ in range(3):
        module(torch.randn(2, 3), note=object())
    assert calls.num_captured == made
    assert capsys.readouterr().err.count("runs without a CUDA graph (an argument is a object") == 1

    def moved_each_time() -> None:
        for _ in range(2 * MOST_ANEW + 4):
            module.inner.weight.data = module.inner.weight.data.clone()
            module(torch.randn(2, 3))

    with pytest.raises(UnsupportedError, match="are its weights offloaded"):
        moved_each_time()

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) + 1

    writes = Writes()
    standing(writes)
    writes(torch.ones(2))
    with pytest.raises(UnsupportedError, match="writes into what it is given"):
        writes(torch.ones(2))


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).float()


@torch.no_grad()
def test_autocast_has_graphs_of_its_own_which_keep_no_cast_weights() -> None:
    torch.manual_seed(0)
    module, x = Casts(), torch.randn(3, 64)
    calls, capture = standing(module)

    def cast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    for _ in range(3):
        cast()
    assert (calls.num_captured, capture.replays) == (1, 1)
    for _ in range(3):
        assert error(module(x), module.inner(x)) <= 1e-6
    assert (calls.num_captured, capture.replays) == (2, 2)
    assert error(cast(), module.inner(x)) > 1e-4
    module.inner.weight.mul_(-3)
    assert error(cast(), module.inner(x)) <= 2e-2  # negative control: captured._no_kept_casts


class Sized(nn.Module):
    """Keeps a table for the size that it had last."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(4, 4), torch.zeros(0, 4)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) != len(x):
            self.table = torch.arange(4.0 * len(x)).view(-1, 4)
        return self.inner(x) + self.table


@torch.no_grad()
def test_no_graph_reads_what_another_call_has_let_go(capsys: pytest.CaptureFixture[str]) -> None:
    module = Sized()
    calls, capture = standing(module)
    for turn, rows in enumerate([3, 3, 3, 5, 3, 3, 3]):
        x = torch.randn(rows, 4)
        want = module.inner(x) + torch.arange(4.0 * rows).view(-1, 4)
        assert error(module(x), want) <= 1e-6, turn
    assert (calls.num_captured, capture.replays) == (2, 2)
    assert "replaced what the module keeps" in capsys.readouterr().err


@torch.no_grad()
def test_what_a_rewrite_sets_for_a_call_has_a_graph_of_its_own() -> None:
    inner, x, rows = nn.Linear(4, 4), torch.randn(2, 4), [nn.Parameter(torch.randn(2, 4)) for _ in "ab"]
    module = nn.Sequential(inner)
    layers, gate = Rows(), Gate()
    layers.prepare(module)
    layers.add([inner])
    inner.register_forward_pre_hook(gate, with_kwargs=True)
    calls, capture = standing(module)
    for _ in range(2 * MOST_ANEW):
        for row in rows:
            layers.show({inner: row})
            assert torch.equal(module(x), row)
            layers.hide({inner: row})
        assert error(module(x), nn.functional.linear(x, inner.weight, inner.bias)) <= 1e-6
        gate.close((7,))
        module(x)
        gate.close(())
    assert calls.num_captured == 4
    assert capture.replays == 4 * (2 * MOST_ANEW - 2)
    with mock.patch.object(Held, "of_the_call", return_value=()):  # negative control: one graph for all
        for _ in range(3):
            module(x)
        layers.show({inner: rows[0]})
        assert not torch.equal(module(x), rows[0])


def on_steps(asked: parafuse.Config) -> tuple[list[Tensor], Any, list[int], list[int]]:
    """(results by step, decisions, graphs captured, replays after each step) of one request."""
    torch.compiler.reset()
    model, results = build("flux"), list[Tensor]()
    replays: list[int] = []
    seen: list[Recorded] = []

    def recorded() -> Recorded:
        seen.append(Recorded())
        return seen[-1]

    with (
        mock.patch.object(captured, "CudaCapture", recorded),
        mock.patch.object(captured, "refuse_without_graphs"),
        mock.patch.object(tiers, "BACKEND", "eager"),
        torch.no_grad(),
        parafuse.apply(model, asked) as handle,
    ):
        with handle.request() as memories:
            for step in range(8):
                results.append(tree_leaves(model(**later(inputs("flux", ODD), step)))[0])
                replays.append(sum(one.replays for one in seen))
            decided = [letters(memory) for memory in memories.values()]
        made = [calls.num_captured for _, one in handle._on for calls in one.captured]
    assert not any("forward" in vars(part) for part in model.modules())
    return results, decided, made, replays


@pytest.mark.parametrize("cache", [None, "interval:2", "first-block:1e9,max_consecutive_skips=1"])
def test_on_a_denoiser_with_and_without_a_cache(cache: str | None) -> None:
    want, decided, _, _ = on_steps(parafuse.Config(compile=True, cache=cache))
    got, again, made, replays = on_steps(parafuse.Config(compile=True, cuda_graphs=True, cache=cache))
    assert max(map(error, got, want)) <= 1e-6
    assert again == decided
    assert made == ([1] if cache is None else [1] * 4)  # all of it, or each block
    new = [after - before for before, after in pairwise(replays)][3:]
    if cache is None:
        assert new == [1] * 4
        return
    skipped = ["s" in one for one in decided[0][4:]]
    assert set(skipped) == {True, False}
    leading = 0 if cache.startswith("interval") else 1  # what runs before it is decided
    assert new == [leading if one else 4 for one in skipped]


def test_where_it_cannot_be_had_it_is_refused_up_front() -> None:
    with pytest.raises(ConfigError, match="needs a GPU, and the device is 'cpu'"):
        parafuse.apply(build("flux"), parafuse.Config(compile=True, cuda_graphs=True))
    with pytest.raises(ConfigError, match="needs a GPU, and the device is 'cpu'"):
        parafuse.Engine.from_pretrained("emoji", parafuse.Config(compile=True, cuda_graphs=True, device="cpu"))
    with mock.patch.object(captured, "refuse_without_graphs"), pytest.raises(ConfigError, match="not with cache fora"):
        parafuse.apply(build("flux"), parafuse.Config(compile=True, cuda_graphs=True, cache="fora:2"))
    with pytest.raises(ConfigError, match="give compile=True too"):
        parafuse.Config(cuda_graphs=True)
