"""What a model may do with token tensors between blocks: on each rank's rows alone, or gathered, or refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parafuse.errors import UnsupportedError
from parafuse.parallel import shard
from parafuse.parallel.layout import Layout
from parafuse.parallel.shard import SequenceGroup, Sharded, gather_all

B, T, S, D = 2, 13, 35, 6
DEGREES = (2, 3, 4)


class Ranks:
    """Threads that play ranks: each runs the same function, and `all_gather` is a meeting of all."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.gathers = 0

    def all_gather(self, x: Tensor, degree: int, group: str) -> Tensor:
        assert group == "played"
        self.slots[self.here.rank] = x
        self.barrier.wait(timeout=20)
        out = torch.stack(self.slots)
        self.barrier.wait(timeout=20)
        self.gathers += self.here.rank == 0
        return out

    def all_reduce(self, x: Tensor, group: str) -> Tensor:
        out = self.all_gather(x, 0, group).sum(0)
        self.gathers -= self.here.rank == 0
        return out

    def play(self, degree: int, function: Callable[[SequenceGroup], Any]) -> list[Any]:
        """The results of `function(group)` by rank; the error of a rank ends the play."""
        self.slots: list[Any] = [None] * degree
        self.barrier = threading.Barrier(degree)
        self.gathers = 0

        def act(rank: int) -> Any:
            self.here.rank = rank
            group: Any = SimpleNamespace(group_name="played")
            try:
                return function(SequenceGroup(degree, rank, group))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(degree) as pool:
            futures = [pool.submit(act, rank) for rank in range(degree)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error  # the cause, not what it did to the others
        return [future.result() for future in futures]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    ranks = Ranks()
    monkeypatch.setattr(shard, "all_gather", ranks.all_gather)
    monkeypatch.setattr(shard, "all_reduce", ranks.all_reduce)
    return ranks


torch.manual_seed(0)
TEXT, IMAGE, OTHER = torch.randn(B, T, D), torch.randn(B, S, D), torch.randn(B, S, D)
JOINT = torch.cat([TEXT, IMAGE], 1)
TABLE, ROW, SCALE = torch.randn(S, D), torch.randn(D), torch.randn(B, 1, D)
LINEAR, NORM = nn.Linear(D, 5).requires_grad_(False), nn.LayerNorm(D).requires_grad_(False)
SQUARE = torch.randn(B, S, S)
STREAMS = {"text": TEXT, "image": IMAGE, "other": OTHER, "joint": JOINT, "rows": SQUARE, "columns": SQUARE + 1}
Act = Callable[[dict[str, Any]], Any]

LOCAL: dict[str, Act] = {
    "add a whole residual": lambda x: x["image"] + OTHER,
    "a whole residual first": lambda x: OTHER + x["image"],
    "two streams of one layout": lambda x: x["image"] * x["other"] - x["image"],
    "modulate": lambda x: x["image"] * (1 + SCALE) + ROW,
    "a table without batch": lambda x: x["image"] + TABLE,
    "a column for each token": lambda x: x["image"] * TABLE[:, :1],
    "number first": lambda x: 1 - 2 * x["image"] / 3,
    "power": lambda x: x["image"] ** 2,
    "where": lambda x: torch.where(OTHER > 0, x["image"], 0.0),
    "activations": lambda x: F.silu(torch.sigmoid(F.gelu(x["image"]))).clamp(-1, 1).tanh(),
    "cast": lambda x: x["image"].to(torch.bfloat16).float().type_as(OTHER),
    "copies": lambda x: x["image"].contiguous().clone().detach(),
    "methods": lambda x: x["image"].add(1).mul(2).neg().square().sqrt(),
    "lerp": lambda x: torch.lerp(x["image"], OTHER, 0.3),
    "keywords": lambda x: torch.add(x["image"], other=OTHER, alpha=2),
    "+= in place": lambda x: _augmented(x["image"]),
    "add_ in place": lambda x: x["image"].add_(OTHER).mul_(2),
    "linear": lambda x: LINEAR(x["image"]),
    "norm": lambda x: NORM(x["image"]),
    "norm of features": lambda x: F.rms_norm(x["image"], (D,)),
    "norm with keywords only": lambda x: F.layer_norm(input=x["image"], normalized_shape=(D,)),
    "streams one after another": lambda x: torch.cat([x["text"], x["image"]], dim=1),
    "a whole stream beside a split one": lambda x: torch.cat([TEXT, x["image"]], 1),
    "negative dim": lambda x: torch.cat([x["image"], x["text"]], dim=-2),
    "features side by side": lambda x: torch.cat([x["image"], OTHER, x["other"]], dim=-1),
    "batches": lambda x: torch.cat([x["image"], x["other"]], dim=0),
    "cut the text away": lambda x: torch.cat([x["text"], x["image"]], 1)[:, T:],
    "keep the text": lambda x: torch.cat([x["text"], x["image"]], 1)[:, :T, ...],
    "negative bound": lambda x: torch.cat([x["text"], x["image"]], 1)[:, -S:],
    "some features": lambda x: x["image"][..., 1:4],
    "some batches": lambda x: x["image"][1:],
    "split by streams": lambda x: torch.cat([x["text"], x["image"]], 1).split([T, S], dim=1),
    "split with keywords": lambda x: torch.split(x["image"], dim=2, split_size_or_sections=4),
    "chunks of features": lambda x: x["image"].chunk(3, dim=-1),
    "chunks with keywords": lambda x: x["image"].chunk(dim=-1, chunks=2),
    "stacked": lambda x: torch.stack([x["image"], x["other"]]),
    "stacked features": lambda x: torch.stack([x["image"], x["other"]], dim=-1).flatten(2),
    "heads": lambda x: x["image"].unflatten(-1, (3, 2)).transpose(1, 2),
    "heads by view": lambda x: x["image"].view(B, S, 3, -1).permute(0, 2, 1, 3),
    "heads and back": lambda x: x["image"].reshape(B, -1, 2, 3).transpose(1, 2).transpose(1, 2).flatten(2),
    "unsqueezed": lambda x: x["image"].unsqueeze(1).expand(-1, 4, S, -1)[:, 2],
    "nothing to squeeze": lambda x: x["image"].squeeze(1),
    "unbound": lambda x: x["image"].unflatten(-1, (2, 3)).unbind(2),
    "one feature": lambda x: x["image"][..., 0],
    "one sample": lambda x: x["image"][1],
    "a new dim": lambda x: x["image"][:, None, :, ::2],
    "as complex numbers": lambda x: torch.view_as_real(torch.view_as_complex(x["image"].reshape(B, S, 3, 2)) * 2j),
    "softmax of features": lambda x: x["image"].softmax(-1),
    "sums of features": lambda x: x["image"].sum(-1, keepdim=True) + x["image"].mean(dim=2, keepdim=True),
    "heads repeated": lambda x: x["image"].repeat_interleave(2, dim=-1),
    "copies of samples": lambda x: x["image"].repeat(2, 1, 1),
    "padded features": lambda x: F.pad(x["image"], (0, 2), value=1.0),
    "padded tokens": lambda x: F.pad(x["image"], (0, 0, 2, 3), value=1.0),
    "zeros of the same shape": lambda x: torch.zeros_like(x["image"]) + x["image"],
    "written into segments": lambda x: _written(torch.cat([x["text"], x["image"]], 1)),
    "times a matrix": lambda x: x["image"] @ LINEAR.weight.T,
    "a matrix times": lambda x: LINEAR.weight @ x["image"].transpose(1, 2),
    "compared": lambda x: torch.where(x["image"] > OTHER, x["image"], OTHER),
    "a chain": lambda x: LINEAR(NORM(torch.cat([x["text"], x["image"]], 1)) * (1 + SCALE))[:, T:] + 1,
}
GATHERED: dict[str, Act] = {
    "mean over tokens": lambda x: x["image"].mean(dim=1),
    "cumulative": lambda x: torch.cumsum(x["image"], 1),
    "norm over tokens": lambda x: F.layer_norm(x["image"], (S, D)),
    "matrix product": lambda x: x["image"].transpose(1, 2) @ OTHER,
    "roll": lambda x: x["image"].roll(1, 1),
    "reshape": lambda x: x["image"].reshape(B, 5, 7, D),
    "unpatchify": lambda x: x["image"].unflatten(1, (5, 7)).permute(0, 3, 1, 2),
    "every second token": lambda x: x["image"][:, ::2],
    "tokens from the middle of a stream": lambda x: x["image"][:, 3:9],
    "one token": lambda x: x["image"][:, 0],
    "picked tokens": lambda x: x["image"][:, torch.tensor([4, 1])],
    "chunks of tokens": lambda x: x["image"].chunk(2, dim=1),
    "equal sizes": lambda x: x["image"].split(10, dim=1),
    "sizes across streams": lambda x: x["joint"].split([5, S + T - 5], 1),
    "flipped product": lambda x: x["image"] * x["image"].flip(1),
    "streams of two layouts": lambda x: x["joint"] + torch.cat([x["text"], x["image"]], 1),
    "split along other dims": lambda x: x["rows"] + x["columns"],
    "side by side along other dims": lambda x: torch.cat([x["rows"], x["columns"]], 0),
    "numpy": lambda x: torch.from_numpy(x["image"].numpy().copy()),
    "item": lambda x: torch.tensor(x["image"].sum().item()),
    "into a whole tensor": lambda x: _into_whole(x["image"]),
    "keywords only": lambda x: torch.cat(tensors=[x["image"], x["other"]], dim=1),
    "linear with keywords only": lambda x: F.linear(input=x["image"], weight=LINEAR.weight),
    "add with keywords only": lambda x: torch.add(input=x["image"], other=OTHER),
    "in place, of two layouts": lambda x: _augmented(x["joint"], torch.cat([x["text"], x["image"]], 1)),
    "rows times columns": lambda x: x["image"] @ x["other"].transpose(1, 2),
    "out": lambda x: torch.add(x["image"], OTHER, out=torch.empty(B, S, D)),
}
SUMMED: dict[str, Act] = {
    "tokens contracted": lambda x: x["image"].transpose(1, 2) @ x["other"],
    "filler that is no number": lambda x: _inverse(x["image"]).transpose(1, 2) @ _inverse(x["other"]),
    "two streams contracted": lambda x: _both(x).transpose(1, 2) @ (_both(x) + 1),
}
"""Sums over tokens of what each rank has: filler must not count."""


def _zeroed(x: dict[str, Any]) -> Any:
    x["image"][:, 0] = 0.0
    return x["image"]


def _through_a_view(x: dict[str, Any]) -> Any:
    """Another name of the same memory must see the change."""
    x["image"][:, :, :2].zero_()
    return x["image"]


IN_PLACE: dict[str, Act] = {
    "copy_": lambda x: x["image"].copy_(OTHER),
    "zero_": lambda x: x["image"].zero_(),
    "index_add_": lambda x: x["image"].index_add_(1, torch.tensor([0]), OTHER[:, :1]),
    "masked_fill_": lambda x: x["image"].masked_fill_(OTHER > 0, 0.0),
    "cumsum_": lambda x: x["image"].cumsum_(1),
    "__setitem__": _zeroed,
    "cat": lambda x: torch.cat([OTHER, TEXT], 1, out=x["joint"]),
    "a view": _through_a_view,
}
"""What has no rule and changes rows: done on the whole tensor, this rank's rows written back."""


def _augmented(x: Any, other: Any = None) -> Any:
    x += OTHER if other is None else other
    return x


def _inverse(x: Any) -> Any:
    """Infinite where a row is zero, as filler is at first."""
    return 0.01 / x


def _both(x: dict[str, Any]) -> Any:
    return torch.cat([x["text"], x["image"]], 1)


def _written(x: Any) -> Any:
    """As rotary embeddings of one stream of several are written back."""
    x[:, T:] = x[:, T:] * 2 + OTHER
    x[:, :T, :2] = 0.5
    return x


def _into_whole(x: Any) -> Any:
    """A plain tensor that a split one is added to in place: its other names must see the sum."""
    whole = OTHER.clone()
    alias = whole
    whole += x
    whole.mul_(x)
    return alias.clone()


def split(group: SequenceGroup) -> dict[str, Any]:
    """The streams as tensors that carry this rank's rows."""
    out = {}
    for name, whole in STREAMS.items():
        dim = 2 if name == "columns" else 1
        layout = Layout((whole.shape[dim],), group.degree)
        out[name] = Sharded(group.take(whole, dim, layout).clone(), dim, layout, group)
    return out


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def check(ranks: Ranks, act: Act, degree: int) -> tuple[bool, int]:
    """Compares with whole tensors; (whether all results stay split, gathers of the act itself)."""
    expected = flat(act({name: x.clone() for name, x in STREAMS.items()}))
    results = ranks.play(degree, lambda group: flat(act(split(group))))
    gathers = ranks.gathers
    whole = ranks.play(degree, lambda group: gather_all(results[group.rank]))
    for rank in range(degree):
        assert len(whole[rank]) == len(expected)
        for got, seen, want in zip(whole[rank], results[rank], expected, strict=True):
            assert seen.shape == want.shape
            assert seen.dtype == got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    return all(isinstance(x, Sharded) for result in results for x in result), gathers


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("name", LOCAL)
def test_done_on_the_rows_of_each_rank(ranks: Ranks, name: str, degree: int) -> None:
    assert check(ranks, LOCAL[name], degree) == (True, 0)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("name", GATHERED)
def test_gathered_first(ranks: Ranks, name: str, degree: int) -> None:
    assert check(ranks, GATHERED[name], degree)[1] >= 1


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("name", SUMMED)
def test_summed_over_the_ranks(ranks: Ranks, name: str, degree: int) -> None:
    assert check(ranks, SUMMED[name], degree) == (False, 0)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_changes_in_place_keep_the_rows(ranks: Ranks, name: str, degree: int) -> None:
    stays, gathers = check(ranks, IN_PLACE[name], degree)
    assert stays
    assert gathers >= 1


PARTS: dict[str, Act] = {
    "zero_": lambda x: x["image"][:, 3:9].zero_(),
    "mul_": lambda x: x["image"][:, 3:9].mul_(2.0),
    "add_": lambda x: x["image"][:, 3:9][..., :2].add_(1.0),
    "__setitem__": lambda x: x["image"][:, 3:9].__setitem__((slice(None), slice(None), 0), 1.0),
}
"""Slices inside of a stream are split anew, so they are copies: a change would not reach the stream."""


@pytest.mark.parametrize("name", PARTS)
def test_a_part_changed_in_place_is_refused(ranks: Ranks, name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"a part of a split tensor in place by '{name}'"):
        ranks.play(2, lambda group: PARTS[name](split(group)))


def test_a_change_of_a_copy_reaches_the_whole_it_was_copied_from(ranks: Ranks) -> None:
    """As an argument of a block that runs on whole shapes: the model may look at its own tensor afterwards."""

    def change(group: SequenceGroup) -> list[Tensor]:
        whole = STREAMS["image"].clone()
        layout = Layout((S,), group.degree)
        x: Any = Sharded(group.take(whole, 1, layout).clone(), 1, layout, group).as_borrowed(source=whole)
        x += 1.0
        x.masked_fill_(OTHER > 0, 0.0)
        x[:, :, 0] = 5.0
        return [whole, gather_all(x)]

    want = STREAMS["image"].clone()
    want += 1.0
    want.masked_fill_(OTHER > 0, 0.0)
    want[:, :, 0] = 5.0
    for whole, found in ranks.play(3, change):
        torch.testing.assert_close(whole, want)
        torch.testing.assert_close(found, want)


def test_another_shape_in_place_is_refused(ranks: Ranks) -> None:
    with pytest.raises(UnsupportedError, match="the shape of a split tensor in place by 'transpose_'"):
        ranks.play(2, lambda group: split(group)["image"].transpose_(1, 2))


def test_metadata_is_that_of_the_whole_and_costs_nothing(ranks: Ranks) -> None:
    def look(group: SequenceGroup) -> list[Any]:
        x = split(group)["image"]
        return [
            x.shape,
            x.size(1),
            x.dim(),
            x.ndim,
            len(x),
            x.numel(),
            x.dtype,
            x.device,
            x.type(),
            x.is_floating_point(),
        ]

    expected = [
        IMAGE.shape,
        S,
        3,
        3,
        B,
        B * S * D,
        torch.float32,
        torch.device("cpu"),
        "torch.FloatTensor",
        True,
    ]
    assert ranks.play(3, look) == [expected] * 3
    assert ranks.gathers == 0


def test_in_place_is_seen_under_every_name(ranks: Ranks) -> None:
    def act(group: SequenceGroup) -> Tensor:
        x = split(group)["image"]
        alias = x
        x += 1
        return alias.whole()

    for got in ranks.play(3, act):
        torch.testing.assert_close(got, IMAGE + 1)


def test_wrong_filler_would_show(ranks: Ranks) -> None:
    """Negative control: a gather that trims only the tail of the whole is not what `whole` gives."""

    def trimmed(group: SequenceGroup) -> tuple[Tensor, Tensor]:
        layout = Layout((T, S), group.degree)
        x = Sharded(group.take(JOINT, 1, layout), 1, layout, group)
        everyone = ranks.all_gather(x.local, group.degree, "played")
        return x.whole(), everyone.movedim(0, 1).flatten(1, 2)[:, : T + S]

    for whole, tail in ranks.play(4, trimmed):
        assert torch.equal(whole, JOINT)
        assert float((tail - JOINT).abs().max()) > 0.1


def test_rows_that_do_not_fit_and_gathers_in_simulations_are_refused() -> None:
    layout = Layout((S,), 2)
    alone = SequenceGroup(2, 0, None)
    with pytest.raises(UnsupportedError, match="35 rows along dim 1"):
        Sharded(IMAGE, 1, layout, alone)
    with pytest.raises(UnsupportedError, match="a simulated rank cannot gather"):
        Sharded(alone.take(IMAGE, 1, layout), 1, layout, alone).whole()
