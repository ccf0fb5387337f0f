"""Weights that come and go: where they are, what stands for them meanwhile, and what a home keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from parafuse.engine.offload.component import Summons
from parafuse.engine.offload.units import groups_of
from parafuse.engine.quantize.pack import packed
from parafuse.errors import UnsupportedError
from parafuse.parallel.carry import HostCarrier, Ledger
from parafuse.parallel.homes import DiskHome, Home, HostHome
from parafuse.parallel.image import Image, nbytes_of
from parafuse.parallel.residence import Residence, Turn
from parafuse.quantization import Int8Weight
from tests.memory.towers import CPU, settled, tower
from tests.memory.watch import Watch


@pytest.fixture(params=["host", "disk"])
def home(request: Any, tmp_path: Path) -> Home:
    return HostHome(pinned=False) if request.param == "host" else DiskHome(str(tmp_path))


# weights that are away


def test_what_stands_for_weights_looks_like_them_and_is_no_number(home: Home) -> None:
    model, x = tower(), torch.randn(2, 6)
    before = {name: (id(p), p.shape, p.dtype, p.device, p._version) for name, p in model.named_parameters()}
    values, want = copy.deepcopy(model.state_dict()), model(x)
    places = {name: p.stride() for name, p in model.named_parameters()}
    _, off = settled(model, home)
    for name, p in model.named_parameters():
        assert (id(p), p.shape, p.dtype, p.device, p._version) == before[name]
        assert bool(p.isnan().all())
        assert p.untyped_storage().nbytes() <= 8  # no memory
        with pytest.raises(RuntimeError, match="more than one element"):
            p.mul_(2)
    assert bool(type(model).forward(model, x).isnan().any()) is False  # its parts are met, whoever calls them
    assert torch.equal(model(x), want)
    assert bool(model.enter.weight.isnan().all()) is False  # it stays until it is sent away
    off()
    assert all(torch.equal(p, values[name]) and p.stride() == places[name] for name, p in model.named_parameters())
    assert {name: id(p) for name, p in model.named_parameters()} == {name: each[0] for name, each in before.items()}
    assert "forward" not in vars(model) | vars(model.blocks[0])


def test_a_read_of_weights_that_are_away_shows() -> None:
    model, x = tower(), torch.randn(2, 6)
    _, off = settled(model)
    with mock.patch.object(Residence, "enter", return_value=None):
        assert bool(model(x).isnan().all())
    off()


def test_every_kind_of_weight_comes_back_as_it_was(home: Home) -> None:
    """Shared, overlapping, transposed, empty, of other dtypes; a scalar."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            joint = torch.randn(6, 4)
            self.joint, self.rows = nn.Parameter(joint), nn.Parameter(joint[2:4])
            self.rows.data, self.joint.data = joint[2:4], joint
            self.columns = nn.Parameter(torch.randn(3, 5).t())
            self.columns.data = torch.randn(3, 5).t()
            self.picture = nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
            self.number, self.nothing = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.empty(0, 4))
            self.short = nn.Parameter(torch.randn(3).bfloat16())
            self.whole = nn.Parameter(torch.arange(5), requires_grad=False)
            self.eight = nn.Parameter(torch.randn(7).to(torch.float8_e4m3fn), requires_grad=False)
            self.register_parameter("twin", self.short)

    model: Any = Odd()
    before = {name: (p.detach().clone(), p.stride()) for name, p in model.named_parameters()}
    _, off = settled(model, home, list)
    assert bool(model.short.isnan().all())
    off()
    for name, p in model.named_parameters():
        assert torch.equal(p.detach().view(torch.uint8) if name == "eight" else p, before[name][0].view(
            torch.uint8) if name == "eight" else before[name][0])  # fmt: skip
        assert p.stride() == before[name][1]
    assert model.rows.untyped_storage()._cdata == model.joint.untyped_storage()._cdata
    assert model.twin is model.short


def test_packed_weights_come_inside_of_what_wraps_them(home: Home) -> None:
    model, x = tower(width=16), torch.randn(2, 16)
    for block in model.blocks:
        block[0].weight = nn.Parameter(packed(block[0].weight.data, Int8Weight()), requires_grad=False)
    want, weight = model(x), model.blocks[0][0].weight
    one, off = settled(model, home, prefetch=1)
    assert model.blocks[0][0].weight is weight
    assert bool(weight.scale.isnan().all())
    assert weight.qdata.untyped_storage().nbytes() == 1
    assert torch.equal(model(x), want)
    assert one.ledger.moved_bytes >= nbytes_of(model.parameters())
    off()
    assert torch.equal(model(x), want)


