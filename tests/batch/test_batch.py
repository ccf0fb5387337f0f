"""`parafuse batch` as its user runs it: two replicas of one rank on this machine, killed, begun again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

import parafuse
from parafuse.errors import ConfigError
from parafuse.launch.batch import command
from parafuse.launch.cluster import room_for

STEPS = 8
PATIENCE_S = 240.0


def start(file: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    asked = [sys.executable, "-m", "parafuse", "batch", str(file), "--out", str(out), *options]
    return subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    told, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, told


def until(check: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := check()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def children(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Those below a command that are called so."""
    found: list[psutil.Process] = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            found += [one] if any(name in word for word in one.cmdline()) else []
        except psutil.Error:
            continue
    return found


def results_of(out: Path) -> dict[int, dict[str, Any]]:
    return {one["line"]: one for one in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def is_whole(out: Path, number: int) -> bool:
    return len(list(out.glob("0*/*.json"))) >= number


def test_lines_are_painted_once_though_replicas_are_killed(tmp_path: Path) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    lines: list[Any] = [{"prompt": "a red apple", "steps": STEPS, "id": f"n{i}"} for i in range(12)]
    lines[3], lines[5] = {"prompt": "x", "sted": 1}, {"prompt": "two", "steps": 2, "n": 2, "seed": 40}
    file.write_text("\n".join([*map(json.dumps, lines[:7]), "", *map(json.dumps, lines[7:])]))
    first = start(file, out, "--replicas", "2")
    until(lambda: is_whole(out, 2))
    killed = children(first, "ray::MapWorker")[0]
    ranks = {one.pid for one in children(first, "serve.rank")}
    killed.send_signal(signal.SIGKILL)
    until(lambda: is_whole(out, 4))
    ranks |= {one.pid for one in children(first, "serve.rank")}
    os.kill(first.pid, signal.SIGKILL)  # the whole of it, as on a machine that is switched off
    first.communicate(timeout=PATIENCE_S)
    until(lambda: not any(map(psutil.pid_exists, ranks)))
    made = {path: path.stat().st_mtime_ns for path in out.glob("0*/*.json")}

    code, told = ended(start(file, out, "--replicas", "2"))
    assert code == 1, told
    assert "parafuse: line 4: sted: there is no such field; did you mean 'seed'?" in told
    assert f"12 lines, {len(made)} of them done already" in told
    assert "11 of 12 lines done (1 wrong)" in told
    assert all(path.stat().st_mtime_ns == when for path, when in made.items()), "what is done is not painted again"
    found = results_of(out)
    assert sorted(found) == [1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13]
    assert [found[number]["id"] for number in (1, 13)] == ["n0", "n11"]
    assert (len(found[6]["files"]), found[6]["seed"], found[13]["seed"]) == (2, 40, 13)
    with parafuse.Engine.from_pretrained("emoji", alone=True) as engine:
        alone = engine("a red apple", seed=13, num_inference_steps=STEPS).images[0]
    with Image.open(out / found[13]["files"][0]) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(alone))

    file.write_text(file.read_text().replace('"sted": 1', '"steps": 2'))
    code, told = ended(start(file, out))
    assert (code, "12 of 12 lines done:" in told) == (0, True), told
    assert len(list(out.glob("0*/*.json"))) == 12
    again = start(file, out)
    assert (ended(again)[0], children_left(again)) == (0, [])


def children_left(process: subprocess.Popen[str]) -> list[int]:
    return [one.pid for one in psutil.process_iter() if one.ppid() == process.pid]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--replicas", "0"], "--replicas 0: must be at least 1"),
        (["--model", "emojy"], "did you mean 'emoji'"),
        (["--loras", "/nowhere"], "--loras '/nowhere': is no folder"),
        (["--ranks", "2", "--cfg", "3"], "parallel"),
    ],
)
def test_what_is_wrong_is_refused_before_ray_starts(tmp_path: Path, options: list[str], said: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}')
    code, told = ended(start(file, tmp_path / "out", *options))
    assert (code, told.count("\n")) == (2, 1), told
    assert said in told
    assert not (tmp_path / "out").exists()


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    code, told = ended(start(tmp_path / "none", tmp_path / "out"))
    assert (code, "is no file" in told) == (2, True)
    (tmp_path / "empty").write_text("\n\n")
    code, told = ended(start(tmp_path / "empty", tmp_path / "out"))
    assert (code, "has no lines" in told) == (2, True), told


def test_a_cluster_that_is_too_small_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}')
    code, told = ended(start(file, tmp_path / "out", "--replicas", "4096"))
    assert (code, "--replicas 4096: the cluster has CPUs for" in told) == (2, True), told


@pytest.mark.parametrize(
    ("machines", "replicas", "said"),
    [
        ([4, 2], 1, "--ranks 3: a replica needs 6 GPUs of one machine, and the largest has 4"),
        ([8, 4, 13], 4, "--replicas 4: the cluster has GPUs for 3 of 6"),
        ([8, 4, 13], 3, ""),
        ([], 1, "the largest has 0"),
    ],
)
def test_replicas_are_counted_by_machine(
    monkeypatch: pytest.MonkeyPatch, machines: list[int], replicas: int, said: str
) -> None:
    import ray

    nodes = [{"Alive": True, "Resources": {"GPU": float(number)}} for number in machines]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"GPU": 99.0}}])
    if said:
        with pytest.raises(ConfigError, match=said):
            room_for("cuda", 6, replicas=replicas, ranks=3)
    else:
        assert room_for("cuda", 6, replicas=replicas, ranks=3) == {"num_gpus": 6}


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "NEEDED", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"needs no_such_package; pip install 'parafuse\[batch\]'"):
        command.check_packages()
