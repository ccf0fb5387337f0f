"""Blocks that cannot run on a rank's rows alone run on whole shapes, exactly; where nothing is split: refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parafuse
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, Layout, attempt, parallel
from tests.models import error
from tests.unit.test_probe_refusals import Good, LogScale, Mean, Positions


class Stack(nn.Module):
    """Blocks one after another."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *context: Any, **options: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *context, **options)
        return x


class Manual(Good):
    """Attention written out, which nobody can find."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return x + (torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v).transpose(1, 2).flatten(2)


class Cumulative(Good):
    """Mixes tokens by something that cannot be split."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cumsum(x, 1)


class Crossed(Good):
    """Self-attention, then attention to a context that every rank has, under a mask."""

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        x = x + self.attend(x)
        q, (k, v) = self.project(x)[0], self.project(context)[1:]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return x + seen.transpose(1, 2).flatten(2)


def beside_another(kinds: list[type[Good]], layout: Layout) -> list[Any]:
    """What two calls gave (an error against the plain model, or a refusal), the error of a model beside it, and whether
    the model is as it was after `remove`."""
    model, beside, x = Stack(*(kind() for kind in kinds)), Stack(Good(), Good()), torch.randn(2, 35, 8)
    plain, plain_beside = model(x), beside(x)
    with parafuse.apply(model, parallel(layout)), parafuse.apply(beside, parallel(layout)):
        out = [
            attempt(lambda: error(model(x), plain)),
            error(beside(x), plain_beside),
            attempt(lambda: error(model(x), plain)),
        ]
    return [*out, torch.equal(model(x), plain)]


@pytest.mark.parametrize("layout", [(1, 2), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", [Mean, Positions, LogScale, Manual])
def test_a_block_that_needs_whole_shapes_is_exact(kind: type[Good], layout: Layout) -> None:
    for first, beside, second, restored in run_ranks(beside_another, layout[0] * layout[1], [Good, kind], layout):
        assert not isinstance(first, str), first
        assert max(first, beside, second) <= EXACT
        assert restored


def test_a_model_of_which_nothing_is_split_is_refused_by_its_operator() -> None:
    for first, beside, second, restored in run_ranks(beside_another, 2, [Cumulative, Cumulative], (1, 2)):
        assert first == second or "cumsum" in second
        assert first.startswith("UnsupportedError: Stack: none of its blocks can be split over tokens: they need whole")
        assert "cumsum (2 times)" in first
        assert beside <= EXACT
        assert restored


def crossed(layout: Layout) -> dict[str, Any]:
    """Mask of the cross-attention -> error, or the text of a refusal."""
    model, x, context = Stack(Crossed(), Crossed()), torch.randn(2, 35, 8), torch.randn(2, 13, 8)
    keys, full = torch.rand(2, 1, 1, 13) < 0.6, torch.rand(2, 1, 35, 13) < 0.6
    keys[..., 0] = full[..., 0] = True
    masks = {
        "none": None,
        "keys": keys,
        "full": full,
        "two dims": full[0, 0],
        "bias for each head": torch.randn(1, 2, 35, 13),
        "bias of queries": torch.randn(2, 1, 35, 1).expand(2, 1, 35, 13),
    }
    plain = {name: model(x, context, mask) for name, mask in masks.items()}
    with parafuse.apply(model, parallel(layout)):
        out: dict[str, Any] = {
            name: attempt(lambda name=name, mask=mask: error(model(x, context, mask), plain[name]))
            for name, mask in masks.items()
        }
        out["causal"] = attempt(lambda: model(x, context, causal=True))
    return out


@pytest.mark.parametrize("layout", [(1, 2), (3, 1), (2, 2)], ids=str)
def test_masks_of_cross_attention(layout: Layout) -> None:
    for found in run_ranks(crossed, layout[0] * layout[1], layout):
        assert found.pop("causal").startswith("UnsupportedError: causal attention from split tokens")
        assert {name: value for name, value in found.items() if isinstance(value, str) or not value <= EXACT} == {}
        assert len(found) == 6
