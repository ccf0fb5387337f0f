"""Blocks that cannot be split are refused, by name and with what was seen; unchecked, they would be wrong."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from parafuse.engine import probe as probe_module
from parafuse.engine.probe import probe
from parafuse.errors import UnsupportedError
from parafuse.kernels.attention import Call
from parafuse.parallel.attention_mode import AttentionMode
from parafuse.parallel.block_plan import KEPT, BlockPlan, Bound, Site
from parafuse.parallel.shard import SequenceGroup

D = 8


class Good(nn.Module):
    """A block that can be split; the others change one thing."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3 * D, D, generator=generator) / math.sqrt(D)
        self.kernel = torch.randn(D, 1, 3, generator=generator)
        self.registers = torch.randn(1, 4, D, generator=generator)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(x, self.weight).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, x: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(*self.project(x), **options).transpose(1, 2).flatten(2)

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv1d(x.transpose(1, 2), self.kernel, padding=1, groups=D).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x)


class Mean(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x + x.mean(1, keepdim=True))


class MeanOfResult(Good):
    def forward(self, x: Tensor) -> Tensor:
        seen = self.attend(x)
        return x + seen - seen.mean(1, keepdim=True)


class Convolution(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(self.convolve(x))


class ConvolutionAfter(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolve(self.attend(x))


class Shift(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x.roll(1, 1))


class ShiftOfSomeFeatures(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(torch.cat([x[..., :4].roll(1, 1), x[..., 4:]], -1))


class ShiftOfResult(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x).roll(1, 1)


class NormOverTokens(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(F.layer_norm(x.transpose(1, 2), x.shape[1:2]).transpose(1, 2))


class FirstToken(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x + x[:, :1])


class Registers(Good):
    """Learned tokens beside those of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(torch.cat([self.registers.expand(len(x), -1, -1), x], 1))[:, 4:]


class RegistersAround(Good):
    """Some of them before the stream, some after it."""

    def forward(self, x: Tensor) -> Tensor:
        own = self.registers.expand(len(x), -1, -1)
        return x + self.attend(torch.cat([own[:, :1], x, own[:, 1:]], 1))[:, 1:-3]


class Positions(Good):
    """Counts the tokens it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x + torch.arange(x.shape[1])[:, None] / 10)


class MiddleToken(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x + x[:, x.shape[1] // 2, None])


class Reordered(Good):
    """Tokens change places, but not the first and the last."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(torch.cat([x[:, :1], x[:, 1:-1].flip(1), x[:, -1:]], 1))


class Reversed(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) + self.attend(x)


class TextLength(Good):
    """Takes a length as an int, and cuts there."""

    def forward(self, x: Tensor, length: int) -> Tensor:  # type: ignore[override]
        return x + self.attend(torch.cat([2 * x[:, :length], x[:, length:]], 1))


class TableLength(Good):
    """Takes a length as an int, and makes a table of it."""

    def forward(self, x: Tensor, length: int) -> Tensor:  # type: ignore[override]
        return x + self.attend(x + torch.linspace(0, 1, length)[:, None])


class Grid(Good):
    """Takes a grid, and transposes it."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        return x + self.attend(x.unflatten(1, grid).transpose(1, 2).flatten(1, 2))


class LocalMask(Good):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return x + self.attend(x, attn_mask=torch.ones(n, n, dtype=torch.bool).tril())


class LogScale(Good):
    """Attention sharpened by the logarithm of the length, as some models do (Lumina)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x, scale=math.log(x.shape[1]) / 4)


class Dropout(Good):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x, dropout_p=0.1)


MIX = "cannot be split over tokens: tokens mix outside of attention: in "
SIMULATED = "cannot be split over tokens: with 2 simulated ranks, "
NUMBER = "does the block take a length or a grid as a number?"
REFUSED: list[tuple[type[Good], tuple[Any, ...], str]] = [
    (Mean, (), MIX + "argument 0, one row changes 35 rows of q at attention 0"),
    (MeanOfResult, (), MIX + "the result of attention 0, one row changes several rows of result 0"),
    (Convolution, (), MIX + "argument 0, one row changes 2 rows of q at attention 0"),
    (ConvolutionAfter, (), MIX + "the result of attention 0, one row changes several rows of result 0"),
    (Shift, (), MIX + "argument 0, rows change places in q at attention 0"),
    (ShiftOfSomeFeatures, (), MIX + "argument 0, one row changes 2 rows of q at attention 0"),
    (ShiftOfResult, (), SIMULATED + "result 0 differs"),
    (NormOverTokens, (), MIX + "argument 0, one row changes 35 rows of q at attention 0"),
    (FirstToken, (), MIX + "argument 0, one row changes 35 rows of q at attention 0"),
    (
        RegistersAround,
        (),
        "cannot be split over tokens: the queries of attention 0 mix split rows with rows that every rank has",
    ),
    (Positions, (), SIMULATED + "q of attention 0 differs"),
    (MiddleToken, (), SIMULATED + "q of attention 0 differs"),
    (Reordered, (), SIMULATED + "q of attention 0 differs"),
    (Reversed, (), SIMULATED + "result 0 differs"),
    (TextLength, (13,), SIMULATED + "q of attention 0 differs"),
    (TableLength, (35,), SIMULATED + "it fails on a part of the tokens (The size of tensor a"),
    (Grid, ((5, 7),), SIMULATED + "it fails on a part of the tokens (unflatten"),
    (
        LocalMask,
        (),
        "cannot be split over tokens: it makes the mask of attention 0 from the number of tokens it is given",
    ),
    (
        LogScale,
        (),
        "cannot be split over tokens: it makes the scale of attention 0 from the number of tokens it is given",
    ),
]
ASKED_FOR_NUMBERS = (Positions, MiddleToken, Reordered, TextLength, TableLength, Grid)


def examine(kind: type[Good], *extra: Any, tokens: int = 35) -> BlockPlan:
    block = kind()
    x = torch.randn(2, tokens, D, generator=torch.Generator().manual_seed(1))
    return probe(block, block.forward, *tree_flatten(((x, *extra), {})))


def test_the_block_that_the_others_are_made_from_is_split() -> None:
    assert examine(Good).splits


def test_learned_tokens_are_on_every_rank() -> None:
    plan = examine(Registers)
    (atom,) = plan.results[0].atoms
    assert plan.sites == (Site((KEPT, atom), (KEPT, atom)),)


def test_more_learned_tokens_than_others_are_no_gain() -> None:
    with pytest.raises(UnsupportedError, match="most rows of attention 0 are not the tokens of any argument"):
        examine(Registers, tokens=3)


@pytest.mark.parametrize(("kind", "extra", "seen"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_refused_by_name_with_what_was_seen(kind: type[Good], extra: tuple[Any, ...], seen: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(f"{kind.__name__}: {seen}")) as caught:
        examine(kind, *extra)
    assert (NUMBER in str(caught.value)) or kind not in ASKED_FOR_NUMBERS


@pytest.mark.parametrize("tokens", [2, 3, D, 36])
@pytest.mark.parametrize("kind", [Mean, Convolution, Shift, ShiftOfResult, Positions, LogScale])
def test_refused_at_other_lengths_too(kind: type[Good], tokens: int) -> None:
    with pytest.raises(UnsupportedError, match=kind.__name__):
        examine(kind, tokens=tokens)


def test_attention_with_dropout_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=re.escape("attention with dropout: call eval() on the model first")):
        examine(Dropout)


@pytest.mark.parametrize(
    ("kind", "extra"), [(TextLength, (13,)), (Positions, ()), (Reordered, ()), (ShiftOfResult, ())]
)
def test_without_simulated_ranks_they_would_be_let_through_and_be_wrong(
    kind: type[Good], extra: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: it is the simulation that catches these, and they deserve it."""
    monkeypatch.setattr(probe_module, "SIMULATED_DEGREES", ())
    plan = examine(kind, *extra)
    assert plan.splits
    assert disagreement(kind, extra, plan) > 1e-2
    assert disagreement(Good, (), examine(Good)) < 1e-6


def disagreement(kind: type[Good], extra: tuple[Any, ...], plan: BlockPlan) -> float:
    """Largest error of the second of two ranks' rows, where attention is given what it would be given on one rank."""
    block = kind()
    x = torch.randn(2, 35, D, generator=torch.Generator().manual_seed(1))
    whole = block(x, *extra)
    outs: list[Tensor] = []

    def watch(site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        outs.append(F.scaled_dot_product_attention(**given))
        return outs[-1]

    with AttentionMode(watch):
        block(x, *extra)
    ranks = SequenceGroup(2, 1, None)
    leaves, _ = tree_flatten(((x, *extra), {}))
    bound = Bound(plan, leaves, ranks, {})
    layout = bound.layout(plan.results[0].atoms)
    queries: list[Tensor] = []

    def replace(site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        queries.append(q)
        return ranks.take(outs[site], 2, layout)

    with AttentionMode(replace):
        local = block(*bound.local)
    rows = layout.spans(1)[0][1]
    want_q = ranks.take(block.project(_seen_by_attention(block, x, extra))[0], 2, layout)
    errors = [(local - ranks.take(whole, 1, layout))[:, :rows], (queries[0] - want_q)[:, :, :rows]]
    return max(float(error.abs().max()) for error in errors)


def _seen_by_attention(block: Good, x: Tensor, extra: tuple[Any, ...]) -> Tensor:
    """What the whole block projects to queries."""
    seen: list[Tensor] = []
    block.project = lambda y, project=block.project: seen.append(y) or project(y)  # type: ignore[method-assign]
    block(x, *extra)
    del block.project
    return seen[0]
