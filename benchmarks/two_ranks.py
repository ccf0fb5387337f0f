"""Two ranks of one thread each on this machine, for benchmarks that compare them with one."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Measure = Callable[[str, int], dict[str, Any]]
"""(name of what is measured, rank) -> figures."""


OF_CEILING = 0.93
"""Of what two processes reach here that exchange nothing: as good as a goal that the machine is too small for."""


@dataclass(frozen=True)
class Scaling:
    """Medians of interleaved rounds, in seconds: on one rank, on two, and on both at once without any exchange."""

    one: float
    two: float
    alone: float
    goal: float
    """The wanted ratio, or a share of the ceiling where that is less."""
    spread: float
    """Of the samples on one rank: the largest over the smallest."""

    @classmethod
    def of(cls, both: list[dict[str, Any]], wanted: float, share: float = OF_CEILING) -> Scaling:
        """Of the `samples` of both ranks."""

        def slower(kind: str) -> float:
            return statistics.median(max(pair) for pair in zip(*(b["samples"][kind] for b in both), strict=True))

        one: list[float] = both[0]["samples"]["one"]
        middle, two, alone = statistics.median(one), slower("two"), slower("independent")
        return cls(middle, two, alone, min(wanted, share * 2 * middle / alone), max(one) / min(one))

    @property
    def ratio(self) -> float:
        return self.one / self.two

    @property
    def ceiling(self) -> float:
        return 2 * self.one / self.alone

    def __str__(self) -> str:
        return (
            f"1 rank {self.one * 1e3:.1f} ms, 2 ranks {self.two * 1e3:.1f} ms: {self.ratio:.2f}x "
            f"(ceiling {self.ceiling:.2f}x, goal {self.goal:.2f}x)"
        )


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
