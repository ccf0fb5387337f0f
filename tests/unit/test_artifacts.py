"""What was compiled is kept whole or not at all, in a folder that nobody else can write, and in bounded space."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from parafuse import hardware
from parafuse.config import Axis
from parafuse.engine import artifacts
from parafuse.engine.plan import Plan

PLAN = Plan(
    model="emoji", model_id="1", world_size=1, degrees={str(axis): 1 for axis in Axis}, device="cpu", dtype="float32",
    timeout_s=60.0, compile=True,
)  # fmt: skip


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are kept; a stand-in for torch packs names and takes all that it gets."""
    monkeypatch.setenv("PARAFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(artifacts, "unpack", lambda data: data.startswith(b"PK"))
    return tmp_path / "compiled"


def packing(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str, size: int = 10) -> None:
    file = folder.parent / "packed.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("names.json", json.dumps(names))
        archive.writestr("artifacts", b"x" * size)
    data = file.read_bytes()
    monkeypatch.setattr(artifacts, "pack", lambda: (data, sorted(names)))


def test_what_is_kept_is_found_by_the_same_plan_alone(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert artifacts.load(PLAN) == "none"
    packing(monkeypatch, kept, "a")
    artifacts.save(PLAN)
    artifacts.save(PLAN)
    assert artifacts.load(PLAN) == "1 files"
    assert [file.stat().st_mode & 0o777 for file in (kept, *kept.iterdir())] == [0o700, 0o600]
    others = [
        replace(PLAN, model_id="2"),
        replace(PLAN, dtype="bfloat16"),
        replace(PLAN, cache="first-block:0.1"),
    ]
    assert [artifacts.load(plan) for plan in others] == ["none"] * 3
    assert artifacts.load(replace(PLAN, timeout_s=9.0, why="another reason")) == "1 files"
    monkeypatch.setattr(artifacts, "versions", lambda: {"torch": "9.9"})
    assert artifacts.load(PLAN) == "none"


def test_what_others_may_have_written_is_not_used(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packing(monkeypatch, kept, "a")
    artifacts.save(PLAN)
    file = next(kept.iterdir())
    file.chmod(0o660)
    assert artifacts.load(PLAN) == "none"
    file.chmod(0o600)
    assert artifacts.load(PLAN) == "1 files"
    kept.chmod(0o777)
    assert artifacts.load(PLAN) == "not used: others may write there"
    packing(monkeypatch, kept, "a", "b")
    artifacts.save(PLAN)
    assert list(kept.iterdir()) == [file]
    kept.chmod(0o700)
    monkeypatch.setattr(artifacts.os, "getuid", lambda: -1)
    assert artifacts.load(PLAN) == "not used: belongs to another user"


def test_space_is_bounded(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for names in ("a", "b", "bc"):
        packing(monkeypatch, kept, *names, size=1000)
        artifacts.save(PLAN)
    assert len(list(kept.iterdir())) == 2  # b and c have what b had alone
    monkeypatch.setattr(artifacts, "MAX_FOLDER_BYTES", 1500)
    packing(monkeypatch, kept, "d", size=1000)
    artifacts.save(PLAN)
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr(artifacts, "MAX_FILE_BYTES", 500)
    packing(monkeypatch, kept, "e", size=1000)
    artifacts.save(PLAN)
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setenv("PARAFUSE_CACHE", "")
    artifacts.save(PLAN)
    assert artifacts.load(PLAN) == "none"


def test_a_broken_file_stops_no_start(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packing(monkeypatch, kept, "a", size=1)
    artifacts.save(PLAN)
    file = next(kept.iterdir())
    packed = kept.parent / "deflated.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("names.json", "instructions.json", "artifacts"):
            archive.writestr(name, json.dumps([str(i) for i in range(500)]))
    whole, kinds = packed.read_bytes(), set[bool]()
    monkeypatch.undo()
    monkeypatch.setenv("PARAFUSE_CACHE", str(kept.parent))
    for place in range(0, len(whole) - 1, 37):  # one byte is another
        broken = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        kinds.add(artifacts.unpack(broken))
        file.write_bytes(broken)
        artifacts._tidy(kept, artifacts.key_of(PLAN), file.with_name("new.zip"), {"a"})
        assert artifacts.load(PLAN) == "none"
    assert kinds == {False}


def test_files_that_another_rank_takes_away_meanwhile(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packing(monkeypatch, kept, "a")
    artifacts.save(PLAN)
    plain = Path.glob

    def glob(self: Path, pattern: str) -> list[Path]:
        found = list(plain(self, pattern))
        for file in found:
            file.unlink()
        return found

    monkeypatch.setattr(Path, "glob", glob)
    assert artifacts.load(PLAN) == "none"
    packing(monkeypatch, kept, "b")
    artifacts.save(PLAN)
    assert artifacts.load(PLAN) == "none"

    def fails() -> None:
        raise FileNotFoundError("a source is gone")

    monkeypatch.setattr(artifacts, "pack", fails)
    artifacts.save(PLAN)


def test_what_is_made_for_another_processor_is_not_found(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = "processor : 0\nmodel name : Some CPU\nflags : fpu avx2{}\ncpu MHz : {}\n\nprocessor : 1\n"
    keys = list[str]()
    for more, clock in (("", 2600), ("", 2601), (" avx512f", 2600), (" sse4a", 2600)):
        text = facts.format(more, clock)
        monkeypatch.setattr(hardware, "_read", lambda _, text=text: text)
        keys.append(artifacts.key_of(PLAN))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_a_file_cannot_place_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_cache_dir", lambda: tmp_path / "torch")
    library = f"ab/c{'0' * 51}.main.so"
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for name in (library, f"../{'0' * 30}.so", "ab/short.so", f"ab/{'0' * 30}.py"):
            archive.writestr(f"libraries/{name}", b"code")
        archive.writestr("instructions.json", "[]")
        archive.writestr("artifacts", b"nothing")
    assert not artifacts.unpack(packed.read_bytes())
    assert [file.relative_to(tmp_path / "torch").as_posix() for file in tmp_path.rglob("*.*so")] == [library]
    assert not artifacts.unpack(b"no archive")
