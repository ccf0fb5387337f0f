"""The harness itself: a test that should fail must fail, in time, and say which rank did what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.dist.ranks import RankFailure, run_ranks


def gather_sum(offset: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), total


def process_id() -> int:
    return os.getpid()


def settings() -> list[str | None]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    return [*(os.environ.get(name) for name in names), str(torch.get_num_threads())]


def noise() -> float:
    return torch.rand(()).item()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the fault of rank 1")
    dist.barrier()


def nap_on_rank_0(seconds: float) -> None:
    if dist.get_rank() == 0:
        time.sleep(seconds)


def leave_on_rank_1(code: int) -> None:
    if dist.get_rank() == 1:
        os._exit(code)


def crash_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGSEGV)


def unpicklable() -> object:
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_by_rank(world_size: int) -> None:
    offset = torch.tensor([1.0, 2.0])
    results = run_ranks(gather_sum, world_size, offset)
    expected = world_size * offset + sum(range(world_size))
    assert [rank for rank, _ in results] == list(range(world_size))
    assert all(torch.equal(total, expected) for _, total in results)


def test_processes_are_used_again_and_are_not_ours() -> None:
    first = run_ranks(process_id, 2)
    assert run_ranks(process_id, 2) == first
    assert len({*first, os.getpid()}) == 3


def test_ranks_have_one_thread_and_a_launchers_environment() -> None:
    assert run_ranks(settings, 2) == [["0", "0", "2", "1", "1", "1"], ["1", "1", "2", "1", "1", "1"]]


def test_every_call_starts_from_the_same_seed() -> None:
    assert len({*run_ranks(noise, 2), *run_ranks(noise, 2)}) == 1


def test_a_rank_that_raises_fails_the_call_and_the_next_call_works() -> None:
    before = run_ranks(process_id, 2)
    start = time.monotonic()
    with pytest.raises(RankFailure, match="1 of 2 ranks failed: rank 1: ValueError: the fault of rank 1") as caught:
        run_ranks(fail_on_rank_1, 2)
    assert time.monotonic() - start < 15
    assert "in fail_on_rank_1" in caught.value.reports[1]
    assert "still running" in caught.value.reports[0]
    assert "barrier" in caught.value.reports[0]  # the stack says where the other rank waits
    assert set(before).isdisjoint(run_ranks(process_id, 2))


def test_a_rank_that_stalls_fails_the_call_at_its_deadline() -> None:
    run_ranks(process_id, 2)
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"ranks \[0\] did not finish within 1 s") as caught:
        run_ranks(nap_on_rank_0, 2, 600.0, timeout_s=1.0)
    assert time.monotonic() - start < 15
    assert "nap_on_rank_0" in caught.value.reports[0]
    assert caught.value.reports[1] == "finished"


def test_a_rank_that_dies_fails_the_call() -> None:
    with pytest.raises(RankFailure, match="rank 1: died: exit 3"):
        run_ranks(leave_on_rank_1, 2, 3)


def test_a_crash_shows_its_stack() -> None:
    with pytest.raises(RankFailure, match="rank 0: died: exit -11") as caught:
        run_ranks(crash_on_rank_0, 2)
    assert "Segmentation fault" in caught.value.reports[0]
    assert "in crash_on_rank_0" in caught.value.reports[0]


def test_a_result_that_cannot_travel_is_a_failure() -> None:
    with pytest.raises(RankFailure, match="pickle"):
        run_ranks(unpicklable, 1)


def test_only_module_level_functions() -> None:
    with pytest.raises(TypeError, match="must be a module-level function"):
        run_ranks(lambda: None, 2)


def test_ranks_die_with_a_parent_that_is_killed() -> None:
    program = (
        "import os, signal\n"
        "from tests.dist.ranks import run_ranks\n"
        "from tests.dist.test_ranks import process_id\n"
        "print(*run_ranks(process_id, 2), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    end = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < end, f"of the ranks {pids} one lives on"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
