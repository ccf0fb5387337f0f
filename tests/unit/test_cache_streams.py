"""Streams between blocks that may be skipped: what a model's own code does to them in place, and what it takes past."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import parafuse
from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.twin import Twin
from parafuse.errors import UnsupportedError
from tests.zoo.collect import cases, inputs_of, outputs, randomized

MASK = "mask:1110,first_blocks={},warmup_steps=0,final_steps=0"


def last_of_four(name: str, cache: str) -> tuple[list[str], float]:
    """(decisions, error of the last of four steps on the same inputs) of a case of the zoo."""
    case = cases()[name]
    with torch.no_grad(), patch.object(Clock, "counts", True):
        model = randomized(case.build())
        want = outputs(model, inputs_of(case, case.sizes))
        got = want
        with parafuse.apply(model, parafuse.Config(cache=cache)) as handle, handle.request() as memories:
            for handle.clock.step in range(4):
                got = outputs(model, inputs_of(case, case.sizes))
            calls = next(iter(memories.values())).decisions.values()
    letters = ["".join("s" if one.skipped else "c" for one in samples.values()) for samples in calls]
    return letters, max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("ChromaTransformer2DModel: control residuals", MASK.format(1)),  # written into a part of the stream
        ("WanVACETransformer3DModel", MASK.format(1)),  # hints that go past the last block
        ("Lumina2Transformer2DModel", MASK.format(0)),  # refiners run before the stack
        ("Lumina2Transformer2DModel", "teacache:9,warmup_steps=0,final_steps=0"),
        ("CogVideoXTransformer3DModel", "teacache:9,warmup_steps=0,final_steps=0"),  # joins its streams at once
    ],
)
def test_a_skipped_step_reproduces_the_computed_one(name: str, cache: str) -> None:
    letters, error = last_of_four(name, cache)
    assert letters[3] == "ss"
    assert letters[:2] == ["cc", "cc"]
    assert error <= 1e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.layer(stream)


class PastTheLast(nn.Module):
    """Goes on with what its second block gives, beside the last one's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, stream: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for block in self.blocks:
            stream = block(stream)
            seen.append(stream)
        return stream + seen[1]


def test_what_goes_past_the_last_block_is_refused() -> None:
    model = PastTheLast().requires_grad_(False)
    with parafuse.apply(model, parafuse.Config(cache=MASK.format(1))) as handle, handle.request():
        model(torch.zeros(1, 3, 4))
        with pytest.raises(UnsupportedError, match="goes on with what blocks inside of the part that may be skipped"):
            model(torch.ones(1, 3, 4))


def test_a_change_in_place_reaches_both_sides_and_no_argument() -> None:
    argument, block = torch.ones(2, 3), torch.full((2, 3), 5.0)
    twin: Any = Twin(block, argument)
    twin[:, :1] = torch.zeros(2, 1)
    twin += 1
    assert twin.value.tolist() == [[1.0, 6.0, 6.0]] * 2
    assert twin.base.tolist() == [[1.0, 2.0, 2.0]] * 2
    assert argument.tolist() == [[1.0] * 3] * 2


def test_a_stream_that_is_left_out_keeps_the_argument() -> None:
    for argument in (torch.ones(2, 3), torch.ones(()).expand(2, 3)):
        lent: Any = Twin.lent(argument)
        lent += 1
        assert lent.value.tolist() == lent.base.tolist() == [[2.0] * 3] * 2
        assert lent.value is lent.base
        assert argument.tolist() == [[1.0] * 3] * 2


def test_a_stream_written_into_another_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="writes a stream into another tensor by '__setitem__'"):
        torch.zeros(2, 3)[:, :1] = Twin.lent(torch.ones(2, 1))
