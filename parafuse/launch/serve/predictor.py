"""What calls take by the planner's prediction, in a process of its own: following a model takes seconds of Python, and
the supervisor's event loop must not wait for them.

`python -m parafuse.launch.serve.predictor` reads a JSON object from each line of its input and answers with one. It is
started when something is asked, ends when nothing is asked for a while, and dies with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from parafuse.config import Config
from parafuse.parallel.rank_entry import PARENT_ENV, enter

if TYPE_CHECKING:
    from parafuse.engine.planning.cost import Candidate, Costs
    from parafuse.engine.planning.facts import Facts

MODULE = "parafuse.launch.serve.predictor"
ANSWER_S = 600.0
"""Within which a prediction is there, the imports included; a video model on a busy machine takes a minute."""
IDLE_S = 1800.0
"""Without a question, until the process gives its memory back; the next question then waits for its imports."""
AGAIN_S = 60.0
"""After a process that ended by itself, before another one is started."""
MAX_LINE_BYTES = 1 << 20
EXACT_FROM = 0.5
"""Of a device's memory: a request that takes more is followed once more, operator by operator."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Of one kind of call."""

    steps: int
    """Where the call does not name them."""
    seconds: Mapping[int, tuple[float, float]]
    """Pictures in a call -> (seconds beside the steps, seconds of a step)."""
    peak_bytes: Mapping[int, int]
    """Pictures in a call -> the most of a device's memory."""
    capacity_bytes: int | None

    def of(self, pictures: int, steps: int | None) -> float | None:
        found = self.seconds.get(pictures)
        return None if found is None else found[0] + found[1] * (self.steps if steps is None else steps)


