"""Guidance parallel: every way in which pipelines compute branches, its exchanges, its report, and what is refused."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import parafuse
from parafuse.parallel import batch_cut, bundle
from parafuse.parallel import guidance as guidance_module
from parafuse.parallel.placeholder import Placeholder, is_open
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, attempt
from tests.models import error

CFG = parafuse.Config(parallel=parafuse.Parallel(cfg=2, ulysses=1))
D = 6
CALLS: dict[int, list[int]] = {}
"""Samples of every call, by model: outside of it, where it is no effect of the call."""


class Denoiser(nn.Module):
    """(B, S, D) and text (B, T, D) -> (B, S, D); samples are independent, branches differ."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(D, D, generator=generator) / math.sqrt(D))
        CALLS[id(self)] = []

    def forward(self, x: Tensor, text: Tensor, table: Tensor | None = None, layers: tuple[int, ...] = ()) -> Any:
        CALLS[id(self)].append(len(x))
        mixed = x @ self.weight + text.mean(1, keepdim=True) + sum(layers)
        return (mixed if table is None else mixed * table, mixed.sum((1, 2)))


def values(batch: int = 1, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, a, b = (torch.randn(batch, n, D, generator=generator) for n in (4, 3, 3))
    return x, a, b


def two_calls(model: Any, steps: int = 4) -> Tensor:
    """As Wan: two calls, a combination, an Euler step."""
    x, a, b = values()
    for step in range(steps):
        cond = model(x, a)[0]
        uncond = model(x, b)[0]
        x = x - 0.1 * (step + 1) * (uncond + 3.0 * (cond - uncond))
    return x + 0


def three_calls(model: Any) -> Tensor:
    """As SD3 with skipped layers: the third call has the same text and other layers, in some steps only."""
    x, a, b = values()
    for step in range(5):
        cond, uncond = model(x, a)[0], model(x, b)[0]
        combined = uncond + 3.0 * (cond - uncond)
        if step in (1, 2):
            combined = combined + 2.0 * (cond - model(x, a, layers=(1,))[0])
        x = x - 0.1 * combined
    return x + 0


def switched_off(model: Any) -> Tensor:
    """Guidance ends after two steps."""
    x, a, b = values()
    for step in range(5):
        found = model(x, a)[0][:, :, :].float()
        if step < 2:
            found = model(x, b)[0].to(torch.float32).mul(0.5) + found
        x = x - 0.1 * found
    return x + 0


def needed_at_once(model: Any) -> Tensor:
    """The first branch's norm is taken before the second is asked for, and written into."""
    x, a, b = values()
    for _ in range(3):
        cond = model(x, a)[0]
        cond *= 1 / cond.norm()
        uncond = model(x, b)[0]
        uncond[:, 0] = 0
        x = x - 0.1 * (uncond + 3.0 * (cond - uncond))
    return x + 0


def stacked(model: Any) -> Tensor:
    """As SDXL, three pictures: six samples; a table has as many rows as there are samples, by chance."""
    x, a, b = values(3)
    table = torch.linspace(1, 2, 4)[:, None].expand(4, D)
    for _ in range(3):
        uncond, cond = model(torch.cat([x, x]), torch.cat([b, a]), table=table)[0].chunk(2)
        x = x - 0.1 * (uncond + 3.0 * (cond - uncond))
    return x + 0


def coincidence(model: Any) -> Tensor:
    """Two samples of four tokens in a stack of four, and a table of four rows that are tokens."""
    x, a, b = values(2)
    table = torch.linspace(1, 2, 4)[:, None].expand(4, D).clone()
    uncond, cond = model(torch.cat([x, x]), torch.cat([b, a]), table=table)[0].chunk(2)
    again = model(torch.cat([x, x]), torch.cat([b, a]), table=table)
    return torch.cat([uncond, cond, again[0], again[1][:, None, None].expand(4, 4, D)])


WAYS: dict[str, tuple[Callable[[Any], Tensor], str]] = {
    "two calls": (two_calls, "branches side by side in 3 steps, one branch at a time in 1 steps, 1 calls on all ranks"),
    "three calls": (
        three_calls,
        "branches side by side in 4 steps, one branch at a time in 1 steps, 2 calls on all ranks",
    ),
    "switched off": (
        switched_off,
        "branches side by side in 1 steps, one branch at a time in 4 steps, 1 calls on all ranks",
    ),
    "needed at once": (needed_at_once, "one branch at a time in 5 steps, 1 calls on all ranks"),
    "stacked": (stacked, "batch cut in 2 calls, 1 calls on all ranks"),
    "coincidence": (coincidence, "batch cut in 1 calls, 1 calls on all ranks"),
}


def in_a_way(way: str) -> tuple[float, str, int, dict[str, int]]:
    """(error, report, calls of the denoiser here, exchanges)."""
    model = Denoiser()
    run = WAYS[way][0]
    with torch.no_grad():
        want = run(model)
        CALLS[id(model)].clear()
        with parafuse.apply(model, CFG) as handle:
            got = run(model)
            assert not isinstance(got, Placeholder)
            calls = {name: count.calls for name, count in handle.exchanged().items() if count.calls}
            return error(got, want), handle.guidance["Denoiser"].report(), len(CALLS[id(model)]), calls


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_what_one_rank_gives(way: str, ranks: int) -> None:
    if ranks == 3:
        found = run_ranks(in_a_way_on_three, 3, way)
        assert max(found) <= EXACT
        return
    for wrong, report, _, _ in run_ranks(in_a_way, 2, way):
        assert wrong <= EXACT
        assert report == WAYS[way][1]


def in_a_way_on_three(way: str) -> float:
    model, run = Denoiser(), WAYS[way][0]
    with torch.no_grad():
        want = run(model)
        with parafuse.apply(model, parafuse.Config(parallel=parafuse.Parallel(cfg=3, ulysses=1))):
            return error(run(model), want)


def test_each_rank_computes_its_branch_and_one_exchange_brings_all() -> None:
    """Eight calls in four steps: the first is seen by all, who agree on it, then one of two each."""
    found = run_ranks(in_a_way, 2, "two calls")
    assert [calls for _, _, calls, _ in found] == [5, 4]
    assert [exchanges for *_, exchanges in found] == [{"cfg.all_gather": 5}] * 2


def in_another_order() -> list[float]:
    """Errors with branches swapped, with an exchange left out, and with rows in another order."""
    found = []

    def swapped(mine: list[Tensor], shapes: Any, device: Any, group: str, error: Any = None) -> Any:
        ranks = bundle.exchange(mine, shapes, device, group, error)
        return [[*ranks[1], *ranks[0][len(ranks[1]) :]], [*ranks[0], *ranks[1][len(ranks[0]) :]]]

    def own_only(mine: list[Tensor], shapes: Any, *_: Any) -> Any:
        return [[torch.zeros(x.shape, dtype=x.dtype) for x in each] for each in shapes]

    for way, broken in ((two_calls, swapped), (two_calls, own_only), (stacked, swapped)):
        model = Denoiser()
        with torch.no_grad():
            want = way(model)
            checks = patch.object(batch_cut, "_is_same", lambda *_: True)
            exchanges = [patch.object(module, "exchange", broken) for module in (guidance_module, batch_cut)]
            with checks, exchanges[0], exchanges[1], parafuse.apply(model, CFG):
                found.append(error(way(model), want))
    return found


def test_swapped_branches_and_a_dropped_exchange_show() -> None:
    """Swapping what arrives leaves each rank its own branch: on each rank, another one is wrong."""
    for number in range(3):
        assert max(found[number] for found in run_ranks(in_another_order, 2)) > 1e-2


class Failing(Denoiser):
    """Fails without text, and with much of it gives fewer tokens."""

    def forward(self, x: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        if float(text.sum()) == 0:
            raise ValueError("no text")
        return (super().forward(x, text)[0][:, : 1 if float(text.max()) > 100 else None],)


def one_fails(factor: float) -> tuple[str, bool]:
    """The second branch of a step, which rank 1 computes, fails there: (what is raised here, whether soon)."""
    x, a, b = values()
    model: Any = Failing()
    with torch.no_grad(), parafuse.apply(model, CFG):
        model(x, a)
        begun = time.monotonic()
        pair = [model(x, a)[0], model(x, b * factor)[0]]
        return attempt(lambda: float((pair[0] + pair[1]).sum())), time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("factor", "why"), [(0.0, "ValueError: no text"), (1e4, "UnsupportedError: Failing: its results have other shapes")]
)
def test_a_branch_that_fails_on_one_rank_fails_on_all(factor: float, why: str) -> None:
    (other, soon), (owner, _) = run_ranks(one_fails, 2, factor)
    assert owner.startswith(why)
    assert other.startswith("RankError: the part of rank 1 of the group failed there")
    assert soon


class Taking(Denoiser):
    """Takes what it needs from a list that it is given, as a UNet does with an adapter's features."""

    def forward(self, x: Tensor, text: Tensor, features: list[Tensor]) -> Any:  # type: ignore[override]
        return super().forward(x * features.pop(0), text)


def with_features(model: Any, calls: int) -> tuple[Tensor, list[int]]:
    """Two calls in a step or one for both branches: (result, what was left of each list)."""
    x, a, b = values(2 if calls == 1 else 1)
    made: list[list[Tensor]] = []

    def features() -> list[Tensor]:
        made.append([torch.full((1,), 1.5), torch.zeros(1)])
        return made[-1]

    for _ in range(4):
        if calls == 2:
            cond, uncond = model(x, a, features())[0], model(x, b, features=features())[0]
        else:
            uncond, cond = model(torch.cat([x, x]), torch.cat([b, a]), features())[0].chunk(2)
        x = x - 0.1 * (uncond + 3.0 * (cond - uncond))
    return x + 0, [len(items) for items in made]


def taken_from_lists(calls: int) -> tuple[float, set[int], int]:
    model: Any = Taking()
    with torch.no_grad():
        want, _ = with_features(model, calls)
        with parafuse.apply(model, CFG) as handle:
            got, left = with_features(model, calls)
            seen = handle.guidance["Taking"].seen
    return error(got, want), set(left), seen["together"] + seen["cut"]


@pytest.mark.parametrize("calls", [1, 2])
def test_what_a_call_takes_from_a_list_is_taken_on_every_rank(calls: int) -> None:
    for wrong, left, shared in run_ranks(taken_from_lists, 2, calls):
        assert wrong <= EXACT
        assert left == {1}
        assert shared >= 2


class Lazy(Denoiser):
    """Fills a table at its first call."""

    def forward(self, x: Tensor, text: Tensor, table: Tensor | None = None) -> Any:  # type: ignore[override]
        if not hasattr(self, "filled"):
            self.filled = torch.ones(1)
        return super().forward(x * self.filled, text)


def used_before_on_one_rank(way: str) -> float:
    """On rank 0 the model has run before, so that its first call changes nothing there."""
    model: Any = Lazy()
    run = WAYS[way][0]
    with torch.no_grad():
        want = run(Lazy())
        if dist.get_rank() == 0:
            run(model)
        with parafuse.apply(model, CFG):
            return error(run(model), want)


@pytest.mark.parametrize("way", ["two calls", "stacked"])
def test_what_ranks_have_run_before_may_differ(way: str) -> None:
    assert max(run_ranks(used_before_on_one_rank, 2, way)) <= EXACT


def after_an_error() -> list[Any]:
    """A request that fails with a branch open leaves the next one as it would be."""
    model = Denoiser()
    with torch.no_grad():
        want = two_calls(model)
        with parafuse.apply(model, CFG) as handle:
            x, a, _ = values()
            model(x, a)
            assert is_open(model(x, a)[0])
            found = [attempt(model, x, "no text")]
            handle.rounds.forget()  # as at the start of each request of an engine
            found.append(error(two_calls(model), want))
            handle.remove()
            return [*found, error(two_calls(model), want), "forward" in vars(model)]


def test_an_error_in_the_middle_leaves_the_model_usable() -> None:
    for failed, after, removed, left in run_ranks(after_an_error, 2):
        assert "AttributeError" in failed
        assert (after, removed, left) == (0.0, 0.0, False)
