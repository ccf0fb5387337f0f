"""The default process group: made from the launcher's environment, with finite timeouts, and checked for agreement."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from parafuse.errors import ConfigError, RankError


def world_from_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as the launcher gave them: RANK, LOCAL_RANK, WORLD_SIZE; (0, 0, 1) without."""
    return tuple(int(os.environ.get(name, default)) for name, default in _NAMES)  # type: ignore[return-value]


_NAMES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def ensure_world(device: str, timeout_s: float) -> None:
    """Makes the default process group unless there is one. Every rank must call it.

    gloo for the CPU, NCCL for CUDA (with gloo beside it for host messages); `timeout_s` bounds every exchange."""
    if dist.is_initialized():
        return
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "no launcher: start the ranks with torchrun (or `parafuse generate --ranks N`, or parafuse.Engine), "
            "or call torch.distributed.init_process_group first."
        )
    _, local_rank, _ = world_from_environment()
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def agree(topic: str, value: str, timeout_s: float = 60.0) -> None:
    """Raises RankError on every rank when they do not all say the same, naming those that differ.

    Compared through the store, before any collective: a rank that never comes is named after `timeout_s`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()  # pyright: ignore
    rank, size = dist.get_rank(), dist.get_world_size()
    store.set(f"parafuse/{topic}/{rank}", value)
    said: dict[int, str] = {}
    for other in range(size):
        try:
            store.wait([f"parafuse/{topic}/{other}"], timedelta(seconds=timeout_s))
        except dist.DistStoreError as error:
            raise RankError(f"rank {other} did not report its {topic} within {timeout_s:.0f} s") from error
        said[other] = store.get(f"parafuse/{topic}/{other}").decode()
    different = [other for other in said if said[other] != said[0]]
    if different:
        raise RankError(
            f"ranks {different} were given another {topic.split('/')[0]} than rank 0: {said[different[0]]} against "
            f"{said[0]}. Start every rank with the same arguments."
        )
