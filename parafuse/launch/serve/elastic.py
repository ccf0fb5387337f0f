"""The ranks of one or several machines, on torch's elastic agent and its rendezvous.

torch's agent decides when machines meet, which ranks they have, and when all of them start anew; the processes are
those of `parallel/ranks.py`. Its local agent is not used: it waits up to 30 s for a rank that is stopped before it
kills it, its ranks outlive a killed agent, and all starts share one store with the keys of the earlier ones."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout, Token

from parafuse.errors import ConfigError
from parafuse.launch.serve.rank_link import GENERATION_ENV
from parafuse.launch.serve.spawned import device_env
from parafuse.parallel.ranks import RankFailure, RankProcesses, free_port, start

NO_RANK = -1
"""In a failure that is of no rank of this machine."""
LOOK_S = 0.1
STORE_S = 10.0
"""For one word with the rendezvous' store."""
MANY = 2**31 - 1
"""Restarts that the agent may make: `start` decides."""
START_KEY = "parafuse/start"
CLOSE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where machines meet."""

    nnodes: int = 1
    endpoint: str = ""
    """HOST:PORT; needed with several machines."""
    hosts: bool = True
    """Whether this machine is the one at the endpoint."""
    key: str = ""
    """A secret that the machines share. torch keeps the state of a rendezvous as a pickle: with a key nothing is read
    that was not signed with it. Needed with several machines."""
    name: str = "parafuse"
    join_s: float = 600.0
    """How long a start waits for the other machines."""

    def __post_init__(self) -> None:
        if self.nnodes < 1:
            raise ConfigError(f"nnodes={self.nnodes}: must be at least 1.")
        if self.nnodes == 1:
            return
        host, _, port = self.endpoint.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"rdzv_endpoint={self.endpoint!r}: must be HOST:PORT, the same on each of the machines.")
        if not self.key:
            raise ConfigError(
                f"nnodes={self.nnodes}: machines that meet need a secret that they share, the same on each; set it in "
                "the environment of all of them."
            )

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.endpoint.rpartition(":")
        return host.strip("[]"), int(port)


class ElasticGroup:
    """A `RankGroup` of this machine's ranks in a group that may span several. Its methods may be called from any
    thread. The agent runs in a thread of its own, to which the ranks belong: they end with it, and with this process.

    The loss of a rank on any machine ends the group on all of them, and each machine's `start` joins the next one."""

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        *,
        env: Mapping[str, str],
        rendezvous: Rendezvous | None = None,
        show: Sequence[int] = (0,),
    ):
        """`command` runs one rank; `ranks` is how many this machine has. `env` is added to this process's environment.
        `show`: global ranks whose output reaches this process's own."""
        if ranks < 1:
            raise ConfigError(f"ranks={ranks}: must be at least 1.")
        self.command, self.ranks, self.rendezvous = list(command), ranks, rendezvous or Rendezvous()
        self._env, self._show = dict(env), tuple(show)
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._devices: list[str] | None = None
        """Of the start that is wanted; None: none is, and nothing may run."""
        self._processes: RankProcesses | None = None
        self._failure: RankFailure | None = None
        self._generation = ""
        self._closed = False

    @property
    def generation(self) -> str:
        return self._generation

    @property
    def pids(self) -> list[int]:
        processes = self._processes
        return [] if processes is None else processes.pids

    def start(self, devices: list[str]) -> None:
        """As `RankGroup.start`: returns at once, and the ranks start when all machines have met."""
        with self._changed:
            if self._closed:
                raise ConfigError("group: is closed; make another one.")
            self.kill()
            self._failure, self._generation, self._devices = None, "", list(devices)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="parafuse-elastic", daemon=True)
                self._thread.start()

    def poll(self) -> RankFailure | None:
        with self._changed:
            if self._failure is None and self._processes is not None:
                self._failure = self._processes.poll()
            return self._failure

    def kill(self) -> None:
        with self._changed:
            self._devices = None
            processes, self._processes = self._processes, None
            if processes is not None:
                processes.stop(grace_s=0.0)

    def close(self) -> None:
        with self._changed:
            self.kill()
            self._closed = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_S)  # it may be in a word with a store that is gone; it starts nothing any more

    # What follows is for the agent, in its thread.

    def _run(self) -> None:
        store: dist.Store | None = None
        while self.await_start():
            try:
                store = store or self._meet()
                _Agent(self, self._handler(store)).run()
            except Exception as error:
                self.note(_told(error, self.rendezvous))
                if not self.rendezvous.hosts:
                    store = None  # the other machine may come back with a new one
            finally:
                self.end("")

    def _meet(self) -> dist.Store:
        """The store of the rendezvous. One machine needs none that others could reach."""
        if self.rendezvous.nnodes == 1:
            return dist.HashStore()
        host, port = self.rendezvous.address
        deadline = time.monotonic() + self.rendezvous.join_s
        while True:
            try:
                return dist.TCPStore(
                    host,
                    port,
                    is_master=self.rendezvous.hosts,
                    multi_tenant=True,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=STORE_S),
                )
            except (RuntimeError, ValueError, TimeoutError):
                if self.rendezvous.hosts or self._closed or time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_S)

    def _handler(self, store: dist.Store) -> DynamicRendezvousHandler:
        several = self.rendezvous.nnodes > 1
        name = self.rendezvous.name
        return DynamicRendezvousHandler.from_backend(
            name,
            dist.PrefixStore("parafuse", store),
            _Backend(store, name, self),
            self.rendezvous.nnodes,
            self.rendezvous.nnodes,
            local_addr=_own_address(*self.rendezvous.address) if several else "127.0.0.1",
            timeout=RendezvousTimeout(join=timedelta(seconds=self.rendezvous.join_s)),
            keep_alive_interval=2,
            keep_alive_max_attempt=3,
        )

    def await_start(self) -> bool:
        """Waits until a start is wanted; False: never again."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._devices is not None and self._failure is None))
            return not self._closed

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def is_wanted(self) -> bool:
        """Whether the ranks of the present start run, or are to."""
        return not self._closed and self._devices is not None and self._failure is None

    def begin(self, ranks: Sequence[int], env: Mapping[str, str], told: Mapping[str, Any]) -> dict[int, int]:
        """Starts the ranks, unless the start is not wanted any more; their process ids by local rank."""
        with self._changed:
            if not self.is_wanted or self._devices is None:
                return {}
            self._generation = str(told["generation"])
            self._processes = start(
                self.command,
                ranks=ranks,
                world_size=int(told["world_size"]),
                master_port=int(told["port"]),
                env=self._env | dict(env) | device_env(self._devices) | {GENERATION_ENV: self._generation},
                show=self._show,
                handle_signals=False,
            )
            return dict(enumerate(self._processes.pids))

    def is_well(self) -> bool:
        """Whether all ranks run."""
        with self._changed:
            processes = self._processes
            if processes is None or self.poll() is not None:
                return False
            if not processes.running:
                self.note("all ranks ended, and nobody had told them to.")
                return False
            return True

    def note(self, why: str) -> None:
        """The group is lost, and no rank of this machine is to blame."""
        with self._changed:
            if self._failure is None and not self._closed:
                self._failure = RankFailure(rank=NO_RANK, exit_code=1, summary=why, details="")

    def end(self, why: str) -> None:
        """Ends the ranks. `why`: what is to blame where none of them failed."""
        with self._changed:
            if self._processes is not None:
                if why and self.poll() is None:
                    self.note(why)
                self._processes.stop(grace_s=0.0)


class _Agent(SimpleElasticAgent):
    """torch's agent, with ranks of `parallel/ranks.py`, that joins a rendezvous only when a start is wanted."""

    def __init__(self, group: ElasticGroup, handler: DynamicRendezvousHandler):
        spec = WorkerSpec(
            role="parafuse",
            local_world_size=group.ranks,
            rdzv_handler=handler,
            entrypoint=group.command[0],
            max_restarts=MANY,
            monitor_interval=LOOK_S,
        )
        super().__init__(spec)
        self._group = group

    def _rendezvous(self, worker_group: WorkerGroup) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not self._group.await_start():
            raise RendezvousClosedError
        super()._rendezvous(worker_group)  # pyright: ignore[reportCallIssue]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # A store of its own for each start, at a port that the first machine has free now: nothing of an earlier start
        # can be taken for this one's.
        store = worker_group.store
        if store is None:
            raise RendezvousStateError("the rendezvous has given no store.")
        if worker_group.group_rank == 0:
            mine = {
                "port": free_port(),
                "generation": secrets.token_hex(8),
                "world_size": worker_group.workers[0].world_size,
            }
            store.set(START_KEY, json.dumps(mine))
        told = json.loads(store.get(START_KEY))
        env = {
            "MASTER_ADDR": str(worker_group.master_addr),
            "GROUP_RANK": str(worker_group.group_rank),
            "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
        }
        if not _is_loopback(env["MASTER_ADDR"]):  # not the loopback device, which serves one machine
            env["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "")
        return self._group.begin([worker.global_rank for worker in worker_group.workers], env, told)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._group.end("a rank of another machine was lost; all of them start anew.")

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        return RunResult(state=WorkerState.HEALTHY if self._group.is_well() else WorkerState.FAILED)

    def _shutdown(self, *_args: Any, **_kwargs: Any) -> None:
        self._group.end("")


class _Backend(C10dRendezvousBackend):
    """The state of a rendezvous in a store: signed, and given up once no start is wanted while machines meet."""

    def __init__(self, store: dist.Store, name: str, group: ElasticGroup):
        super().__init__(store, name)
        self._group = group
        self._secret = (group.rendezvous.key or secrets.token_hex(32)).encode()

    def get_state(self) -> tuple[bytes, Token] | None:
        self._refuse_closed()
        found = super().get_state()
        return None if found is None else (self._read(found[0]), found[1])

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        self._refuse_closed()
        # C10d's own way of telling whether a write succeeded compares states, so the signature must be of the state
        # alone; torch's states have the time in them, and an old one is refused by its token.
        done = super().set_state(self._sign(state) + state, token)
        return None if done is None else (self._read(done[0]), done[1], done[2])

    def _refuse_closed(self) -> None:
        if self._group.is_closed:
            raise RendezvousClosedError

    def _sign(self, state: bytes) -> bytes:
        return hmac.new(self._secret, state, hashlib.sha256).digest()

    def _read(self, signed: bytes) -> bytes:
        size = hashlib.sha256().digest_size
        if not hmac.compare_digest(signed[:size], self._sign(signed[size:])):
            raise RendezvousStateError("the rendezvous' state is not signed with this machine's key.")
        return signed[size:]


def _told(error: Exception, rendezvous: Rendezvous) -> str:
    """Why machines could not meet, in a line."""
    where = f" at {rendezvous.endpoint}" if rendezvous.nnodes > 1 else ""
    text = str(error).splitlines()
    kind = "the rendezvous" if isinstance(error, RendezvousError | dist.DistStoreError) else "the agent"
    return f"{kind}{where} failed: {type(error).__name__}{': ' + text[0] if text else ''}"


def _own_address(host: str, port: int) -> str:
    """This machine's address as that of the endpoint sees it. Nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "localhost")
