"""The ranks of this job: joined with finite timeouts, checked for agreement through the store, failing together."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from parafuse.errors import ConfigError, RankError, RankMismatchError

AGREE_S = 120.0
"""How long a rank that has started waits for the others to start, before anything is loaded."""
LONGEST_PAUSE_S = 0.02
_USERS, _MADE_HERE, _GROUPS = "parafuse/users", "parafuse/made_here", "parafuse/groups"
_OWN_RANKS = "parafuse/own_ranks"
"""Set in the default store where an engine has started the ranks for itself."""
SAME_ARGUMENTS = "Start every rank with the same arguments."
SETTLE_S = 5.0
"""How long a rank that failed waits to hear whether the others failed too, before it gives up on them."""


def ensure_world(device: str, timeout_s: float, store: dist.Store | None = None) -> bool:
    """Makes the default process group unless there is one; returns whether it did. Every rank must call it.

    gloo for the CPU, NCCL for CUDA (with gloo beside it for host messages); `timeout_s` bounds every exchange. The
    ranks are those of the launcher's environment, met at `store` where one is given."""
    if dist.is_initialized():
        return False
    if store is None:
        _refuse_without_launcher()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    ours = store is not None
    if store is None:
        store, rank, size = _meet(min(AGREE_S, timeout_s))
    else:
        rank, size = int(os.environ.get("RANK", "0")), int(store.get("parafuse/world_size"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    if ours:
        dist.distributed_c10d._get_default_store().set(_OWN_RANKS, "1")
    return True


_MET: dict[tuple[str, ...], dist.Store] = {}
"""Stores of launchers, by address, kept for the next group of this process: another rank may still use one when this
rank has left, and what a first group has written there must not be taken for the second one's."""


def _meet(deadline_s: float) -> tuple[dist.Store, int, int]:
    """A store for one process group at the launcher's address, this rank and the number of ranks. Ranks make groups in
    the same order. Raises RankError when rank 0 is not there in time: on another node it may have ended over its
    arguments, and nobody there can end this process."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _at_the_address(deadline_s)
    number = store.add(f"{_GROUPS}/{rank}", 1)
    return dist.PrefixStore(f"{_GROUPS}/{number}", store), rank, size


def _at_the_address(deadline_s: float) -> dist.Store:
    """The store of the launcher's address."""
    address = tuple(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    if address not in _MET:
        _MET[address] = _rendezvous(deadline_s)
    return _MET[address]


def from_first(topic: str, make: Callable[[], str], timeout_s: float) -> str:
    """Rank 0's text, on every rank of a launcher, before or after there is a group. Every rank must call it, as often
    as the others. Raises RankError when rank 0 says nothing in time, ConfigError without a launcher."""
    _refuse_without_launcher()
    if dist.is_initialized():
        rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    else:
        rank, store = int(os.environ["RANK"]), _at_the_address(min(AGREE_S, timeout_s))
    key = f"parafuse/{topic}/{store.add(f'parafuse/{topic}/asked/{rank}', 1)}"
    if rank == 0:
        store.set(key, make())
    if not wait_for(store, key, time.monotonic() + timeout_s):
        raise RankError(f"rank 0 did not say {topic} within {timeout_s:.0f} s.")
    return store.get(key).decode()


def _refuse_without_launcher() -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if dist.is_initialized() or not missing:
        return
    if "RANK" in os.environ:
        raise ConfigError(f"{', '.join(missing)}: not in the environment beside RANK; torchrun sets them.")
    raise ConfigError(
        "no launcher: start the ranks with torchrun (or `parafuse generate --ranks N`, or parafuse.Engine), "
        "or call torch.distributed.init_process_group first."
    )


def _rendezvous(deadline_s: float) -> dist.Store:
    try:
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=deadline_s)))[0]
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        if "EADDRINUSE" in str(error):
            raise RankError(f"rank 0: the port of {where} is in use; set MASTER_PORT to another.") from error
        if os.environ["RANK"] == "0":
            raise RankError(
                f"rank 0: not all of {os.environ.get('WORLD_SIZE')} ranks came to {where} within {deadline_s:.0f} s. "
                "Start the others with the same address and port."
            ) from error
        raise RankError(
            f"rank {os.environ['RANK']}: rank 0 was not at {where} within {deadline_s:.0f} s. Its own terminal says "
            "why, if it ended; otherwise check the address and the port that the launcher was given."
        ) from error


