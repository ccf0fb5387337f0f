"""What an engine's ranks do together: requests one by one, several on their way, and acts on the pipeline."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch

from parafuse.engine.adapters import fitting
from parafuse.engine.apply import Handle
from parafuse.engine.calls import call_keywords, generators_in, with_noise
from parafuse.engine.compiling import Compiling
from parafuse.engine.devices import refuse_numbered
from parafuse.engine.modular import continues
from parafuse.engine.overlap.lane import Lane, Pending, Ticket
from parafuse.engine.overlap.watch import alike, refusal, unknown
from parafuse.engine.plan import Plan
from parafuse.engine.planning.search import Found
from parafuse.engine.quantized import weights_of
from parafuse.engine.receipt import plain, versions
from parafuse.engine.request import SAME_CALL, facts, fresh_seed
from parafuse.engine.running import SAME_PIPELINE, Running
from parafuse.engine.source import ModelSource
from parafuse.engine.state import PipelineState, components_of
from parafuse.engine.surface import Act, Surface
from parafuse.engine.targets import DENOISERS, autoencoders, denoisers
from parafuse.engine.workers import Workers
from parafuse.errors import ConfigError, RankError, RankMismatchError
from parafuse.log import note
from parafuse.parallel.placeholder import settled
from parafuse.parallel.world import SAME_ARGUMENTS, World


class Together(Surface):
    """The requests of an engine, on all of its ranks."""

    plan: Plan
    """What runs: every degree, dtype and device."""
    handle: Handle
    receipt: dict[str, Any]
    """The record of the last request that ended well, ready for JSON."""
    world: World
    """What this engine's ranks say to each other."""
    chosen: Found | None
    """What the planner has found, where it has chosen the layout; the other plans are in it."""
    loaded: dict[str, str]
    """What of a saved engine is used, a line for each part; empty where none was loaded."""
    _family: list[Any]
    """All engines over the same ranks, the first one's parent first; the same order on every rank, closed ones None."""
    _source: ModelSource
    _state: PipelineState
    _workers: Workers | None
    _progress: bool
    _lane: Lane
    """Requests on their way, of all engines over the same ranks."""
    _inside: threading.local
    """`busy` of a thread: whether it does what all ranks do."""
    _load_s: float
    _loading: list[dict[str, Any]]
    _closed: bool
    _compiling: Compiling | None

    @abstractmethod
    def _put_on(self) -> None:
        """Puts on all that the plan says. Collective."""

    @property
    def _feeds_ranks(self) -> bool:
        return self._workers is not None

    @property
    def rank(self) -> int:
        """This process's global rank; the pictures are the same on all of them."""
        return self.world.rank

    def __call__(self, *args: Any, seed: int | Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The pipeline's own call, on all ranks: same arguments, same output, the same on every rank.

        `seed` makes the noise with a CPU generator, so that it does not depend on the device (several: one for each
        picture); without it, and without `generator`, one is drawn and told in the receipt. The model's own defaults
        fill in what is not given. Under a launcher every rank calls it with the same arguments. Raises ConfigError
        before anything runs."""
        keywords, seed = self._asked(args, kwargs, seed)
        return self._everywhere(
            {"do": "run", "keywords": keywords, "seed": seed}, keywords, lambda: self.run(keywords, seed)
        )

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any], seed: Any) -> tuple[dict[str, Any], Any]:
        """(keywords, seed) of a call, checked."""
        self._refuse_if_over()
        keywords = call_keywords(self.pipeline, self._source, self.plan, args, kwargs)
        if seed is not None and "generator" in keywords:
            raise ConfigError(f"seed={seed}: given beside generator; leave one out.")
        if seed is None and "generator" not in keywords and not continues(keywords):
            seed = self.world.share("seed", fresh_seed)
        return keywords, seed

    def submit(self, *args: Any, seed: int | Sequence[int] | None = None, **kwargs: Any) -> Pending:
        """Begins a call, and comes back at once: `result()` is its output, and then `receipt` its record. Under a
        launcher every rank calls it, in the same order.

        It begins once the one before has denoised, and denoises while that one decodes: pictures are the same, and
        both need their memory at once. Where that cannot be (docs/overlap.md) it begins once the one before has ended,
        and the receipt says why. Raises what a call raises before anything runs; `result()` the rest."""
        keywords, seed = self._asked(args, kwargs, seed)
        with self._lane.entering():
            try:
                if self._workers:
                    request = {"engine": self._family.index(self), "do": "submit", "keywords": keywords, "seed": seed}
                    self._workers.send(request, keywords)
                return self._begin(keywords, seed)
            except BaseException as error:
                self.world.broken |= not isinstance(error, Exception)  # nobody knows what the others have got
                raise

    def _begin(self, keywords: dict[str, Any], seed: int | Sequence[int] | None) -> Pending:
        """Inside of the lane's `entering`."""
        if not self.plan.changes_nothing and not self.handle.stands_on(self.pipeline):
            self._lane.rest()  # what is new is seen to first
            self._lane.forget()

        def paint(ticket: Ticket) -> tuple[Any, dict[str, Any]]:
            with self._together():
                return self._run(keywords, seed, ticket)

        key = (self.world.name, self._family.index(self), *alike(keywords))
        why_not = unknown(keywords) or refusal(self.pipeline, self.handle)
        return self._lane.begin(key, why_not, self.world.device, paint)

    def map(self, calls: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """The outputs of several calls, in their order: each is decoded while the next one denoises (`submit`), which
        begins before an output is given. `receipt` is that of the output given last. Under a launcher every rank asks
        for all of them. Raises what a call raises, at its turn; no more are begun then."""
        before: Pending | None = None
        try:
            left: Iterator[Mapping[str, Any] | None] = chain(calls, [None])
            while True:
                now, wrong = None, None
                try:
                    call = next(left)
                    now = None if call is None else self.submit(**call)
                except Exception as error:  # told when the one before was given
                    wrong = error
                if before is not None:
                    output, self.receipt = before.result(), before.receipt
                    yield output
                if wrong is not None:
                    raise wrong
                if now is None:
                    return
                before = now
        except BaseException as error:
            if not isinstance(error, (Exception, GeneratorExit)):
                self.world.broken = True
                self._lane.stop()
            raise
        finally:
            self._lane.drain()

    def __getattr__(self, name: str) -> Any:
        """As a member of the pipeline, once no request is under way."""
        if not name.startswith("_") and "_lane" in vars(self):
            self._lane.wait()
        return super().__getattr__(name)

    def raise_lost(self) -> None:
        """Raises what a request on its way has raised, if a rank was lost by it."""
        self._lane.raise_lost()

    def _refuse_if_over(self) -> None:
        if self._closed:
            raise ConfigError("engine: it is closed; make a new one.")
        if self.world.broken:
            way_out = "make a new engine" if self._workers else "start all ranks again"
            raise ConfigError(f"engine: a rank was lost in an earlier request; {way_out}.")

    def _everywhere(self, request: dict[str, Any], values: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Runs something here, and `request`, which says the same, on the ranks that this engine started."""
        self._lane.drain()
        if self._workers:
            self._workers.send({"engine": self._family.index(self), **request}, values)
        with self._together():
            return run()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around what all ranks do, in any thread."""
        self._inside.busy = True
        try:
            yield
        except BaseException as error:
            is_agreed = isinstance(error, RankMismatchError) and not self.world.broken  # every rank has raised it
            is_lost = isinstance(error, RankError) or not isinstance(error, Exception)
            if self._workers and (self.world.broken or (is_lost and not is_agreed)):
                self.world.broken = True
                self._workers.explain(error)
            raise
        finally:
            self._inside.busy = False

    @property
    def _busy(self) -> bool:
        """Whether this thread does what all ranks do."""
        return getattr(self._inside, "busy", False)

    def _agree(self, method: str, values: dict[str, Any], way_out: str = SAME_ARGUMENTS) -> None:
        """Raises RankError unless all ranks are asked for the same; collective, also for ranks that call another."""
        self.world.agree("a request", facts(values | {"method": method}), way_out=way_out)

    def use_cache(self, on: bool) -> None:
        """Whether requests from now on use the cache that the config has: without it their pictures are bitwise those
        of an engine that has none. Under a launcher every rank calls it. Nothing happens where there is no cache."""
        self._refuse_if_over()
        self._everywhere({"do": "use_cache", "on": on}, {"on": on}, lambda: self._use_cache(on))

    def _use_cache(self, on: bool) -> None:
        self._agree("use_cache", {"on": on})
        self.handle.skips_cache = not on

    def act(self, act: Act) -> Any:
        """A method of the pipeline, or of a part of it, on all ranks. Under a launcher every rank calls it.

        Gives what it gives here. Raises what it raises; RankError when ranks were given different arguments."""
        self._refuse_if_over()
        act = act.referring(self.pipeline)
        if self.world.size > 1:
            refuse_numbered(str(act), act.values())
        return self._everywhere({"do": "act", "act": act}, act.values(), lambda: self._act(act))

    def _act(self, act: Act) -> Any:
        """On this rank."""
        self._agree(str(act), act.values())
        self._lane.forget()
        self.world.share_noise()
        self.handle.rounds.forget()
        before = components_of(self.pipeline)
        with self.world.request(), fitting(act, self.pipeline):
            result = settled(act.do(self.pipeline, **dict.fromkeys(act.own_device, self.world.device)))
        try:
            self._follow_changes()
        except Exception:
            for name, part in before.items():
                if getattr(self.pipeline, name, None) is not part:
                    setattr(self.pipeline, name, part)
            raise
        self.plan = act.changed(self.plan)
        self._state.let_go()
        return self if result is self.pipeline else result

    def _follow_changes(self) -> None:
        """Puts everything on what is new where a component was replaced. Raises ConfigError for one that cannot be
        split, before anything is changed."""
        if self.plan.changes_nothing:
            return
        if self.handle.mesh is None and not self.handle.quantized and not self.handle.is_off:
            if denoisers(self.pipeline, DENOISERS, required=False):
                self._put_on()
        elif not self.handle.stands_on(self.pipeline):
            self.handle.renew(self.pipeline)
            note("components were replaced: parafuse was put on the new ones")

    def run(self, keywords: dict[str, Any], seed: int | Sequence[int] | None) -> Any:
        """One checked request on this rank. Every rank runs it; an error on one rank is an error on all."""
        output, self.receipt = self._run(keywords, seed)
        return output

    def _run(
        self, keywords: dict[str, Any], seed: int | Sequence[int] | None, ticket: Ticket | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """(output, receipt). `ticket`: of a request that others may overlap."""
        overlaps = ticket is not None and ticket.may_hand_over
        own = [name for name, _ in autoencoders(self.pipeline)]
        self._agree("__call__", keywords | {"seed": seed, "overlaps": ticket is not None}, SAME_CALL)
        if self.world.size > 1:  # an autoencoder may be in the middle of a decode
            facts_now = self._state.facts(self.handle.owners(), lambda name: not (overlaps and name in own))
            self.world.agree("a pipeline", facts_now, way_out=SAME_PIPELINE)
        self._follow_changes()
        running = Running(
            self.pipeline,
            self.plan,
            self.handle,
            self.world,
            compiling=self._compiling,
            shown=self._progress and self.rank == 0,
            autoencoders=lambda: self._state.facts(wanted=lambda name: name in own),
        )
        running.given_generators += generators_in(keywords)
        with self._threads():
            call = with_noise(self.pipeline, keywords, seed)
            output = running.paint(call, ticket.around(running) if ticket else nullcontext())
        told = running.told(ticket.decodes_before if ticket else {})
        return output, {
            "plan": self.plan.without_replay().to_dict(),
            "seed": seed,
            "call": plain(keywords),
            "versions": versions(),
            "weights": weights_of(self.pipeline),
            "loading": self._loading,
            **told,
            "overlap": ticket.word() if ticket else None,
            "timings_s": {"load": round(self._load_s, 3), **told["timings_s"]},
        }

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Shares the cores with the ranks that this process started, while a request runs."""
        before = torch.get_num_threads()
        if self._workers and self.plan.device == "cpu":
            torch.set_num_threads(self._workers.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
