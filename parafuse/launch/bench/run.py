"""Measures the variants of a case, interleaved: each round runs every one of them once, in another order."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
import torch.distributed as dist

from parafuse.cache import cache_of
from parafuse.config import Config
from parafuse.engine.receipt import plain, versions
from parafuse.engine.request import check_call
from parafuse.engine.targets import DENOISERS, denoisers
from parafuse.hardware import cores, hardware
from parafuse.launch.bench.case import PACKAGES, Case, Variant
from parafuse.launch.bench.clock import Times, timed, wait
from parafuse.launch.bench.contestant import Contestant, call_of
from parafuse.launch.bench.fidelity import compare_outputs, over_prompts
from parafuse.launch.bench.files import write_file
from parafuse.launch.bench.model import Loaded
from parafuse.launch.bench.peers import PEERS
from parafuse.launch.bench.profiled import shares
from parafuse.launch.bench.record import NotAppliedError, Record, Row, commit, short_hardware, today
from parafuse.launch.bench.work import Rates, Work, counted, rates
from parafuse.launch.prompts import first_prompts
from parafuse.log import note
from parafuse.parallel import absent
from parafuse.parallel.world import ensure_world, wait_for
from parafuse.quantization import quantize_of

PROFILED_STEPS = 3
"""Of the request whose second step is looked at."""
FEWEST_ROUNDS = 2
"""That give a spread, also where the time is over."""
RECOMPILES = 256
"""Graphs of one piece of code. torch's own limit, 8, is for one model; here each variant has its own."""
LONGEST_S = 86_400.0
"""How long a rank waits for one that paints alone. A rank that dies ends the others through their launcher."""


@dataclass
class Entry:
    """One variant while it is measured; `contestant` None on ranks that it does not use, and where it failed."""

    variant: Variant
    row: Row
    contestant: Contestant | None = None
    output: Any = None
    """Of the first request; where rounds have prompts of their own, of the last one."""
    parts_s: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """By round, on this rank."""


