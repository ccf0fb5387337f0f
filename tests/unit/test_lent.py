"""Lists that a call takes items from: what it took is taken from the caller's own ones, and nothing else."""

from __future__ import annotations

from typing import Any

import torch

from parafuse.parallel.lent import Lent, take


def three() -> list[torch.Tensor]:
    return [torch.zeros(1), torch.ones(1), torch.zeros(1)]


def call(first: list[Any], second: list[Any], *, third: list[Any]) -> None:
    """Takes the first item of one, turns another round, and leaves the third."""
    first.pop(0)
    second.reverse()


def test_what_a_call_took_is_taken_of_other_lists() -> None:
    lists = [three() for _ in range(3)]
    lent = Lent((lists[0], lists[1]), dict(third=lists[2]))
    before = [list(items) for items in lists]
    call(*lent.args, **lent.kwargs)
    assert [len(items) for items in lists] == [3, 3, 3], "it was given copies"
    left = lent.left()
    assert left == {0: (1, 2), 1: (2, 1, 0)}
    lent.give_back()
    want = [before[0][1:], before[1][::-1], before[2]]
    assert all(a is b for items, wanted in zip(lists, want, strict=True) for a, b in zip(items, wanted, strict=True))
    others = [["a", "b", "c"] for _ in range(3)]
    assert left is not None
    take((others[0], others[1]), dict(third=others[2]), left)
    assert others == [["b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


def test_what_is_put_into_a_list_is_more_than_taking() -> None:
    items = three()
    lent = Lent((items,), {})
    lent.args[0].append(torch.ones(1))
    assert lent.left() is None
    lent.give_back()
    assert len(items) == 4


def test_an_item_that_stands_twice_cannot_be_told() -> None:
    lent = Lent((["a", "a", "b"],), {})
    assert lent.left() == {}
    lent.args[0].pop(0)
    assert lent.left() is None
