"""The ranks of one machine, and how one of them hands an object to the others, with tensors in shared memory.

It goes through a socket in a folder that only this user can open, as a descriptor and a pickle; both ends make sure
that the other is a process of the same user. What a rank has failed with goes the same way; one that ends closes it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parafuse.errors import ParafuseError, RankError
from parafuse.parallel.node_memory import CannotShareError, Packed, can_share, pack, unpack
from parafuse.parallel.world import AGREE_S, World

GLANCE_S = 0.2
"""How often a rank that waits looks whether others have died."""
_CREDENTIALS = struct.Struct("3i")
_LENGTH = struct.Struct("Q")
_WHOLE, _ALONE, _FAILED = b"w", b"a", b"f"


@dataclass(frozen=True)
class Node:
    """The ranks of this machine."""

    ranks: list[int]
    """In order; the first one is their leader."""
    rank: int
    """This one."""
    address: str = ""
    """Of the leader's socket; empty: nothing is handed over here."""
    listening: socket.socket | None = None
    """On the leader."""
    why: str = ""
    """Why nothing is handed over, where it could have been."""

    @property
    def leads(self) -> bool:
        return self.ranks[0] == self.rank

    @property
    def shares(self) -> bool:
        return bool(self.address)


def meet_on_node(world: World) -> Node:
    """Which ranks can share memory. Collective: every rank calls it. Close it with `leave`."""
    here = _machine() if can_share() else ""
    machines = world.everyone("machines", here)
    ranks = [rank for rank, machine in enumerate(machines) if machine == here and here] or [world.rank]
    listening, why = None, ""
    if len(ranks) > 1 and ranks[0] == world.rank:
        try:
            listening = _listen()
        except OSError as error:  # the path of the temporary folder is too long for a socket, say
            why = f"no socket in {tempfile.gettempdir()!r} ({error.strerror or error})"
    address = "" if listening is None else str(listening.getsockname())
    try:
        said = world.everyone("addresses", json.dumps([address, why]))
    except BaseException:
        leave(Node(ranks, world.rank, address, listening))
        raise
    address, why = json.loads(said[ranks[0]])
    return Node(ranks, world.rank, address, listening, why)


def _machine() -> str:
    """Equal for processes that see the same files and run under the same system."""
    facts = [str(os.geteuid()), socket.gethostname()]
    facts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    facts += [str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("mnt", "pid", "user")]
    return json.dumps(facts)


def _listen() -> socket.socket:
    folder = tempfile.mkdtemp(prefix="parafuse-")  # opened by this user alone
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(str(Path(folder) / "weights"))
        server.listen(64)
    except BaseException:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return server


def leave(node: Node) -> None:
    """Closes the leader's socket. A second call does nothing."""
    if node.listening is not None:
        node.listening.close()
        shutil.rmtree(Path(node.address).parent, ignore_errors=True)


def hand_out(
    node: Node,
    make: Callable[[], Any],
    given: Mapping[str, Any],
    watch: Callable[[], None] | None = None,
    check: Callable[[Any], None] | None = None,
) -> tuple[Any, str]:
    """On the leader: what `make` gives, which every other rank of the node gets; and why they could not get it, or "".

    `check` raises CannotShareError for what they could not use. `watch` may raise while it waits for one. Raises what
    `make` raises, on all of them."""
    try:
        value = make()
    except BaseException as error:
        _send_all(node, _FAILED, pickle.dumps(_told(error, node.rank)), None, watch)
        raise
    try:
        if check is not None:
            check(value)
        packed = pack(value, given)
    except CannotShareError as error:
        _send_all(node, _ALONE, pickle.dumps(str(error)), None, watch)
        return value, str(error)
    try:
        text = pickle.dumps((packed.pickled, packed.files, packed.regions))
        _send_all(node, _WHOLE, text, packed.memory, watch)
    finally:
        os.close(packed.memory)
    return value, ""


