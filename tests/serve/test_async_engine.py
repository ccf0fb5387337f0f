"""`AsyncEngine` paints what an engine paints, in order, and says why where it does not; its example serves."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from parafuse.config import Config, Parallel
from parafuse.engine.engine import Engine
from parafuse.errors import ConfigError, MemoryLimitError, ModelError, ParafuseError, RankError, UnsupportedError
from parafuse.launch.serve.async_engine import AsyncEngine, Progress, Result, _error
from parafuse.launch.serve.messages import Failed
from tests.serve.groups import COMMAND, PATIENCE_S, child_env, is_alive

ROOT = Path(__file__).parents[2]
CALL: dict[str, Any] = {"num_inference_steps": 4, "width": 32, "height": 32}


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main(), 5 * PATIENCE_S)

    asyncio.run(bounded())


@asynccontextmanager
async def engine(ranks: int = 2, **options: Any) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine("emoji", ranks=ranks, **options) as found:
        folder, pids = found._folder, found._supervisor._group.pids  # pyright: ignore[reportOptionalMemberAccess]
        yield found
    assert not any(map(is_alive, pids))
    assert folder is not None
    assert not folder.exists()


async def painted(found: AsyncEngine, *args: Any, **keywords: Any) -> Result:
    events = [event async for event in found.generate(*args, **keywords)]
    assert [event.step for event in events[:-1] if isinstance(event, Progress)] == list(range(1, len(events)))
    assert isinstance(events[-1], Result)
    return events[-1]


def pids_of(found: AsyncEngine) -> list[int]:
    assert found._supervisor is not None
    return found._supervisor._group.pids


def test_calls_of_an_engine_on_two_ranks() -> None:
    """One engine for much: starting ranks takes longer than what they do."""

    async def main() -> None:
        async with engine(config=Config(parallel=Parallel(ulysses=2))) as found:
            first = await paints_what_an_engine_paints(found)
            await refuses_what_is_wrong(found)
            await stops(found)
            last = await painted(found, "a red apple", seed=7, **CALL)
            assert last.images[0].tobytes() == first.tobytes()

    run(main)


def test_calls_are_painted_in_order_and_a_lost_group_is_tried_again() -> None:
    async def main() -> None:
        async with engine(command=COMMAND) as found:
            await paints_in_order(found)
            await stops(found)
            await survives_a_loss(found)
            assert (await painted(found, "a", seed=9, **CALL)).images[0].getpixel((0, 0)) == (9, 0, 0)

    run(main)


async def paints_what_an_engine_paints(found: AsyncEngine) -> Image.Image:
    events = [event async for event in found.generate("a red apple", seed=7, previews=2, **CALL)]
    steps, result = [one for one in events if isinstance(one, Progress)], events[-1]
    assert isinstance(result, Result)
    assert [(one.step, one.of) for one in steps] == [(n, 4) for n in range(1, 5)]
    previews = [one.preview for one in steps if one.preview is not None]
    assert len(previews) == 2
    assert all(one.size[0] >= 32 for one in previews)
    assert (result.seed, result.videos) == (7, ())
    assert result.receipt
    assert result.seconds > 0
    plain = Engine.from_pretrained("emoji", Config(), alone=True)
    expected = np.asarray(plain("a red apple", seed=7, **CALL).images[0]).astype(int)
    plain.close()
    assert np.abs(np.asarray(result.images[0]).astype(int) - expected).max() <= 1
    two = await painted(found, "a red apple", seed=6, num_outputs=2, **CALL)
    assert np.abs(np.asarray(two.images[1]).astype(int) - expected).max() <= 1
    fresh = [await painted(found, "a red apple", **CALL) for _ in range(2)]
    assert fresh[0].seed != fresh[1].seed
    return result.images[0]


async def refuses_what_is_wrong(found: AsyncEngine) -> None:
    before = pids_of(found)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"widht": 64}, "did you mean 'width'"),
        ({"width": 33}, "multiple of"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
        ({"num_outputs": 0}, "num_outputs=0"),
        ({"previews": -1}, "previews=-1"),
        ({"num_images_per_prompt": 2}, "use num_outputs"),
        ({"lora": {"missing": 1.0}}, "missing"),
        ({"sigmas": object()}, "cannot be sent"),
        ({"negative_prompt": 3}, "negative_prompt"),
    ]
    for keywords, said in wrong:
        with pytest.raises(ConfigError, match=said):
            await painted(found, "a", **CALL | keywords)
    with pytest.raises(ConfigError, match="prompt"):
        await painted(found, ["a", "b"], **CALL)
    # What is seen on the ranks alone fails there on all of them, and changes nothing.
    for _ in range(2):
        with pytest.raises(ParafuseError) as failed:
            await painted(found, "a", **CALL, max_sequence_length=1000)
        assert failed.value.__notes__, "with the rank's traceback"
    assert (await painted(found, "a", **CALL)).images
    assert pids_of(found) == before


async def paints_in_order(found: AsyncEngine) -> None:
    order: list[int] = []

    async def one(number: int) -> None:
        async for _ in found.generate("a", seed=number, **CALL):
            order.append(number)  # noqa: PERF401 - as they come

    await asyncio.gather(*(one(number) for number in range(4)))
    assert order == [number for number in range(4) for _ in range(5)]


async def stops(found: AsyncEngine) -> None:
    before = pids_of(found)
    long: dict[str, Any] = CALL | {"num_inference_steps": 1000}
    async with aclosing(found.generate("a", **long)) as events:
        async for _ in events:
            break
    async for _ in found.generate("a", **long):
        break  # without aclosing: when it is collected
    gc.collect()
    first = asyncio.Event()

    async def endless() -> None:
        async for _ in found.generate("a", **long):
            first.set()

    running, waiting = asyncio.create_task(endless()), asyncio.create_task(endless())
    await first.wait()
    waiting.cancel()
    running.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    assert running.cancelled()
    assert (await painted(found, "a", **CALL)).images
    assert pids_of(found) == before


async def survives_a_loss(found: AsyncEngine) -> None:
    """Tried once more, then an error by name."""
    steps: list[tuple[int, int]] = []
    last: Result | None = None
    more: dict[str, Any] = CALL | {"num_inference_steps": 20}
    async for event in found.generate("a", seed=3, **more):
        if isinstance(event, Result):
            last = event
            continue
        steps.append((event.attempt, event.step))
        if steps[-1] == (1, 2):
            os.kill(pids_of(found)[1], signal.SIGKILL)
    assert last is not None
    assert steps[-20:] == [(2, number) for number in range(1, 21)]

    async def killing() -> None:
        async for event in found.generate("a", **more):
            if isinstance(event, Progress) and event.step == 2:
                os.kill(pids_of(found)[0], signal.SIGKILL)

    with pytest.raises(RankError, match=r"lost while they painted: rank \d"):
        await killing()


@pytest.mark.whole
def test_ranks_that_are_killed_in_a_call_come_back_and_paint_it() -> None:
    async def main() -> None:
        async with engine() as found:
            first = await painted(found, "a red apple", seed=7, **CALL)
            before, attempts = pids_of(found), set[int]()
            async for event in found.generate("a red apple", seed=7, **CALL):
                if isinstance(event, Result):
                    assert event.images[0].tobytes() == first.images[0].tobytes()
                elif (event.attempt, event.step) == (1, 2):
                    os.kill(before[1], signal.SIGKILL)
                attempts |= {event.attempt} if isinstance(event, Progress) else set()
            assert attempts == {1, 2}
            assert not set(before) & set(pids_of(found))

    run(main)


@pytest.mark.whole
def test_pictures_that_are_sent_and_videos_that_are_made() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    call: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64}

    async def main() -> None:
        async with AsyncEngine("tiny:qwen-image-edit", ranks=2) as found:
            result = await painted(found, "a hat", seed=3, image=Image.fromarray(pixels), **call)
        with Engine.from_pretrained("tiny:qwen-image-edit", Config(), alone=True) as plain:
            expected = plain(prompt="a hat", seed=3, image=Image.fromarray(pixels), **call).images[0]
        difference = np.asarray(result.images[0]).astype(int) - np.asarray(expected)
        assert np.abs(difference).max() <= 1
        async with AsyncEngine("tiny:wan2.1-14b", ranks=2) as found:
            result = await painted(found, "a hat", seed=3, num_frames=5, **call)
        assert (len(result.images), len(result.videos)) == (0, 1)
        assert result.videos[0][4:8] == b"ftyp"

    run(main)


@pytest.mark.whole
def test_a_compiled_engine_stops_and_goes_on() -> None:
    async def main() -> None:
        async with engine(config=Config(compile=True)) as found:
            first = await painted(found, "a", seed=3, **CALL)
            await stops(found)
            assert (await painted(found, "a", seed=3, **CALL)).images[0].tobytes() == first.images[0].tobytes()

    run(main)


def test_ranks_that_cannot_start_say_why() -> None:
    async def main() -> None:
        lost = [sys.executable, "-c", "raise SystemExit('no such ranks')"]
        with pytest.raises(RankError, match="cannot be started: rank 0 ended with exit code 1"):
            async with AsyncEngine("emoji", command=lost):
                raise AssertionError("it started")

    run(main)


def test_an_engine_that_is_not_started_or_is_closed_says_so() -> None:
    async def main() -> None:
        found = AsyncEngine("emoji")
        with pytest.raises(RankError, match="async with"):
            await painted(found, "a")
        await found.close()

    run(main)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "emojy"}, "did you mean 'emoji'"),
        ({"ranks": 0}, "ranks=0"),
        ({"ranks": 3, "config": Config(parallel=Parallel(cfg=2))}, "parallel"),
        ({"loras": "/nowhere"}, "/nowhere"),
        ({"max_loras": 0}, "max_loras=0"),
        ({"probe_s": 0.0}, "probe_s=0.0"),
    ],
)
def test_wrong_engines_are_refused_before_anything_starts(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        AsyncEngine(**{"model": "emoji"} | options)  # pyright: ignore[reportArgumentType]
    assert isinstance(refused.value, ModelError) == ("model" in options)


def test_failures_are_raised_as_what_they_were() -> None:
    kinds = {"invalid": ConfigError, "memory": MemoryLimitError, "unsupported": UnsupportedError}
    for kind, error in kinds.items():
        assert type(_error(Failed(call="c", kind=kind, message="m"))) is error
    assert type(_error(Failed(call="c", kind="internal", message="m"))) is ParafuseError


def test_it_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from parafuse.launch.serve.async_engine import AsyncEngine\n"
        "AsyncEngine('emoji', ranks=2)\n"
        "sys.exit(str([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules] or ''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=child_env(), capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_the_example_serves_lines(tmp_path: Path) -> None:
    async def main() -> None:
        service = await asyncio.create_subprocess_exec(
            *(sys.executable, str(ROOT / "examples" / "asyncio_service.py"), "--port", "0"),
            env=child_env(),
            stdout=subprocess.PIPE,
        )
        try:
            assert service.stdout is not None
            said = (await asyncio.wait_for(service.stdout.readline(), 2 * PATIENCE_S)).decode()
            host, _, port = said.removeprefix("listening at ").strip().rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=4 << 20)
            for request in ({"prompt": "a", "seed": 7} | CALL, {"prompt": "a", "width": 33}, {"nothing": 1}):
                writer.write(json.dumps(request).encode() + b"\n")
            writer.write(b"no json\n")
            writer.write_eof()
            answers = [json.loads(line) async for line in reader]
            assert answers[:4] == [{"step": number, "of": 4} for number in range(1, 5)]
            assert answers[4]["seed"] == 7
            assert Image.open(io.BytesIO(base64.b64decode(answers[4]["png"]))).size == (32, 32)
            assert ["error" in answer for answer in answers[5:]] == [True, True, True]
            writer.close()
            # One that hangs up does not keep the next one waiting.
            _, leaving = await asyncio.open_connection(host, int(port))
            leaving.write(json.dumps({"prompt": "a", "num_inference_steps": 100_000}).encode() + b"\n")
            await leaving.drain()
            leaving.transport.abort()
            reader, writer = await asyncio.open_connection(host, int(port), limit=4 << 20)
            writer.write(json.dumps({"prompt": "b"} | CALL).encode() + b"\n")
            writer.write_eof()
            answers = [json.loads(line) async for line in reader]
            assert "png" in answers[-1]
            writer.close()
            service.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(service.wait(), PATIENCE_S) == 0
        finally:
            if service.returncode is None:
                service.kill()
                await service.wait()

    run(main)
