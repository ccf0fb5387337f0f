"""Two ranks of one thread each on this machine, for benchmarks that compare them with one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Measure = Callable[[str, int], dict[str, Any]]
"""(name of what is measured, rank) -> figures."""


def _rank_main(rank: int, port: int, measure: Measure, names: list[str], queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in names:
        queue.put((rank, name, measure(name, rank)))
        dist.barrier()
    dist.destroy_process_group()


def on_two_ranks(measure: Measure, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Name -> the figures of both ranks."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    processes = [
        context.Process(target=_rank_main, args=(rank, port, measure, names, queue), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    results = sorted((queue.get(timeout=600) for _ in range(2 * len(names))), key=lambda r: r[0])
    for process in processes:
        process.join()
    return {name: [figures for _, found, figures in results if found == name] for name in names}