def _told(error: BaseException, rank: int) -> BaseException:
    """What the others raise."""
    if isinstance(error, ParafuseError):
        return error
    return RankError(f"rank {rank} failed: {type(error).__name__}: {error}")


def _send_all(node: Node, kind: bytes, data: bytes, descriptor: int | None, watch: Callable[[], None] | None) -> None:
    listening = node.listening
    if listening is None:
        return
    for _ in node.ranks[1:]:
        with _next_peer(listening, watch) as peer:
            peer.settimeout(AGREE_S)
            head = kind + _LENGTH.pack(len(data))
            try:
                socket.send_fds(peer, [head], [] if descriptor is None else [descriptor])
                peer.sendall(data)
            except OSError:
                continue  # it has ended: whoever waits for it next says so


def _next_peer(listening: socket.socket, watch: Callable[[], None] | None) -> socket.socket:
    """Another rank of the node: they come before the model is loaded, so none is waited for long."""
    deadline = time.monotonic() + AGREE_S
    listening.settimeout(GLANCE_S)
    while time.monotonic() < deadline:
        try:
            peer, _ = listening.accept()
        except TimeoutError:
            if watch is not None:
                watch()
            continue
        if _user_of(peer) == os.geteuid():
            return peer
        peer.close()  # somebody else's process; the folder should have kept it out
    raise RankError(f"a rank of this node did not come for the model within {AGREE_S:.0f} s.")


def take(
    node: Node, given: Mapping[str, Any], deadline_s: float, watch: Callable[[], None] | None = None
) -> tuple[Any, str]:
    """On the others: what the leader hands out, or (None, why it cannot be had). `watch` may raise meanwhile.

    Raises what the leader has failed with; RankError where it ended, or is silent for `deadline_s`."""
    leader = node.ranks[0]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        try:
            peer.connect(node.address)
        except OSError as error:
            raise RankError(f"rank {leader} ended before it handed out the model; its own output says why.") from error
        if _user_of(peer) != os.geteuid():
            raise RankError(f"rank {leader}: its socket belongs to another user.")
        peer.settimeout(GLANCE_S)
        head, descriptors = _head(peer, leader, deadline_s, watch)
        try:
            data = _exactly(peer, _LENGTH.unpack(head[1:])[0], leader)
            if head[:1] == _FAILED:
                raise pickle.loads(data)
            if head[:1] == _ALONE:
                return None, str(pickle.loads(data))
            try:
                pickled, files, regions = pickle.loads(data)
                return unpack(Packed(pickled, files, regions, descriptors[0]), given), ""
            except CannotShareError as error:
                return None, str(error)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _head(
    peer: socket.socket, leader: int, deadline_s: float, watch: Callable[[], None] | None
) -> tuple[bytes, list[int]]:
    """What comes first, and the descriptors that come with it."""
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            head, descriptors, _, _ = socket.recv_fds(peer, 1 + _LENGTH.size, 1, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError as error:
            if time.monotonic() > deadline:
                raise RankError(
                    f"rank {leader} has not loaded the model within {deadline_s:.0f} s; if that takes longer here, "
                    "raise timeout_s."
                ) from error
            if watch is not None:
                watch()
            continue
        except OSError:
            head, descriptors = b"", []
        if not head:
            raise RankError(f"rank {leader} ended while it loaded the model; its own output says why.")
        peer.settimeout(deadline_s)
        return head + _exactly(peer, 1 + _LENGTH.size - len(head), leader), list(descriptors)


def _exactly(peer: socket.socket, nbytes: int, leader: int) -> bytes:
    found = bytearray()
    while len(found) < nbytes:
        try:
            piece = peer.recv(min(nbytes - len(found), 1 << 20))
        except TimeoutError as error:
            raise RankError(
                f"rank {leader} sent nothing for {peer.gettimeout():.0f} s while it handed out the model."
            ) from error
        except OSError:
            piece = b""
        if not piece:
            raise RankError(f"rank {leader} ended while it handed out the model.")
        found += piece
    return bytes(found)


def _user_of(peer: socket.socket) -> int:
    return _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
