"""Weights that come and go: where they are, what stands for them meanwhile, and what a home keeps."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from parafuse.engine.offload.component import OffloadedComponent, RootCalls, Summons, UnitCalls
from parafuse.engine.offload.units import groups_of
from parafuse.engine.quantize.pack import packed
from parafuse.errors import ConfigError, MemoryLimitError, UnsupportedError
from parafuse.offload import offload_of
from parafuse.parallel import homes
from parafuse.parallel.carry import HostCarrier, Ledger
from parafuse.parallel.homes import ENDING, DiskHome, Home, HostHome, MixedHome
from parafuse.parallel.image import Image, nbytes_of
from parafuse.parallel.residence import Residence, Turn
from parafuse.quantization import Int8Weight
from tests.memory.watch import Watch

CPU = torch.device("cpu")


class Tower(nn.Module):
    """Blocks in an order that its caller chooses."""

    def __init__(self, count: int = 4, width: int = 6) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(count)])
        self.order = list(range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for number in self.order:
            x = self.blocks[number](x)
        return x


def tower(**sizes: int) -> Any:
    torch.manual_seed(0)
    return Tower(**sizes).eval().requires_grad_(False)


def settled(
    model: Any, home: Home | None = None, modules: Callable[[], list[nn.Module]] | None = None, **more: Any
) -> tuple[Residence, Callable[[], None]]:
    """A residence with its blocks (or `modules`) as units, and what takes it off again."""
    modules = modules or (lambda: list(model.blocks))
    one = Residence(
        model, lambda: groups_of(model, modules()), home or HostHome(pinned=False), CPU, HostCarrier(), Ledger(),
        more.pop("turn", Turn()), **more,
    )  # fmt: skip
    one.settle()
    standing = [Summons(one, enters=False, quiet=modules()), UnitCalls(one), RootCalls(one, checks=False)]
    for each in standing:
        each.install()

    def off() -> None:
        for each in reversed(standing):
            each.remove()
        one.close()

    return one, off


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


# what cannot be kept


def pinning_fails(at: int) -> Any:
    """Memory of a home that is there for some images only."""
    real, calls = torch.empty, [0]

    def empty(*size: Any, **more: Any) -> Tensor:
        calls[0] += "pin_memory" in more
        if "pin_memory" in more and calls[0] == at:
            raise RuntimeError("cannot pin memory")
        return real(*size, **more)

    return mock.patch.object(homes.torch, "empty", empty)


def full_disk() -> Any:
    return mock.patch.object(DiskHome, "_write", side_effect=MemoryLimitError("the disk is full"))


def mixed(folder: Path, order: tuple[str, str]) -> Home:
    made = {"cpu": HostHome(pinned=False), "disk": DiskHome(str(folder))}
    return MixedHome({name: made[name] for name in order}, lambda: ["cpu", "disk", "cpu", "disk", "cpu"])


FAILURES: dict[str, tuple[Callable[[Path], Home], Callable[[], Any]]] = {
    "the third image on the host": (lambda _: HostHome(pinned=False), lambda: pinning_fails(3)),
    "the disk after the host": (lambda folder: mixed(folder, ("cpu", "disk")), full_disk),
    "the host after the disk": (lambda folder: mixed(folder, ("disk", "cpu")), lambda: pinning_fails(2)),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_kept_leaves_the_module_as_it_was(failure: str, tmp_path: Path) -> None:
    model, x = tower(), torch.randn(2, 6)
    want, values = model(x), copy.deepcopy(model.state_dict())
    make, fails = FAILURES[failure]
    with fails(), pytest.raises((RuntimeError, MemoryLimitError), match="cannot pin|is full"):
        settled(model, make(tmp_path))
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert torch.equal(model(x), want)
    _, off = settled(model, make(tmp_path))
    off()
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("failure", FAILURES)
def test_after_a_change_it_stays_in_memory(failure: str, tmp_path: Path) -> None:
    model, x = tower(), torch.randn(2, 6)
    make, fails = FAILURES[failure]
    one, off = settled(model, make(tmp_path))
    with pytest.raises((RuntimeError, MemoryLimitError), match="cannot pin|is full"), one.at_home():
        for p in model.parameters():
            p.data = p.data + 1
        want = type(model).forward(model, x)
        failing = fails()
        failing.start()
    failing.stop()
    assert torch.equal(model(x), want)
    off()
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("early", [True, False])
def test_what_fails_once_weights_are_kept(early: bool) -> None:
    model, x = tower(), torch.randn(2, 6)
    want = model(x)
    one, off = settled(model) if not early else (mock.Mock(), lambda: None)
    with (
        mock.patch.object(Residence, "_own_buffers", side_effect=[torch.OutOfMemoryError("buffers"), [], []]),
        pytest.raises(torch.OutOfMemoryError),
    ):
        if early:
            settled(model)
        else:
            with one.at_home():
                pass
    assert torch.equal(model(x), want)
    off()
    assert torch.equal(model(x), want)


def test_a_component_that_cannot_be_offloaded_is_as_it_was() -> None:
    model, x = tower(), torch.randn(2, 6)
    want, state = model(x), set(vars(model))
    one = Residence(
        model, lambda: groups_of(model, list(model.blocks)), HostHome(pinned=False), CPU, HostCarrier(), Ledger(), Turn()
    )
    method = offload_of("group:to=disk")
    assert method is not None
    component = OffloadedComponent("transformer", model, method, one)
    with (
        mock.patch("parafuse.engine.offload.component.override", side_effect=LookupError("later")),
        pytest.raises(LookupError),
    ):
        component.install()
    assert set(vars(model)) == state
    assert torch.equal(model(x), want)


# files


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != homes.LOCK)


def test_the_same_weights_have_one_file_and_a_named_folder_keeps_it(tmp_path: Path) -> None:
    offs = [settled(tower(), DiskHome(str(tmp_path)))[1] for _ in range(2)]
    assert len(files(tmp_path)) == 1
    for off in offs:
        off()
    (name,) = files(tmp_path)
    written = (tmp_path / name).stat().st_mtime_ns
    model, x = tower(), torch.randn(2, 6)
    want = model(x)
    _, off = settled(model, DiskHome(str(tmp_path)))
    assert (tmp_path / name).stat().st_mtime_ns == written
    assert torch.equal(model(x), want)
    off()


def test_a_temporary_file_goes_with_the_last_that_uses_it(tmp_path: Path) -> None:
    with mock.patch.object(homes, "temporary_folder", return_value=tmp_path / "own"):
        first, second = (settled(tower(), DiskHome(None))[1] for _ in range(2))
        first()
        assert len(files(tmp_path / "own")) == 1
        second()
        assert files(tmp_path / "own") == []


HOLDS = """
    import sys, time
    from unittest import mock
    from pathlib import Path
    from parafuse.parallel import homes
    from tests.memory.test_residence import settled, tower
    with mock.patch.object(homes, "temporary_folder", lambda: Path(sys.argv[1])):
        kept = settled(tower(width=8), homes.DiskHome(None))
    print("there", flush=True)
    if sys.argv[2] == "waits":
        time.sleep(60)
