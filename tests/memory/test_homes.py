"""What keeps weights that are away: all or nothing, and files that hold what they say and go when nobody uses them."""

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
from torch import Tensor

from parafuse.engine.offload.component import OffloadedComponent
from parafuse.engine.offload.units import groups_of
from parafuse.errors import ConfigError, MemoryLimitError
from parafuse.offload import offload_of
from parafuse.parallel import homes
from parafuse.parallel.carry import HostCarrier, Ledger
from parafuse.parallel.homes import ENDING, DiskHome, Home, HostHome, MixedHome
from parafuse.parallel.residence import Residence, Turn
from tests.memory.towers import CPU, settled, tower

# what cannot be kept


def changed(one: Residence, model: Any, by: float) -> None:
    with one.at_home():
        for p in model.parameters():
            p.data = p.data * by  # exact for powers of two


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
    with fails(), pytest.raises((RuntimeError, MemoryLimitError), match=r"cannot pin|is full"):
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
    with fails(), pytest.raises((RuntimeError, MemoryLimitError), match=r"cannot pin|is full"):
        changed(one, model, 2.0)
    want = type(model).forward(model, x)
    assert not bool(want.isnan().any())
    assert torch.equal(model(x), want)
    off()
    assert torch.equal(model(x), want)
    assert torch.equal(model.enter.weight, 2 * tower().enter.weight)


def no_buffers() -> Any:
    """What comes once weights are kept fails."""
    return mock.patch.object(Residence, "_own_buffers", side_effect=[torch.OutOfMemoryError("buffers"), [], []])


def test_what_fails_once_weights_are_kept_leaves_them_too() -> None:
    model, x = tower(), torch.randn(2, 6)
    want = model(x)
    with no_buffers(), pytest.raises(torch.OutOfMemoryError):
        settled(model)
    assert torch.equal(model(x), want)
    one, off = settled(model)
    with no_buffers(), pytest.raises(torch.OutOfMemoryError):
        changed(one, model, 1.0)
    assert torch.equal(model(x), want)
    off()
    assert torch.equal(model(x), want)


def test_a_component_that_cannot_be_offloaded_is_as_it_was() -> None:
    model, x = tower(), torch.randn(2, 6)
    want, state = model(x), set(vars(model))
    one = Residence(
        model,
        lambda: groups_of(model, list(model.blocks)),
        HostHome(pinned=False),
        CPU,
        HostCarrier(),
        Ledger(),
        Turn(),
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
    from tests.memory.towers import settled, tower
    with mock.patch.object(homes, "temporary_folder", lambda: Path(sys.argv[1])):
        kept = settled(tower(width=8), homes.DiskHome(None))
    print("there", flush=True)
    if sys.argv[2] == "waits":
        time.sleep(60)
"""


def test_a_process_that_ends_or_is_killed_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    script = textwrap.dedent(HOLDS)
    subprocess.run([sys.executable, "-c", script, str(folder), "ends"], check=True, capture_output=True, timeout=300)
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
        with (
            mock.patch.object(homes.os, "getuid", return_value=os.getuid() + 1),
            pytest.raises(ConfigError, match=says),
        ):
            DiskHome(None)
        for mode in (0o770, 0o702):
            own.chmod(mode)
            with pytest.raises(ConfigError, match=says):
                DiskHome(None)
        own.chmod(0o755)
        DiskHome(None)
    with mock.patch.object(homes, "temporary_folder", return_value=link), pytest.raises(ConfigError, match=says):
        DiskHome(None)


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