def test_other_kinds_of_weights_are_refused_by_name() -> None:
    class Strange(nn.Parameter):
        pass

    model: Any = nn.Linear(2, 2, bias=False)
    model.weight = Strange(torch.ones(2, 2))
    with pytest.raises(UnsupportedError, match="kind Strange cannot come and go"):
        Image(model.parameters(), CPU)
    with pytest.raises(UnsupportedError, match="on the meta device"):
        Image(nn.Linear(2, 2, device="meta").parameters(), CPU)


def test_weights_that_were_packed_elsewhere_are_refused() -> None:
    """What wraps them says where they are, and cannot be told otherwise."""
    model: Any = nn.Linear(16, 16, bias=False)
    model.weight = nn.Parameter(packed(model.weight.data, Int8Weight()), requires_grad=False)
    with pytest.raises(UnsupportedError, match="were packed on 'cpu', and 'meta' is to compute"):
        Image(model.parameters(), torch.device("meta"))


def test_weights_that_blocks_share_stay() -> None:
    model, x = tower(), torch.randn(2, 6)
    model.blocks[2][0].weight = model.blocks[0][0].weight
    want = model(x)
    one, off = settled(model)
    assert [len(unit.group.weights) for unit in one.units] == [3, 1, 2, 1, 2]
    assert torch.equal(model(x), want)
    off()
    assert model.blocks[2][0].weight is model.blocks[0][0].weight


# what is there at a time


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_so_many_are_there_and_all_comes_ahead(home: Home, ahead: int) -> None:
    model, x = tower(count=6), torch.randn(2, 6)
    most = nbytes_of(model.enter.parameters()) + nbytes_of(model.blocks[0].parameters())
    one, off = settled(model, home, prefetch=ahead)
    watch, block = Watch(model), one.units[1].image.nbytes
    with watch.on():
        for _ in range(3):
            model(x)
    assert watch.most_bytes == most
    assert one.ledger.most_bytes == one.units[0].image.nbytes + (1 + ahead) * block
    assert one.ledger.wasted == 0
    assert one.ledger.fetches == 1 + 3 * 6 + ahead
    one.send_away()
    assert one.ledger.resident_bytes == 0
    assert one.ledger.wasted == ahead
    off()


def test_an_order_that_nobody_could_foresee_costs_waits_and_no_value(home: Home) -> None:
    model, x = tower(count=5), torch.randn(2, 6)
    orders = [[0, 1, 2, 3, 4], [4, 2, 0], [1, 1, 3], [0, 3, 0, 3], [2], [0, 1, 2, 3, 4]]
    want = [model(x) for model.order in orders]
    one, off = settled(model, home, prefetch=2)
    got = [model(x) for model.order in orders]
    assert all(map(torch.equal, got, want))
    assert one.ledger.most_bytes <= one.units[0].image.nbytes + 3 * one.units[1].image.nbytes
    off()


def test_the_order_is_learned() -> None:
    model, x = tower(count=5), torch.randn(2, 6)
    model.order = [3, 1, 4, 0, 2]
    one, off = settled(model, prefetch=1)
    for _ in range(2):
        model(x)
    one.ledger.begin()
    for _ in range(3):
        model(x)
    assert one.ledger.wasted == 0
    off()


def test_a_call_that_fails_leaves_nothing_there() -> None:
    model = tower()
    one, off = settled(model, prefetch=1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 5))
    with mock.patch.object(model.blocks[2][1], "forward", side_effect=LookupError), pytest.raises(LookupError):
        model(torch.randn(2, 6))
    one.send_away()
    assert one.ledger.resident_bytes == 0
    assert not any(unit.users for unit in one.units)
    off()


def failing_ahead(real: Any, at: int) -> Any:
    """`HostCarrier.start`, of which one call that fetches ahead finds no memory."""
    calls = [0]

    def start(self: HostCarrier, home: Home, number: int, nbytes: int, *, ahead: bool) -> Any:
        calls[0] += ahead
        if ahead and calls[0] == at:
            raise torch.OutOfMemoryError("no memory")
        return real(self, home, number, nbytes, ahead=ahead)

    return start


