"""What goes wrong when one rank hands a model to the others of its machine: each says so by the rank's name, or all
load for themselves."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import CLIPTextModel

from parafuse.engine import node_loading
from parafuse.errors import RankError
from parafuse.parallel import node
from parafuse.parallel.node import Node, hand_out, leave, meet_on_node, take
from parafuse.parallel.world import World
from tests.dist.ranks import run_ranks
from tests.memory.loading import load


def listening() -> tuple[socket.socket, Node]:
    """A leader's socket, and what another rank knows of it."""
    server = node._listen()
    return server, Node([0, 1], 1, server.getsockname())


# no socket


def with_long_paths(folder: str) -> dict[str, Any]:
    with mock.patch.object(tempfile, "tempdir", folder):
        return load("emoji")


def test_where_a_socket_has_too_long_a_path_each_loads(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    found = run_ranks(with_long_paths, 2, str(folder))
    how = [one["how"] for one in found[0]["ranks"]]
    assert how[0] == "read"
    assert how[1].startswith("read: no socket in ")
    assert "too long" in how[1]
    assert found[0]["weights"] == found[1]["weights"]
    assert list(folder.iterdir()) == []


def test_a_socket_that_nobody_is_told_of_is_closed(tmp_path: Path) -> None:
    """Another rank has failed before the addresses are exchanged."""
    world = mock.Mock(spec=World, rank=0)
    world.everyone.side_effect = [[node._machine()] * 2, RankError("rank 1 is gone")]
    made: list[socket.socket] = []

    def listen() -> socket.socket:
        made.append(there())
        return made[-1]

    there = node._listen
    with (
        mock.patch.object(tempfile, "tempdir", str(tmp_path)),
        mock.patch.object(node, "_listen", listen),
        pytest.raises(RankError, match="is gone"),
    ):
        meet_on_node(world)
    assert made[0].fileno() == -1
    assert list(tmp_path.iterdir()) == []


# a leader that is gone, or says nothing


def test_a_leader_that_ended_before_is_named() -> None:
    server, other = listening()
    leave(Node([0, 1], 0, other.address, server))
    with pytest.raises(RankError, match="rank 0 ended before it handed out the model"):
        take(other, {}, 5.0)


def test_a_leader_that_was_killed_before_is_named() -> None:
    """Its socket is there, and nobody listens."""
    server, other = listening()
    server.close()
    with pytest.raises(RankError, match="rank 0 ended before it handed out the model"):
        take(other, {}, 5.0)
    leave(Node([0, 1], 0, other.address, server))


@pytest.mark.parametrize("sent", [b"w\0\0", b"w" + node._LENGTH.pack(1000) + b"some"], ids=["head", "pickle"])
def test_a_leader_that_stalls_while_it_sends_is_named(sent: bytes) -> None:
    server, other = listening()
    done = threading.Event()

    def lead() -> None:
        peer, _ = server.accept()
        with peer:
            peer.sendall(sent)
            done.wait(30)

    thread = threading.Thread(target=lead)
    thread.start()
    begun = time.monotonic()
    try:
        with pytest.raises(RankError, match="rank 0 sent nothing for 1 s while it handed out the model"):
            take(other, {}, 1.0)
        assert time.monotonic() - begun < 15
    finally:
        done.set()
        thread.join()
        leave(Node([0, 1], 0, other.address, server))


def test_what_the_others_could_not_use_is_told_them() -> None:
    server, other = listening()
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(take(other, {}, 20.0)))
    thread.start()

    def check(value: Any) -> None:
        raise node_loading.CannotShareError(f"no use for {value}")

    leader = Node([0, 1], 0, other.address, server)
    assert hand_out(leader, lambda: 3, {}, None, check) == (3, "no use for 3")
    thread.join()
    leave(leader)
    assert got == [(None, "no use for 3")]


# a class that cannot be built


class Demanding(CLIPTextModel):
    """Is not built from its configuration alone."""

    def __init__(self, config: Any, more: int):
        super().__init__(config)
        self.more = more


class Moody(CLIPTextModel):
    """Is built on rank 0 alone."""

    def __init__(self, config: Any):
        if os.environ["RANK"] != "0":
            raise LookupError("not here")
        super().__init__(config)


def with_encoder(kind: str) -> dict[str, Any]:
    there = node_loading.load_pipeline

    def load_pipeline(*args: Any, **kwargs: Any) -> Any:
        pipeline = there(*args, **kwargs)
        pipeline.text_encoder.__class__ = {"Demanding": Demanding, "Moody": Moody}[kind]
        return pipeline

    with mock.patch.object(node_loading, "load_pipeline", load_pipeline):
        return load("emoji")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("Demanding", "text_encoder: Demanding cannot be built from its configuration alone (TypeError: "),
        ("Moody", "text_encoder: Moody cannot be built from its configuration alone (LookupError: not here)"),
    ],
)
def test_a_class_that_cannot_be_built_is_loaded_by_each(kind: str, why: str) -> None:
    found = run_ranks(with_encoder, 3, kind)
    how = [one["how"] for one in found[0]["ranks"]]
    assert how[0] == "read"
    assert all(one.startswith(f"read: {why}") for one in how[1:])
    assert all(one["weights"] == found[0]["weights"] for one in found)
