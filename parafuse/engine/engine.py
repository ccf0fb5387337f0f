"""`Engine`: a pipeline, its plan and its ranks. All state lives here; two engines in one process work."""

from __future__ import annotations

import inspect
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from parafuse.config import Axis, Config
from parafuse.engine.apply import DENOISERS, Handle, apply, check_components, denoisers
from parafuse.engine.guided import check_guided
from parafuse.engine.loader import load_pipeline
from parafuse.engine.plan import Plan
from parafuse.engine.planner import resolve
from parafuse.engine.progress import StepProgress
from parafuse.engine.receipt import plain, versions
from parafuse.engine.request import check_call, check_keywords, facts, fresh_seed
from parafuse.engine.source import ModelSource, locate, source_of
from parafuse.engine.workers import Workers
from parafuse.errors import ConfigError, MemoryLimitError, RankError, is_out_of_memory
from parafuse.log import note
from parafuse.parallel.comm import since
from parafuse.parallel.mesh import make_mesh
from parafuse.parallel.placeholder import settled
from parafuse.parallel.world import AGREE_S, World, join_world, launched


class Engine:
    """Runs a pipeline's own call on all ranks of a plan. Make it with `Engine.from_pretrained`."""

    def __init__(self, pipeline: Any, source: ModelSource, plan: Plan, handle: Handle, world: World, progress: bool):
        self.pipeline = pipeline
        """The diffusers pipeline under the handles."""
        self.plan, self.handle = plan, handle
        self.receipt: dict[str, Any] = {}
        """The record of the last request that ended well, ready for JSON."""
        self.world = world
        """What this engine's ranks say to each other."""
        self._source, self._progress = source, progress
        self._workers: Workers | None = None
        self._load_s, self._closed = 0.0, False

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        config: Config | None = None,
        *,
        plan: Plan | None = None,
        progress: bool = False,
        agree_on: Any = None,
        **pipeline_kwargs: Any,
    ) -> Engine:
        """Loads `model` (embedded name, random:NAME or tiny:NAME, diffusers folder, single file, hub id) and makes it
        run on all ranks.

        Under a launcher (torchrun) every rank calls it. In a plain process that asks for several ranks, it starts the
        other ones itself and this process is rank 0; close the engine to end them. `pipeline_kwargs` go to diffusers'
        `from_pretrained`; `agree_on` is anything else that all ranks must have been given alike. Raises ConfigError
        before any weight is loaded, RankError when ranks disagree or fail."""
        config = config or Config()
        source = locate(model, allow_pickle=config.allow_pickle, given=pipeline_kwargs)
        ours = not launched()
        given_plan = plan is not None
        size = (plan.world_size if plan else _asked_size(config)) if ours else _launched_size()
        if plan is None:
            plan = resolve(config, source, size)
        plan.check(model_id=source.model_id, world_size=size)
        if plan.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "device='cuda': this torch cannot use CUDA here. Use device='cpu', or install a CUDA build."
            )
        settings = {
            "plan": plan,
            "allow_pickle": config.allow_pickle,
            "pipeline_kwargs": pipeline_kwargs,
            "agree_on": agree_on,
        }
        _refuse_ignored(config, given_plan, pipeline_kwargs)
        if size > 1:
            check_components(source, plan.degrees)
        workers, world = None, None
        if size > 1 and ours:
            if dist.is_initialized():
                raise ConfigError(
                    "engine: another engine of this process has started ranks; close it first, or start all ranks with "
                    "torchrun, where several engines share them."
                )
            workers = Workers.start(model, settings, size)
        try:
            if workers:
                workers.await_start(plan.timeout_s)
            world = join_world(plan.device, plan.timeout_s, size, workers.store if workers else None)
            world.watch = workers.watch if workers else None
            engine = cls._on_rank(source, settings, world, progress)
        except BaseException as error:
            try:
                if workers:
                    workers.explain(error)
            finally:
                if world:
                    world.leave()
            raise
        engine._workers = workers
        return engine

    @classmethod
    def from_pipeline(cls, pipeline: Any, config: Config | None = None, *, progress: bool = False) -> Engine:
        """Runs a pipeline that is loaded already: every rank has its own, with the same weights, and calls this.

        Ranks come from a launcher (torchrun), or there is one. Dtype and device are the pipeline's own. Raises
        ConfigError before anything is changed, RankError when ranks disagree."""
        config = config or Config()
        source = source_of(pipeline)
        size = _launched_size() if launched() or dist.is_initialized() else 1
        if config.dtype != "auto" or config.device != "auto":
            raise ConfigError("config: dtype and device are the pipeline's own here; leave them out.")
        parameter = next(denoisers(pipeline, DENOISERS)[0][1].parameters())
        device, dtype = parameter.device.type, str(parameter.dtype).removeprefix("torch.")
        plan = resolve(replace(config, device=device, dtype=dtype), source, size)
        if size > 1:
            check_components(source, plan.degrees)
        world = join_world(plan.device, plan.timeout_s, size)
        settings = {"plan": plan, "pipeline_kwargs": {}, "agree_on": None}
        try:
            return cls._on_rank(source, settings, world, progress, pipeline)
        except BaseException:
            world.leave()
            raise

    @classmethod
    def _on_rank(
        cls, source: ModelSource, settings: dict[str, Any], world: World, progress: bool, pipeline: Any = None
    ) -> Engine:
        """What every rank does once it has joined: agree, load unless there is a pipeline, apply."""
        plan: Plan = settings["plan"]
        begun = time.perf_counter()
        world.agree("a plan", facts(plan.to_dict()), AGREE_S)
        world.agree("arguments", facts({"": settings["pipeline_kwargs"], "call": settings["agree_on"]}), AGREE_S)
        if plan.why:
            note(plan.one_line())
        keywords = {"dtype": plan.dtype} | settings["pipeline_kwargs"]  # dtypes by component may be among them
        if pipeline is None:
            pipeline = load_pipeline(source, allow_pickle=settings["allow_pickle"], device=world.device, **keywords)
            pipeline.to(world.device)
        pipeline.set_progress_bar_config(disable=True)
        degrees = {axis: plan.degree(axis) for axis in Axis}
        handle = (
            apply(pipeline, mesh=make_mesh(degrees, plan.device, plan.timeout_s)) if plan.world_size > 1 else Handle()
        )
        engine = cls(pipeline, source, plan, handle, world, progress)
        engine._load_s = time.perf_counter() - begun
        return engine

    @property
    def rank(self) -> int:
        """This process's global rank; the pictures are the same on all of them."""
        return self.world.rank

    def __call__(self, *args: Any, seed: int | Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The pipeline's own call, on all ranks: same arguments, same output, the same on every rank.

        `seed` makes the noise with a CPU generator, so that it does not depend on the device (several: one for each
        picture); without it, and without `generator`, one is drawn and told in the receipt. The model's own defaults
        fill in what is not given. Under a
        launcher every rank calls it with the same arguments. Raises ConfigError before anything runs."""
        if self._closed:
            raise ConfigError("engine: it is closed; make a new one.")
        if self.world.broken:
            way_out = "make a new engine" if self._workers else "start all ranks again"
            raise ConfigError(f"engine: a rank was lost in an earlier request; {way_out}.")
        keywords = self._keywords(args, kwargs)
        if seed is not None and "generator" in keywords:
            raise ConfigError(f"seed={seed}: given beside generator; leave one out.")
        if seed is None and "generator" not in keywords:
            seed = self.world.share("seed", fresh_seed)
        if self._workers:
            self._workers.send({"keywords": keywords, "seed": seed})
        try:
            return self.run(keywords, seed)
        except BaseException as error:
            if self._workers and (
                self.world.broken or isinstance(error, RankError) or not isinstance(error, Exception)
            ):
                self.world.broken = True
                self._workers.explain(error)
            raise

    def run(self, keywords: dict[str, Any], seed: int | Sequence[int] | None) -> Any:
        """One checked request on this rank. Every rank runs it; an error on one rank is an error on all."""
        self.world.agree("a request", facts(keywords | {"seed": seed}))
        call = dict(keywords)
        if isinstance(seed, int):
            call["generator"] = torch.Generator("cpu").manual_seed(seed)
        elif seed is not None:
            call["generator"] = [torch.Generator("cpu").manual_seed(one) for one in seed]
        begun, before = time.perf_counter(), self.handle.exchanged()
        seen = {one: Counter(one.seen) for one in (*self.handle.guidance.values(), *self.handle.data.values())}
        self.handle.rounds.forget()
        changed = self.world.any_says("modules", [one.has_changed() for one in seen]) if seen else []
        for one, has_changed in zip(seen, changed, strict=True):
            one.forget_if(has_changed)
        self.world.share_noise()
        with self._progress_of(call) as progress, self._threads(), self.world.request():
            output = self._paint(call)
        self._say_idle(seen)
        self.receipt = {
            "plan": self.plan.to_dict(),
            "seed": seed,
            "call": plain(keywords),
            "versions": versions(),
            "applied": list(self.handle.applied),
            "guidance": {name: one.report(seen[one]) for name, one in self.handle.guidance.items()},
            "data": {name: one.report(seen[one]) for name, one in self.handle.data.items()},
            "exchanged": {
                name: vars(count) for name, count in since(self.handle.exchanged(), before).items() if count.calls
            },
            "timings_s": {
                "load": round(self._load_s, 3),
                "request": round(time.perf_counter() - begun, 3),
                "steps": [round(s, 4) for s in progress.steps_s],
            },
        }
        return output

    def _say_idle(self, seen: dict[Any, Counter[str]]) -> None:
        """One line for an axis on which this request had nothing to share."""
        for axis, parts in ((Axis.CFG, self.handle.guidance), (Axis.DATA, self.handle.data)):
            new = sum(((one.seen - seen[one]) for one in parts.values()), Counter[str]())
            if parts and not new["cut"] and not new["together"]:
                note(
                    f"{axis} {self.plan.degree(axis)}: nothing could be shared in this request; its ranks did the same"
                )

    def _paint(self, call: dict[str, Any]) -> Any:
        """The pipeline's own call, with all its values; what its `check_inputs` refuses is a ConfigError."""
        try:
            return settled(self.pipeline(**call))
        except ValueError as error:
            frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            if "check_inputs" in frames:
                raise ConfigError(f"call of {type(self.pipeline).__name__}: {error}") from error
            raise
        except RuntimeError as error:
            if is_out_of_memory(error):
                reason = str(error).partition("\n")[0]
                raise MemoryLimitError(f"out of memory: ask for a smaller size, or more ranks ({reason})") from error
            raise

    def _keywords(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, checked, with the model's defaults."""
        signature = inspect.signature(type(self.pipeline).__call__)
        names = list(signature.parameters)[1:]
        if len(args) > len(names):
            raise ConfigError(f"call of {type(self.pipeline).__name__}: {len(args)} positional arguments are too many.")
        keywords = dict(zip(names, args, strict=False))
        double = keywords.keys() & kwargs.keys()
        if double:
            raise ConfigError(f"call of {type(self.pipeline).__name__}: {sorted(double)[0]!r} is given twice.")
        keywords |= kwargs
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
            check_keywords(keywords, names, type(self.pipeline).__name__)
        checked = check_call(self._source, keywords)
        if self.plan.degree(Axis.CFG) > 1:
            check_guided(self.pipeline, checked, self.plan.degree(Axis.CFG))
        return checked

    def _progress_of(self, call: dict[str, Any]) -> StepProgress:
        """Counts steps through the pipeline's callback where it has one."""
        shown = self._progress and self.rank == 0
        progress = StepProgress(
            shown=shown, total=call.get("num_inference_steps"), user=call.get("callback_on_step_end")
        )
        if "callback_on_step_end" in inspect.signature(type(self.pipeline).__call__).parameters:
            wanted = getattr(call.get("callback_on_step_end"), "tensor_inputs", None)
            if wanted is not None:  # diffusers' own callback classes say themselves what they need
                call["callback_on_step_end_tensor_inputs"] = wanted
            call["callback_on_step_end"] = progress.callback
        return progress

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

    def close(self) -> None:
        """Takes everything off and ends the ranks that this engine started. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.handle.remove()
        finally:
            if self._workers:
                self._workers.stop()
            self.world.leave()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_ignored(config: Config, given_plan: bool, pipeline_kwargs: dict[str, Any]) -> None:
    """Raises ConfigError for what a plan would override without a word."""
    if given_plan and replace(config, allow_pickle=False) != Config():
        raise ConfigError("config: given beside a plan, which decides all of it but allow_pickle; leave one out.")
    for name in ("dtype", "torch_dtype"):
        if name in pipeline_kwargs and not isinstance(pipeline_kwargs[name], dict):
            raise ConfigError(
                f"{name}={pipeline_kwargs[name]}: give it as Config(dtype=...), so that the plan knows it."
            )


def _launched_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _asked_size(config: Config) -> int:
    """Ranks that a config asks for in a plain process; "auto" asks for none beside the others."""
    size = 1
    for axis in Axis:
        degree = getattr(config.parallel, axis)
        size *= 1 if degree == "auto" else degree
    return size
