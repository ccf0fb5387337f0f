"""The socket of ranks: who says what is not its to say is cut off."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from parafuse.errors import ConfigError, RankError
from parafuse.launch.serve.messages import Beat, End, Hello, Item, Paint, Painted, encode
from parafuse.launch.serve.rank_link import RankLink
from tests.serve.groups import PATIENCE_S, eventually


def test_a_rank_that_says_what_is_not_its_to_say_is_lost() -> None:
    async def main() -> None:
        link = RankLink()
        said: list[Any] = []
        gone: list[tuple[int, str]] = []
        await link.open(lambda: "now", lambda _rank, message: said.append(message), lambda *one: gone.append(one))
        wrong = {
            "it sent Painted": encode(Painted(call="c", files=(), receipt="", seconds=0.0)),
            "it sent a beat of rank 0": encode(Beat(rank=0, phase="idle", moves=1)),
            "it sent Paint": encode(Paint(call="c", items=(Item(job="c", prompt="p", seed=1),))),
            "its connection ended": b"",
            "it sent a message of 4294967295 bytes": b"\xff\xff\xff\xff",
        }
        for number, (why, frame) in enumerate(wrong.items(), start=1):
            reader, writer = await asyncio.open_unix_connection(link.path)
            writer.write(
                encode(Hello(rank=1, local_rank=1, pid=1, world_size=2, feeds=False, generation="now")) + frame
            )
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
            await eventually(lambda number=number: len(gone) == number, why)
            assert gone[-1][0] == 1
            assert why in gone[-1][1]
            writer.close()
        assert all(isinstance(one, Hello) for one in said)
        await link.close()

    asyncio.run(main())


def test_a_folder_with_too_long_a_name_is_refused(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with pytest.raises(ConfigError, match="shorter"):
        RankLink(str(long))
    assert not list(long.iterdir())


def test_without_a_feeding_rank_nothing_is_sent() -> None:
    async def main() -> None:
        link = RankLink()
        await link.open(lambda: "now", lambda _rank, _message: None, lambda _rank, _why: None)
        with pytest.raises(RankError, match="not connected"):
            link.send(End())
        await link.close()

    asyncio.run(main())
