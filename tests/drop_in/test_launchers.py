"""torchrun and the command line together: two nodes, and several engines that share the ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import parafuse
from parafuse.errors import RankError
from parafuse.parallel import world
from parafuse.parallel.ranks import free_port
from tests.dist.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--steps", "2", "--width", "64", "--height", "64", "--seed", "7"]
CALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 7}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_two_nodes_under_torchrun(tmp_path: Path) -> None:
    """On each node LOCAL_RANK is 0: only RANK tells who writes the picture."""
    port = free_port()
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nodes = []
    for node in range(2):
        out = tmp_path / f"node{node}" / "apple.png"
        out.parent.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
        command += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += ["-m", "parafuse", "generate", "a red apple", *SMALL, "--ulysses", "2", "--out", str(out)]
        nodes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        said = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "apple.png" in said[0]
    assert "apple.png" not in said[1]
    painted = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert painted == ["node0/apple.png"]
    alone = np.asarray(parafuse.Engine.from_pretrained("emoji")("a red apple", **CALL).images[0]).astype(int)
    assert np.abs(pixels(tmp_path / "node0" / "apple.png") - alone).max() <= 1


def test_a_rank_whose_rank_0_never_comes_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a second node, when the first one has refused its arguments."""
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world, "AGREE_S", 1.0)
    begun = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1: rank 0 was not at 127.0.0.1:\d+ within 1 s"):
        world.ensure_world("cpu", 300.0)
    assert time.monotonic() - begun < 30
    assert not torch.distributed.is_initialized()


def several_engines() -> dict[str, Any]:
    def paint(engine: parafuse.Engine) -> np.ndarray:
        return np.asarray(engine("a red apple", **CALL).images[0]).astype(int)

    ulysses = parafuse.Engine.from_pretrained("emoji", parafuse.Config(parallel=parafuse.Parallel(ulysses=2)))
    ring = parafuse.Engine.from_pretrained("emoji", parafuse.Config(parallel=parafuse.Parallel(ring=2)))
    first = [paint(engine) for engine in (ulysses, ring, ulysses, ring)]
    counts = {
        "ulysses": {name for name, count in ulysses.handle.exchanged().items() if count.calls},
        "ring": {name for name, count in ring.handle.exchanged().items() if count.calls},
    }
    ulysses.close()
    after = paint(ring)
    ring.close()
    return {"first": first, "after": after, "counts": counts, "initialized": torch.distributed.is_initialized()}


def test_several_engines_share_the_ranks_of_a_launcher() -> None:
    alone = np.asarray(parafuse.Engine.from_pretrained("emoji")("a red apple", **CALL).images[0]).astype(int)
    for seen in run_ranks(several_engines, 2, timeout_s=120):
        for picture in [*seen["first"], seen["after"]]:
            assert np.abs(picture - alone).max() <= 1
        assert "ring.ring" in seen["counts"]["ring"]
        assert "ulysses.all_to_all" in seen["counts"]["ulysses"]
        assert seen["initialized"]  # the launcher's own group is not the engines' to end


ONE_AFTER_ANOTHER = """
import time, torch, parafuse
call = {"num_inference_steps": 1, "width": 64, "height": 64, "seed": 7, "output_type": "np"}
config = parafuse.Config(parallel=parafuse.Parallel(ulysses=2), timeout_s=60)
pictures = []
for number in range(3):
    with parafuse.Engine.from_pretrained("emoji", config) as engine:
        pictures.append(engine("a red apple", **call).images)
        rank = engine.rank
    assert not torch.distributed.is_initialized()
    time.sleep(number * rank)  # one of them is first, then the other
assert all((one == pictures[0]).all() for one in pictures)
"""


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("agent", [True, False])
def test_engines_one_after_another(tmp_path: Path, agent: bool) -> None:
    """Each ends its group of ranks, and the next one makes another, at torchrun's store or at rank 0's own."""
    script = tmp_path / "script.py"
    script.write_text(ONE_AFTER_ANOTHER)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if agent:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        starts = [(command, env)]
    else:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        command = [sys.executable, str(script)]
        starts = [(command, env | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    ranks = [
        subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command, own in starts
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), said