"""


def test_a_process_that_ends_or_is_killed_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    script = textwrap.dedent(HOLDS)
    subprocess.run([sys.executable, "-c", script, str(folder), "ends"], check=True, capture_output=True, timeout=120)
    assert files(folder) == []
    with subprocess.Popen([sys.executable, "-c", script, str(folder), "waits"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        assert len(files(folder)) == 1
        with mock.patch.object(homes, "temporary_folder", return_value=folder):
            _, off = settled(tower(), DiskHome(None))
            off()
            assert len(files(folder)) == 1  # somebody uses it
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)
            assert len(files(folder)) == 1
            _, off = settled(tower(), DiskHome(None))
            off()
    assert files(folder) == []


def test_a_full_disk_is_said_with_the_numbers_and_nothing_is_changed(tmp_path: Path) -> None:
    model, x = tower(), torch.randn(2, 6)
    want = model(x)
    full = mock.Mock(f_bavail=1, f_frsize=512)
    with (
        mock.patch.object(homes.os, "statvfs", return_value=full),
        pytest.raises(ConfigError, match=r"needs 0\.000 GB, and the disk has 0\.000 GB free; give folder="),
    ):
        settled(model, DiskHome(str(tmp_path)))
    assert torch.equal(model(x), want)
    with (
        mock.patch.object(homes, "_bytes", side_effect=[b"a"] * 10 + [OSError(errno.ENOSPC, "full")] * 10),
        pytest.raises(MemoryLimitError, match="the disk has no more"),
    ):
        settled(model, DiskHome(str(tmp_path)))
    assert files(tmp_path) == []
    assert torch.equal(model(x), want)


def test_a_file_that_holds_something_else_is_written_anew(tmp_path: Path) -> None:
    """Of the right name and size."""
    model, x = tower(), torch.randn(2, 6)
    want, values = model(x), copy.deepcopy(model.state_dict())
    settled(tower(), DiskHome(str(tmp_path)))[1]()
    (path,) = tmp_path.glob(f"*{ENDING}")
    right = path.read_bytes()
    for at in (0, homes.PAGE):  # of the first image, and of the second
        path.write_bytes(right[:at] + bytes(64) + right[at + 64 :])
        with mock.patch.object(homes, "note") as note:
            _, off = settled(model, DiskHome(str(tmp_path)))
        assert "is not what was written to it once" in note.call_args[0][0]
        assert torch.equal(model(x), want)
        off()
        assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
        assert path.read_bytes() == right
        assert files(tmp_path) == [path.name]


def test_a_temporary_file_that_holds_something_else_and_is_used_meanwhile(tmp_path: Path) -> None:
    model, x = tower(), torch.randn(2, 6)
    want = model(x)
    with mock.patch.object(homes, "temporary_folder", return_value=tmp_path / "own"):
        _, first = settled(tower(), DiskHome(None))
        (path,) = (tmp_path / "own").glob(f"*{ENDING}")
        path.write_bytes(bytes(path.stat().st_size))
        _, off = settled(model, DiskHome(None))
        assert torch.equal(model(x), want)
        first()
        off()
        assert files(tmp_path / "own") == []


def test_a_file_that_stays_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append("fsync")
        sync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        done.append("replace")
        return replace(self, target)

    with mock.patch.object(homes.os, "fsync", synced), mock.patch.object(Path, "replace", replaced):
        settled(tower(), DiskHome(str(tmp_path)))[1]()
    assert done == ["fsync", "replace"]


def test_a_temporary_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(own)
    says = "not a folder that this user alone can write to"
    with mock.patch.object(homes, "temporary_folder", return_value=own):
        DiskHome(None)
        with mock.patch.object(homes.os, "getuid", return_value=os.getuid() + 1), pytest.raises(ConfigError, match=says):
            DiskHome(None)
        for mode in (0o770, 0o702):
            own.chmod(mode)
            with pytest.raises(ConfigError, match=says):
                DiskHome(None)
        own.chmod(0o755)
        DiskHome(None)
    with mock.patch.object(homes, "temporary_folder", return_value=link), pytest.raises(ConfigError, match=says):
        DiskHome(None)


def changed(one: Residence, model: Any, by: float) -> None:
    with one.at_home():
        model.enter.weight.data = model.enter.weight.data * by  # exact for powers of two


def test_changes_leave_no_files_in_a_named_folder(tmp_path: Path) -> None:
    model, x = tower(), torch.randn(2, 6)
    one, off = settled(model, DiskHome(str(tmp_path)))
    (first,) = files(tmp_path)
    written = (tmp_path / first).stat().st_mtime_ns
    for _ in range(3):
        for by in (2.0, 2.0):
            changed(one, model, by)
            want = type(model).forward(model, x)
            assert len(files(tmp_path)) == 2
            assert first in files(tmp_path)
            assert torch.equal(model(x), want)
            one.send_away()
        changed(one, model, 0.25)
        assert files(tmp_path) == [first]
    changed(one, model, 8.0)
    off()
    assert files(tmp_path) == [first]
    settled(tower(), DiskHome(str(tmp_path)))[1]()
    assert (tmp_path / first).stat().st_mtime_ns == written


def test_what_another_one_uses_stays_until_it_lets_go(tmp_path: Path) -> None:
    models = [tower(), tower()]
    made = [settled(model, DiskHome(str(tmp_path))) for model in models]
    (first,) = files(tmp_path)
    for model, (one, _) in zip(models, made, strict=True):
        changed(one, model, 2.0)
    assert len(files(tmp_path)) == 2
    x = torch.randn(2, 6)
    want = models[1](x)
    changed(made[0][0], models[0], 0.5)
    assert len(files(tmp_path)) == 2
    made[1][0].send_away()
    assert torch.equal(models[1](x), want)
    made[0][1]()
    assert len(files(tmp_path)) == 2
    made[1][1]()
    assert files(tmp_path) == [first]


def test_what_a_killed_process_has_left_goes_and_files_of_others_stay(tmp_path: Path) -> None:
    name = "0123456789abcdef" * 2
    gone = [f"{name}.changed{ENDING}", f"{name}.17.part", f"{name}.changed.17.part"]
    stay = [f"{name}{ENDING}", f"my{ENDING}", "film.17.part", "film.part", f"my.changed{ENDING}"]
    for each in (*gone, *stay):
        (tmp_path / each).write_text("")
    DiskHome(str(tmp_path))
    assert files(tmp_path) == sorted(stay)
    with mock.patch.object(homes, "temporary_folder", return_value=tmp_path):
        tmp_path.chmod(0o700)
        DiskHome(None)
    assert files(tmp_path) == sorted(stay[1:])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        DiskHome(str(file / "folder"))


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    model = tower()
    _, off = settled(model, DiskHome(str(tmp_path)), prefetch=1)
    (path,) = tmp_path.glob(f"*{ENDING}")
    before = path.read_bytes()
    os.truncate(path, 100)
    with pytest.raises(MemoryLimitError, match="is shorter than it was"):
        model(torch.randn(2, 6))
    path.write_bytes(before)
    assert not bool(model(torch.randn(2, 6)).isnan().any())
    off()


def test_what_fails_to_be_kept_after_a_change_stays_in_memory(tmp_path: Path) -> None:
    model, x = tower(), torch.randn(2, 6)
    one, off = settled(model, DiskHome(str(tmp_path)))
    with (
        mock.patch.object(DiskHome, "_write", side_effect=MemoryLimitError("full")),
        pytest.raises(MemoryLimitError),
        one.at_home(),
    ):
        model.enter.weight.data += 1
    assert not bool(model(x).isnan().any())
    want = model(x)
    off()
    assert torch.equal(model(x), want)
