"""The ranks of one machine, started and watched by this process itself. No torch in here."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from parafuse.errors import ConfigError
from parafuse.hardware import num_cuda_devices
from parafuse.launch.serve.rank_link import GENERATION_ENV
from parafuse.parallel.ranks import RankFailure, RankProcesses, free_port, start

DEVICES_ENV = "CUDA_VISIBLE_DEVICES"


def visible_devices(device: str) -> list[str]:
    """Names of this machine's devices that a group may use, as CUDA_VISIBLE_DEVICES takes them; none where it is to run
    on the CPU. `device`: that of a configuration."""
    number = 0 if device == "cpu" else num_cuda_devices()
    named = os.environ.get(DEVICES_ENV)
    return [name.strip() for name in named.split(",")][:number] if named else [str(index) for index in range(number)]


def device_env(devices: Sequence[str]) -> dict[str, str]:
    """What ranks are told of their devices: nothing where none were chosen for them."""
    return {DEVICES_ENV: ",".join(devices)} if devices else {}


class SpawnedGroup:
    """A `RankGroup` of processes of this one, which end with it. Its methods may be called from any thread, one at a
    time; the ranks belong to a thread of the group's own, since the kernel ends them when that thread ends."""

    def __init__(self, command: Sequence[str], ranks: int, *, env: Mapping[str, str], show: Sequence[int] = (0,)):
        """`command` runs one rank. `env` is added to this process's environment. `show`: ranks whose output reaches
        this process's own; that of the others is kept for the report of a failure."""
        if ranks < 1:
            raise ConfigError(f"ranks={ranks}: must be at least 1.")
        self._command, self._ranks, self._env, self._show = list(command), ranks, dict(env), tuple(show)
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="parafuse-ranks")
        self._processes: RankProcesses | None = None
        self._generation = ""
        self._number = 0

    @property
    def generation(self) -> str:
        return self._generation

    @property
    def pids(self) -> list[int]:
        return [] if self._processes is None else self._processes.pids

    def start(self, devices: list[str]) -> None:
        """As `RankGroup.start`; ranks of an earlier start are ended first. Raises OSError where no process can be
        made."""
        if self._thread is None:
            raise ConfigError("group: is closed; make another one.")
        self.kill()
        self._number += 1
        self._generation = f"{self._number}-{secrets.token_hex(8)}"
        self._processes = self._thread.submit(self._start, devices).result()

    def _start(self, devices: list[str]) -> RankProcesses:
        return start(
            self._command,
            ranks=range(self._ranks),
            world_size=self._ranks,
            master_port=free_port(),
            env=self._env | device_env(devices) | {GENERATION_ENV: self._generation},
            show=self._show,
            handle_signals=False,
        )

    def poll(self) -> RankFailure | None:
        return None if self._processes is None else self._processes.poll()

    def kill(self) -> None:
        if self._processes is not None:
            self._processes.stop(grace_s=0.0)

    def close(self) -> None:
        self.kill()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
