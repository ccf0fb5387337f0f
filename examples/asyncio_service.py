"""A service of one's own around `AsyncEngine`: plain asyncio, no HTTP. Run it, and speak to it in lines of JSON:

    python examples/asyncio_service.py --ranks 2 --port 7001
    echo '{"prompt": "a red apple", "seed": 7, "num_inference_steps": 8}' | nc -q -1 127.0.0.1 7001

Each request is a line; its answers are lines with `step` and `of`, last one with `png` (base64) and `seed`, or with
`error`. A connection's requests are painted one after the other, and those of all connections in the order in which
they came. Hanging up stops what is being painted for the connection."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import signal
from contextlib import aclosing
from typing import Any

from parafuse import AsyncEngine, ParafuseError, Result

LONGEST_LINE = 64 << 10
ALLOWED = {"prompt", "seed", "num_inference_steps", "width", "height"}


class Service:
    """Answers connections with one engine."""

    def __init__(self, engine: AsyncEngine):
        self._engine = engine

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while line := await self._line(reader, writer):
                await self._answer(line, writer)
        except ConnectionError:
            pass  # seen when the next step is told; that has ended the call on all ranks
        finally:
            writer.close()

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        try:
            return await reader.readline()
        except ValueError:  # longer than the reader's limit
            await say(writer, {"error": f"a request is a line of at most {LONGEST_LINE} bytes."})
            return b""

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            asked = asked_for(line)
            async with aclosing(self._engine.generate(**asked)) as events:
                async for event in events:
                    if isinstance(event, Result):
                        png = io.BytesIO()
                        event.images[0].save(png, format="PNG")
                        await say(writer, {"seed": event.seed, "png": base64.b64encode(png.getvalue()).decode()})
                    else:
                        await say(writer, {"step": event.step, "of": event.of})
        except ParafuseError as error:
            await say(writer, {"error": str(error)})


def asked_for(line: bytes) -> dict[str, Any]:
    """The keywords of a request. Raises ParafuseError for one that is none."""
    try:
        asked = json.loads(line)
    except ValueError as error:
        raise ParafuseError(f"a request is a line of JSON ({error}).") from error
    if not isinstance(asked, dict) or "prompt" not in asked or not asked.keys() <= ALLOWED:
        raise ParafuseError(f"a request is an object with a prompt, and of these: {', '.join(sorted(ALLOWED))}.")
    return asked


async def say(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()


async def main(model: str, ranks: int, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM."""
    over = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    async with AsyncEngine(model, ranks=ranks) as engine:
        server = await asyncio.start_server(Service(engine).serve, host, port, limit=LONGEST_LINE)
        address = server.sockets[0].getsockname()
        print(f"listening at {address[0]}:{address[1]}", flush=True)
        await over.wait()
        server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7001, help="0: any that is free")
    given = parser.parse_args()
    asyncio.run(main(given.model, given.ranks, given.host, given.port))