class Predictor:
    """The other end of that process. One question at a time; to be used on one event loop."""

    def __init__(self, model: str, config: Config, num_ranks: int):
        self._told = {"model": model, "config": config.to_dict(), "num_ranks": num_ranks}
        self._one = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._not_before = 0.0
        self._used = 0.0
        self._ending: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("parafuse.estimates")

    @property
    def rests(self) -> bool:
        """Whether it has failed, and nothing is asked for a while."""
        return time.monotonic() < self._not_before

    async def ask(self, call: Mapping[str, Any], pictures: tuple[int, ...], *, cache: bool) -> Predicted | None:
        """None where it cannot be predicted; why is in the log."""
        async with self._one:
            if self.rests:
                return None
            question = {"call": dict(call), "pictures": pictures, "cache": cache}
            try:
                async with asyncio.timeout(ANSWER_S):
                    found = await self._asked(question)
            except (OSError, ValueError, EOFError) as error:  # TimeoutError too
                self._log.error("predictor ended", error=f"{type(error).__name__}: {error}")
                self._not_before = time.monotonic() + AGAIN_S
                await self._end()
                return None
            except asyncio.CancelledError:  # its answer would be taken for that of the next question
                await self._end()
                raise
            if "error" in found:
                self._log.info("not predicted", call=call, error=found["error"])
                return None
            return _predicted(found)

    async def close(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        await self._end()

    async def _asked(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", MODULE,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=MAX_LINE_BYTES,
                env={**os.environ, PARENT_ENV: str(os.getpid()), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            self._write(process, self._told)
        self._write(process, question)
        if process.stdin is None or process.stdout is None:
            raise EOFError("no pipes")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise EOFError(f"exit code {await process.wait()}")
        self._used = time.monotonic()
        if self._ending is None or self._ending.done():
            self._ending = asyncio.create_task(self._end_when_idle())
        return json.loads(line)

    @staticmethod
    def _write(process: asyncio.subprocess.Process, values: dict[str, Any]) -> None:
        if process.stdin is not None:
            process.stdin.write(json.dumps(values).encode() + b"\n")

    async def _end_when_idle(self) -> None:
        """Gives its memory back."""
        while (left := self._used + IDLE_S - time.monotonic()) > 0:
            await asyncio.sleep(left)
        async with self._one:
            await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _predicted(found: dict[str, Any]) -> Predicted:
    return Predicted(
        steps=int(found["steps"]),
        seconds={int(number): (float(a), float(b)) for number, (a, b) in found["seconds"].items()},
        peak_bytes={int(number): int(most) for number, most in found["peak_bytes"].items()},
        capacity_bytes=found["capacity_bytes"],
    )


# the process


def main() -> int:
    """Answers until its input ends."""
    enter()
    from parafuse.launch import quiet

    quiet.silence_libraries()
    os.nice(5)  # the ranks' own work comes first
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    told = json.loads(sys.stdin.readline() or "null")
    if told is not None:
        _answer(told, sys.stdin, answers)
    return 0


def _answer(told: dict[str, Any], questions: TextIO, answers: TextIO) -> None:
    from parafuse.errors import ParafuseError

    for line in questions:
        question = json.loads(line)
        try:
            found = predict_call(told["model"], Config.from_dict(told["config"]), told["num_ranks"], **question)
        except ParafuseError as error:
            found = {"error": str(error).partition("\n")[0]}
        except Exception as error:  # one model's fault must not end the others' predictions
            found = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        answers.write(json.dumps(found) + "\n")


def predict_call(
    model: str, config: Config, num_ranks: int, *, call: dict[str, Any], pictures: list[int], cache: bool
) -> dict[str, Any]:
    """`Predicted`, as JSON has it. `pictures`: in one call; the first is one job's. Takes seconds for a new size, and
    next to nothing where the planner has kept its facts. Raises ParafuseError."""
    import dataclasses

    from parafuse.engine.planner import computes_in, resolve
    from parafuse.engine.planning import choose
    from parafuse.engine.planning.cost import Costs
    from parafuse.engine.request import NUM_PICTURES
    from parafuse.engine.source import locate
    from parafuse.launch.learning import candidate_of
    from parafuse.launch.plan import PlanJob, Planning, predicted

    source = locate(model, allow_pickle=config.allow_pickle)
    device = computes_in(config, num_ranks)
    first = pictures[0]
    call = {name: value for name, value in call.items() if name != "num_inference_steps"}
    facts = _facts([{**call, name: first} for name in NUM_PICTURES] if first > 1 else [call], source, config, device)
    machine = choose.machine_at_hand(num_ranks, *device)
    config = choose.choose(config, source, num_ranks, device, facts[1]).config
    plan = resolve(config, source, num_ranks)
    one = candidate_of(plan)
    costs = Costs(facts[0], machine, choose.corrections_of(machine, *device))
    one = one if cache else dataclasses.replace(one, cache="")
    peak = costs.cost(one, pictures=first).memory_bytes
    capacity = machine.device.memory_bytes
    if capacity and peak > EXACT_FROM * capacity:
        asked = PlanJob(planning=Planning(), source=source, config=config, ranks=num_ranks, call=facts[1], machine=None)
        peak = predicted(asked, plan).nbytes
    weights = sum(facts[0].weights.values())
    return {
        "steps": facts[0].steps,
        "seconds": {number: _seconds(costs, one, number) for number in pictures},
        # of several jobs at the most: all that is not weights as often as there are jobs
        "peak_bytes": {number: int(peak + max(0.0, peak - weights) * (number / first - 1)) for number in pictures},
        "capacity_bytes": int(capacity) or None,
    }


def _facts(
    calls: list[dict[str, Any]], source: Any, config: Config, device: tuple[str, str]
) -> tuple[Facts, dict[str, Any]]:
    """Of the first call that the pipeline takes, and that call."""
    from parafuse.engine.planning import choose
    from parafuse.errors import ConfigError

    for call in calls[:-1]:
        with contextlib.suppress(ConfigError):
            return choose.facts_of(source, config, device, call), call
    return choose.facts_of(source, config, device, calls[-1]), calls[-1]


def _seconds(costs: Costs, one: Candidate, pictures: int) -> tuple[float, float]:
    cost = costs.cost(one, pictures=pictures)
    return cost.encode_s + cost.decode_s, cost.denoise.total / costs.facts.steps


if __name__ == "__main__":
    sys.exit(main())