def join_world(
    device: str, timeout_s: float, size: int, store: dist.Store | None = None, num_devices: int = 1
) -> World:
    """This rank's place in a world of `size` ranks. Each has `num_devices` of the node's devices, the first of them its
    main one. Collective when `size` is above 1."""
    first = int(os.environ.get("LOCAL_RANK", "0")) * num_devices
    where = torch.device(device, first) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    joined = ensure_world(device, timeout_s, store) if size > 1 else False
    return World(where, timeout_s, joined, alone=size == 1)


def launched() -> bool:
    """Whether this process is one of several ranks that somebody else started: a launcher, or the user's own code.

    Not so where an engine in this process has started ranks for itself: those are its own."""
    if dist.is_initialized():
        return not dist.distributed_c10d._get_default_store().check([_OWN_RANKS])
    return "RANK" in os.environ


def wait_for(store: dist.Store, key: str, deadline: float, watch: Callable[[], None] | None = None) -> bool:
    """Waits until somebody has set `key`; False when `deadline` (monotonic) has passed. `watch` may raise meanwhile.

    Looks again and again: the store's own wait logs every timeout, and cannot see that a rank has died."""
    pause_s = 0.0005
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        if watch is not None:
            watch()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    return True


class World:
    """What one engine says to the other ranks outside of its exchanges, through the store."""

    def __init__(self, device: torch.device, timeout_s: float, joined_here: bool, *, alone: bool = False):
        self.device, self.timeout_s, self.joined_here = device, timeout_s, joined_here
        self.rank = 0 if alone else dist.get_rank()
        self.size = 1 if alone else dist.get_world_size()
        self.broken = False
        self.watch: Callable[[], None] | None = None
        """Called while waiting for others; raises when one of them is known to have died."""
        self._count: dict[str, int] = {}
        self._left = False
        if self.size > 1:
            self.store.add(f"{_USERS}/{self.rank}", 1)
            if joined_here:
                self.store.set(f"{_MADE_HERE}/{self.rank}", "1")
        self.name = f"parafuse/{_next_engine(self)}" if self.size > 1 else ""
        """Under which its engines' ranks talk."""

    @property
    def store(self) -> dist.Store:
        return dist.distributed_c10d._get_default_store()

    def _key(self, topic: str) -> str:
        """The next key for `topic`. When a rank asks for number n, all ranks are through with n - 2: it is deleted."""
        number = self._count[topic] = self._count.get(topic, 0) + 1
        if number > 2 and self.size > 1:
            self.store.delete_key(f"{self.name}/{topic}/{number - 2}/{self.rank}")
        return f"{self.name}/{topic}/{number}"

    def _collect(self, key: str, value: str, timeout_s: float) -> dict[int, str]:
        """What each rank set at `key`; ranks that said nothing within `timeout_s` are left out."""
        self.store.set(f"{key}/{self.rank}", value)
        deadline = time.monotonic() + timeout_s
        said: dict[int, str] = {}
        for other in range(self.size):
            if wait_for(self.store, f"{key}/{other}", deadline, self.watch):
                said[other] = self.store.get(f"{key}/{other}").decode()
        return said

    def agree(
        self, topic: str, value: Mapping[str, str], deadline_s: float | None = None, *, way_out: str = SAME_ARGUMENTS
    ) -> None:
        """Raises RankError on every rank unless all say the same; names those that differ, and in what, or stay silent.

        Waits `deadline_s` (not given: the job's timeout) for the others."""
        if self.size == 1:
            return
        deadline_s = min(deadline_s or self.timeout_s, self.timeout_s)
        said = self._collect(self._key(topic), json.dumps(dict(value), sort_keys=True), deadline_s)
        silent = [rank for rank in range(self.size) if rank not in said]
        if silent:
            self.broken = True
            raise RankError(f"{_ranks(silent)} did not report {topic} within {deadline_s:.0f} s.")
        different = [rank for rank in said if said[rank] != said[0]]
        if different:
            was = "was" if len(different) == 1 else "were"
            raise RankMismatchError(
                f"{_ranks(different)} {was} given {topic} other than rank 0's"
                f"{_first_difference(json.loads(said[0]), json.loads(said[different[0]]), different[0])}. "
                f"{way_out}"
            )

    def share(self, topic: str, make: Callable[[], int]) -> int:
        """Rank 0's number, on every rank."""
        return make() if self.size == 1 else int(self._from_first(topic, lambda: str(make())))

    def tell(self, topic: str, make: Callable[[], str]) -> str:
        """Rank 0's text, on every rank."""
        return make() if self.size == 1 else self._from_first(topic, make)

    def any_says(self, topic: str, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is set on some rank."""
        said = map(json.loads, self.everyone(topic, json.dumps(flags)))
        return [any(column) for column in zip(*said, strict=True)]

    def everyone(self, topic: str, text: str) -> list[str]:
        """What every rank says, by rank."""
        if self.size == 1:
            return [text]
        said = self._collect(self._key(topic), text, self.timeout_s)
        silent = [rank for rank in range(self.size) if rank not in said]
        if silent:
            self.broken = True
            raise RankError(f"{_ranks(silent)} did not report {topic} within {self.timeout_s:.0f} s.")
        return [said[rank] for rank in range(self.size)]

    def share_noise(self) -> None:
        """Gives every rank the state of rank 0's own generators (of its CPU, and of its device): some schedulers draw
        from these."""
        if self.size == 1:
            return
        on_gpu = self.device.type == "cuda"
        generators = [torch.default_generator]
        if on_gpu:
            generators.append(torch.cuda.default_generators[self.device.index or 0])

        def states() -> str:
            return json.dumps([generator.get_state().numpy().tobytes().hex() for generator in generators])

        for generator, state in zip(generators, json.loads(self._from_first("noise", states)), strict=True):
            generator.set_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))

    def _from_first(self, topic: str, make: Callable[[], str]) -> str:
        key = f"{self._key(topic)}/0"
        if self.rank == 0:
            self.store.set(key, make())
        if not wait_for(self.store, key, time.monotonic() + self.timeout_s, self.watch):
            raise RankError(f"rank 0 did not report {topic} within {self.timeout_s:.0f} s.")
        return self.store.get(key).decode()

    @contextmanager
    def request(self, topic: str = "outcome") -> Iterator[None]:
        """Context of one request: it ends on all ranks with success, or on all with an error. Another may be open in
        another thread, of another topic."""
        key = self._key(topic)
        try:
            yield
        except BaseException as error:
            self._settle(key, error)
            raise
        self._settle(key, None)

    def _settle(self, key: str, error: BaseException | None) -> None:
        """Tells the others how the request ended here, and hears how it ended there."""
        if self.size == 1:
            return
        text = "" if error is None else f"{type(error).__name__}: {error}"
        if error is not None and not isinstance(error, Exception):
            self.broken = True  # interrupted: do not wait for anyone
            self.store.set(f"{key}/{self.rank}", text)
            return
        said = self._collect(key, text, SETTLE_S if error else self.timeout_s)
        silent = [rank for rank in range(self.size) if rank not in said]
        failed = {rank: said[rank] for rank in said if said[rank]}
        gave_up = self.store.check([f"{key}/gave up"])
        if error is not None and len(failed) == self.size and not gave_up:
            return  # a fault everywhere: nobody is left in an exchange, and the engine can go on
        if silent or failed:
            self.broken = True
            self.store.set(f"{key}/gave up", str(self.rank))  # for ranks that hear of it later
            others = {rank: t for rank, t in failed.items() if rank != self.rank}
            what = "; ".join(f"rank {rank} failed: {t}" for rank, t in others.items())
            if error is None or others:
                raise RankError(what or f"{_ranks(silent)} did not finish the request.") from error

    def leave(self) -> None:
        """Ends the process group when its last engine leaves, if an engine made it. A second call does nothing."""
        if self.size == 1 or self._left or not dist.is_initialized():
            return
        self._left = True
        last = self.store.add(f"{_USERS}/{self.rank}", -1) == 0
        if last and self.store.check([f"{_MADE_HERE}/{self.rank}"]):
            dist.destroy_process_group()


def _first_difference(first: dict[str, str], other: dict[str, str], rank: int) -> str:
    """`: seed is 0 on rank 0, 1 on rank 1`; '' for what has no name."""
    for name in sorted(first.keys() | other.keys()):
        mine, theirs = first.get(name, "not given"), other.get(name, "not given")
        if mine != theirs and name:
            return f": {name} is {mine} on rank 0, {theirs} on rank {rank}"
    return ""


def _next_engine(world: World) -> int:
    """Engines are made in the same order on every rank; each has its own keys in the store."""
    return world.store.add(f"parafuse/engines/{world.rank}", 1)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
