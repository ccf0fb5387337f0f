"""Placeholders: what is recorded gives what plain tensors give, and anything else asks for the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from parafuse.parallel.placeholder import Placeholder, is_open, settled

VALUE = torch.arange(24.0).view(2, 3, 4) / 7


class Asked:
    def __init__(self) -> None:
        self.times = 0

    def placeholder(self, value: Tensor = VALUE) -> Placeholder:
        def make() -> Tensor:
            self.times += 1
            return value.clone()

        return Placeholder(torch.empty_like(value, device="meta"), value.device, make)


RECORDED: dict[str, Callable[[Any], Any]] = {
    "slice": lambda x: x[:, 1:, ..., 0],
    "arithmetic": lambda x: 2 * (x - x[:, :1] / 3) + 1 - (-x),
    "cast": lambda x: x.to(torch.float64).half().float(),
    "views": lambda x: x.permute(2, 0, 1).reshape(4, 6).unsqueeze(0).transpose(1, 2).squeeze(0),
    "chunk": lambda x: x.chunk(2)[1] - x.chunk(2)[0],
    "unbind": lambda x: x.unbind(1)[2],
    "scalar tensor": lambda x: x * torch.tensor(0.5),
}
ASKING: dict[str, Callable[[Any], Any]] = {
    "another tensor": lambda x: x + torch.ones(3, 4),
    "norm": lambda x: x.norm(dim=-1, keepdim=True),
    "cat": lambda x: torch.cat([x, x]),
    "in place": lambda x: x.mul_(2),
    "written into": lambda x: x.__setitem__(0, 0) or x.sum(),
    "a view written into": lambda x: (x[0].zero_(), x)[1] * torch.ones(4),
    "item": lambda x: torch.tensor(x.sum().item()),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "condition": lambda x: torch.ones(1) if (x > 1).any() else torch.zeros(1),
    "where": lambda x: torch.where(x > 1, x, 0),
    "linear": lambda x: torch.nn.functional.linear(x, torch.ones(5, 4)),
    "out": lambda x: torch.add(x, 1, out=torch.empty(2, 3, 4)),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_until_a_value_is_needed(name: str) -> None:
    asked = Asked()
    found, want = RECORDED[name](asked.placeholder()), RECORDED[name](VALUE)
    assert asked.times == 0
    assert is_open(found)
    assert (found.shape, found.dtype, found.device, found.ndim) == (want.shape, want.dtype, want.device, want.ndim)
    assert torch.equal(settled(found), want)
    assert not is_open(found)


@pytest.mark.parametrize("name", ASKING)
def test_everything_else_asks_for_the_value(name: str) -> None:
    asked = Asked()
    found = ASKING[name](asked.placeholder())
    assert asked.times == 1
    assert torch.equal(settled(found), ASKING[name](VALUE.clone()))


def test_a_value_is_made_once_and_views_of_it_are_views() -> None:
    asked = Asked()
    x = asked.placeholder()
    part, doubled = x[0], x * 2
    assert torch.equal(settled(doubled), VALUE * 2)
    settled(part).zero_()
    assert float(settled(x)[0].abs().max()) == 0
    assert asked.times == 1
    assert not isinstance(x + 1, Placeholder)