def by_hooks(model: Any, **more: Any) -> tuple[Residence, Callable[[], None]]:
    """As with a component that nothing else stands on."""
    one = Residence(
        model, lambda: groups_of(model, list(model.blocks)), HostHome(pinned=False), CPU, HostCarrier(), Ledger(),
        Turn(), **more,
    )  # fmt: skip
    one.settle()
    summons = Summons(one, enters=True)
    summons.install()
    return one, lambda: (summons.remove(), one.close())[1]


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("put_on", [settled, by_hooks])
def test_no_memory_for_what_comes_ahead_leaves_nothing_there(put_on: Any, at: int) -> None:
    model, x = tower(), torch.randn(2, 6)
    want = model(x)
    one, off = put_on(model, prefetch=1)
    model(x)
    one.send_away()
    with (
        mock.patch.object(HostCarrier, "start", failing_ahead(HostCarrier.start, at)),
        pytest.raises(torch.OutOfMemoryError),
    ):
        model(x)
    assert not any(unit.users for unit in one.units)
    one.send_away()
    assert one.ledger.resident_bytes == 0
    assert all(bool(p.isnan().all()) for p in model.parameters())
    with one.at_home(changes=False):
        model.state_dict()
    assert torch.equal(model(x), want)
    off()
    assert torch.equal(model(x), want)


def test_what_an_interruption_has_left_there_goes_home_before_weights_are_read() -> None:
    """torch calls no hook after one."""
    model, x = tower(), torch.randn(2, 6)
    want = model(x)
    one, off = by_hooks(model)
    with (
        mock.patch.object(type(model.blocks[1][1]), "forward", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        model.blocks[1](x)
    assert any(unit.users for unit in one.units)
    with one.at_home(changes=False):
        model.state_dict()
    assert one.ledger.resident_bytes == 0
    assert torch.equal(model(x), want)
    off()


def test_components_take_turns() -> None:
    turn, x = Turn(), torch.randn(2, 6)
    first, second, beside = tower(), tower(), tower()
    made = [settled(model, None, list, turn=turn, in_order=model is not beside) for model in (first, second, beside)]
    first(x)
    beside(x)
    second(x)
    assert bool(first.enter.weight.isnan().all())
    assert not bool(beside.enter.weight.isnan().any())
    assert not bool(second.enter.weight.isnan().any())
    turn.send_away()
    assert all(bool(p.isnan().all()) for model in (first, second, beside) for p in model.parameters())
    for _, off in made:
        off()


def test_some_weights_alone() -> None:
    """Of a block whose others stay away."""
    model = tower()
    one, off = settled(model)
    weight = model.blocks[1][0].weight
    pair = nn.ModuleList()
    pair.register_parameter("weight", weight)
    with one.present([pair]):
        assert not bool(weight.isnan().any())
        assert bool(model.blocks[1][0].bias.isnan().all())
        assert one.ledger.resident_bytes == weight.nbytes
        model(torch.randn(2, 6))  # its unit comes and goes meanwhile
        assert not bool(weight.isnan().any())
    assert bool(weight.isnan().all())
    one.send_away()
    assert one.ledger.resident_bytes == 0
    off()


# changes at home


def test_what_is_changed_at_home_is_what_comes(home: Home) -> None:
    model, x = tower(), torch.randn(2, 6)
    other = copy.deepcopy(model)
    one, off = settled(model, home)
    with one.at_home(), torch.no_grad():
        for each in (model, other):
            each.blocks[0][0].weight.data += 0.5  # in place, unseen by torch's count of changes
            each.blocks[1][0].weight.data = each.blocks[1][0].weight.data * 2
            each.blocks[2][0].bias = nn.Parameter(torch.ones(6), requires_grad=False)
            each.blocks[3] = nn.Sequential(nn.Linear(6, 6, bias=False))
            nn.init.eye_(each.blocks[3][0].weight)
    want = other(x)
    assert torch.equal(model(x), want)
    one.send_away()
    assert all(bool(p.isnan().all()) for p in model.parameters())
    assert torch.equal(model(x), want)
    off()
    assert torch.equal(model(x), want)


def test_what_is_read_at_home_stays_as_it_is(home: Home) -> None:
    model = tower()
    values = copy.deepcopy(model.state_dict())
    one, off = settled(model, home)
    with one.at_home(changes=False):
        state = model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in values.items())  # also afterwards
    assert len({x.untyped_storage().data_ptr() for x in state.values()}) == len(state)
    assert all(bool(p.isnan().all()) for p in model.parameters())
    off()