class Run:
    """One case on the ranks of this world. Made and used by every rank alike."""

    def __init__(self, case: Case, loaded: Loaded, rounds: int, config: Config, budget_s: float | None = None):
        self.case, self.loaded, self.rounds = case, loaded, rounds
        self.prompts = first_prompts(loaded.source, case.prompts)[:rounds]
        """One for each round; none: the case's own call in all of them."""
        self.deadline = math.inf if budget_s is None else time.monotonic() + budget_s - loaded.load_s
        self.timeout_s = config.timeout_s
        self._parts_done = 0
        self.link = absent.Link(**case.link)
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = loaded.device
        self.threads = max(1, cores() // self.ranks)
        torch.set_num_threads(self.threads)
        if self.ranks > 1:
            ensure_world(self.device.type, config.timeout_s)
        if case.largest_share > 1:
            absent.enter(case.largest_share, config.timeout_s)
        self.rank = dist.get_rank() if self.ranks > 1 else 0
        self.steps = 0
        """Of a request, as the pipeline called back."""
        self.entries = [Entry(v, _row(v, self.ranks)) for v in case.variants]

    def measure(self, starts_s: dict[str, dict[str, float]], then: Callable[[Run], None] = lambda run: None) -> Record:
        """The record, the same on rank 0 alone as anywhere; others get one without figures of their own.

        `then`: what is done with the variants before they are closed."""
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES):  # of all variants together: they share their code
            try:
                work, speeds = self._work()
                for entry in self.entries:
                    self._begin(entry)
                for number in range(self.rounds):
                    alive = [entry for entry in self.entries if not entry.row.error]
                    if number >= FEWEST_ROUNDS and self._is_over():
                        break
                    for entry in alive[number % len(alive) :] + alive[: number % len(alive)]:
                        self._time(entry, number)
                    if self.prompts:
                        self._judge_all()
                self._finish()
                then(self)
            finally:
                for entry in self.entries:
                    self._close(entry)
                if self.case.largest_share > 1:
                    absent.leave()
        return self._record(work, speeds, starts_s)

    def _is_over(self) -> bool:
        """Whether the time that was given has passed on some rank. Collective."""
        return any(self._together(time.monotonic() > self.deadline))

    def _close(self, entry: Entry) -> None:
        """Takes a variant off. What another engine has left in its way is told, not raised."""
        contestant, entry.contestant = entry.contestant, None
        try:
            if contestant:
                contestant.close()
        except Exception as failure:
            note(f"{entry.variant.name}: could not be taken off ({failure})")

    def first_picture(self) -> None:
        """Paints with the one variant. Collective."""
        (entry,) = self.entries
        contestant = self._contestant(entry)
        contestant.paint(self._call(entry))
        contestant.close()

    def paint(self, entry: Entry, more: dict[str, Any]) -> Any:
        """One request of a variant with other keywords; None on ranks that it does not use. Collective on all."""

        def paint() -> Any:
            return entry.contestant.paint(self._call(entry) | more) if entry.contestant else None

        return self._guarded(entry, paint)

    def _contestant(self, entry: Entry) -> Contestant:
        return Contestant(entry.variant, self.loaded.pipeline, entry.row.ranks, self.device, self.timeout_s)

    def _keywords(self, entry: Entry | None, number: int = 0) -> dict[str, Any]:
        """Of the call in a round; of a variant, with its own."""
        prompt = {"prompt": self.prompts[number]} if self.prompts else {}
        return self.case.call | prompt | (entry.variant.call if entry else {})

    def _call(self, entry: Entry | None, number: int = 0) -> dict[str, Any]:
        """With the model's defaults and the round's noise."""
        keywords = check_call(self.loaded.source, self._keywords(entry, number))
        return call_of(keywords, self.case.seed + (number if self.prompts else 0))

    def _may_fail(self, entry: Entry) -> bool:
        """Another engine's failure is a row, as is one that the case allows; ours is no record."""
        return entry.variant.may_fail or entry.variant.way in PEERS

    def _uses(self, entry: Entry) -> bool:
        return self.rank < entry.row.ranks

    def _together(self, value: Any) -> list[Any]:
        """What every rank says. Collective."""
        if self.ranks == 1:
            return [value]
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, value)
        return everyone

    def _guarded(self, entry: Entry, part: Callable[[], Any]) -> Any:
        """Runs a part of an entry where it is used; an error on any rank ends the entry on all. Collective."""
        error, found = "", None
        if self._uses(entry):
            try:
                found = part()
            except Exception as failure:
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]
        self._wait_for_all()
        errors = [text for text in self._together(error) if text]
        if errors:
            self._fail(entry, errors[0])
        return found

    def _fail(self, entry: Entry, why: str) -> None:
        """Ends an entry. Called on every rank alike."""
        if not self._may_fail(entry):
            raise NotAppliedError(f"variant {entry.variant.name!r}: {why}")
        entry.row.error = why
        self._close(entry)
        note(f"{entry.variant.name}: {why}")

    def _wait_for_all(self) -> None:
        """Until every rank is here. One may paint alone for longer than an exchange would wait."""
        if self.ranks == 1:
            return
        self._parts_done += 1
        store = dist.distributed_c10d._get_default_store()
        key = f"parafuse/bench/{self._parts_done}"
        store.set(f"{key}/{self.rank}", "1")
        for other in range(self.ranks):
            wait_for(store, f"{key}/{other}", time.monotonic() + LONGEST_S)

    def _work(self) -> tuple[Work, Rates]:
        """Of one step of the case as plain torch does it, and of this device. The others wait."""
        work, speeds = Work(), Rates(1.0, 1.0, 1.0)
        if self.rank == 0:
            modules = [module for _, module in denoisers(self.loaded.pipeline, DENOISERS)]
            call = call_of(check_call(self.loaded.source, self._keywords(None) | {"num_inference_steps": 1}), 0)
            with counted(modules) as work:
                self.loaded.pipeline(**call)
            speeds = rates(self.device, self.loaded.dtype)
        self._wait_for_all()
        return work, speeds

    def _begin(self, entry: Entry) -> None:
        """Makes an entry ready and paints its first pictures, which are not timed."""

        def begin() -> None:
            begun = time.perf_counter()
            entry.contestant = self._contestant(entry)
            entry.output = entry.contestant.paint(self._call(entry))
            wait(self.device)
            entry.row.first_s = time.perf_counter() - begun
            entry.row.compile_s = entry.contestant.compile_s
            for _ in range(self.case.warm_ups - 1):
                entry.contestant.paint(self._call(entry))
            entry.contestant.counts.clear()

        if entry.variant.name != self.case.baseline and self._is_over():
            entry.row.error = "not measured: the time that was given was over"
            return
        self._guarded(entry, begin)

    def _time(self, entry: Entry, number: int) -> None:
        def once() -> tuple[Times, int]:
            if entry.contestant is None:
                raise RuntimeError("nothing to time")
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            parts = entry.contestant.parts
            output, times = timed(
                entry.contestant.paint,
                self._call(entry, number),
                self.device,
                steps=self.loaded.calls_back,
                first_step=lambda: parts.first_step,
            )
            entry.parts_s.append(parts.seconds() | (write_file(output) if self.rank == 0 else {}))
            self.steps = times.number
            if self.prompts:
                entry.output = output
            return times, self._memory()

        found = [x for x in self._together(self._guarded(entry, once)) if x is not None]
        if entry.row.error:
            return
        entry.row.total_s.append(max(times.total for times, _ in found))
        if all(times.steps for times, _ in found):
            entry.row.step_s.append(max(statistics.median(times.steps) for times, _ in found))
        before = entry.row.memory_bytes or [0] * len(found)
        entry.row.memory_bytes = [max(old, new) for old, (_, new) in zip(before, found, strict=True)]

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def _finish(self) -> None:
        """Counters, profiles and pictures, and whether every option did what it was asked for. Collective."""
        baseline = self._baseline
        missing: list[str] = []
        for entry in [entry for entry in self.entries if not entry.row.error]:
            idle = self._guarded(entry, lambda entry=entry: self._look_back(entry))
            everyone = list(dict.fromkeys(why for said in self._together(idle or []) for why in said))
            if everyone and not entry.row.error and self._may_fail(entry):
                self._fail(entry, f"did not act: {'; '.join(everyone)}")  # it has no figures to show
            elif everyone:
                missing += [f"{entry.variant.name}: {why}" for why in everyone]
            elif entry is not baseline and entry.row.share_of == 1 and not self.prompts:
                self._guarded(entry, lambda entry=entry: self._judge(entry, baseline))
        if missing:
            raise NotAppliedError(f"nothing is recorded, since what was asked for did not act: {'; '.join(missing)}")

    def _look_back(self, entry: Entry) -> list[str]:
        """Fills in what the rounds have shown; what did not act."""
        if entry.contestant is None:
            raise RuntimeError("nothing to look at")
        rounds = len(entry.parts_s)
        entry.row.counts = {name: number / rounds for name, number in entry.contestant.counts.items()}
        parts = dict.fromkeys(part for found in entry.parts_s for part in found)
        entry.row.parts_s = {
            part: statistics.median(found[part] for found in entry.parts_s if part in found) for part in parts
        }
        if entry.row.share_of > 1:
            entry.row.wire_s = self.link.seconds(entry.row.counts)
        entry.row.shares, exchanges = self._profile(entry)
        entry.row.degrees = entry.contestant.degrees
        return entry.contestant.missing(exchanges)

    @property
    def _baseline(self) -> Entry:
        return next(entry for entry in self.entries if entry.variant.name == self.case.baseline)

    def _judge(self, entry: Entry, baseline: Entry) -> None:
        if self.rank == 0:
            entry.row.quality = compare_outputs(entry.output, baseline.output, self._call(entry))

    def _judge_all(self) -> None:
        """The pictures of a round that has a prompt of its own, together with those of earlier ones. Collective."""
        baseline = self._baseline
        for entry in [entry for entry in self.entries if entry is not baseline and not entry.row.error]:
            self._guarded(entry, lambda entry=entry: self._judge(entry, baseline))
            for name, value in entry.row.quality.items():
                entry.row.quality_by_round.setdefault(name, []).append(value)
            entry.row.quality = over_prompts(entry.row.quality_by_round)

    def _profile(self, entry: Entry) -> tuple[dict[str, float], int]:
        if entry.contestant is None:
            raise RuntimeError("nothing to profile")
        call = self._call(entry)
        if self.loaded.calls_back and call.get("num_inference_steps", 0) > PROFILED_STEPS:
            call["num_inference_steps"] = PROFILED_STEPS
        has_second = self.loaded.calls_back and self.steps != 1
        return shares(entry.contestant.paint, call, self.device, steps=has_second)

    def _versions_of_others(self) -> dict[str, str]:
        """Package -> version of other engines in this case."""
        ways = [entry.variant.way for entry in self.entries]
        modules = dict.fromkeys(PACKAGES[way] for way in ways if way in PACKAGES)
        return {name: importlib.metadata.version(name) for name in modules if importlib.util.find_spec(name)}

    def _record(self, work: Work, speeds: Rates, starts_s: dict[str, dict[str, float]]) -> Record:
        machine = asdict(hardware())
        number, dirty = commit()
        own = ("generator", "prompt") if self.prompts else ("generator",)
        return Record(
            theme=self.case.theme,
            case=self.case.name,
            model=self.case.model,
            baseline=self.case.baseline,
            call={name: value for name, value in plain(self._call(None)).items() if name not in own},
            hardware=short_hardware(self.loaded.gpu, self.ranks),
            machine=machine,
            versions=versions() | self._versions_of_others(),
            commit=number,
            dirty=dirty,
            date=today(),
            ranks=self.ranks,
            threads=self.threads,
            device=self.device.type,
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            work=asdict(work),
            rates=asdict(speeds),
            load_s=self.loaded.load_s,
            steps=self.steps,
            whole_steps=self.case.whole_steps,
            prompts=list(self.prompts[: len(self._baseline.row.total_s)]),
            link=asdict(self.link) if self.case.largest_share > 1 else {},
            starts_s=starts_s,
            rows=[entry.row for entry in self.entries],
        )


def _row(variant: Variant, there: int) -> Row:
    """Without figures yet."""
    cache = cache_of(variant.cache or None)
    return Row(
        name=variant.name,
        way=variant.way,
        ranks=variant.ranks(there),
        compile=variant.compile,
        quantize=method.brief if (method := quantize_of(variant.quantize or None)) else "",
        attention=variant.attention,
        sparse=variant.sparse,
        cache=cache.brief if cache else "",
        threshold=variant.threshold,
        share_of=variant.share_of,
    )
