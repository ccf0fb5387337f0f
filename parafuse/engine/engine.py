"""`Engine`: a pipeline, its plan and its ranks. All state lives here; two engines in one process work."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parafuse.config import Config, Parallel
from parafuse.engine import saved
from parafuse.engine.apply import Handle, apply
from parafuse.engine.compiling import Compiling
from parafuse.engine.devices import remove_offload
from parafuse.engine.extras import Extras
from parafuse.engine.loading_checks import check_loading, own_config, taken
from parafuse.engine.modular import hush
from parafuse.engine.node_loading import Loaded, load_for_ranks
from parafuse.engine.offload.pipeline import device_for
from parafuse.engine.overlap.lane import lane_of
from parafuse.engine.plan import Plan
from parafuse.engine.planner import computes_in, resolve
from parafuse.engine.planning.choose import choose_together
from parafuse.engine.quantize.put_on import Quantized, checked
from parafuse.engine.quantized import compute_dtype
from parafuse.engine.request import facts
from parafuse.engine.sharing import pipeline_over
from parafuse.engine.source import ModelSource, locate, source_of
from parafuse.engine.state import PipelineState
from parafuse.engine.suitability import check_components
from parafuse.engine.surface import referred, resolved
from parafuse.engine.targets import DENOISERS, denoisers, weighty
from parafuse.engine.together import Together
from parafuse.engine.workers import Workers
from parafuse.engine.world_size import asked_size, launched_size, number_of_ranks, refuse_ignored, refuse_several
from parafuse.errors import ConfigError, RankError
from parafuse.log import note
from parafuse.parallel.mesh import make_mesh
from parafuse.parallel.world import AGREE_S, World, join_world, launched


class Engine(Together):
    """Runs a pipeline's own call on all ranks of a plan. Make it with `Engine.from_pretrained`."""

    def __init__(self, pipeline: Any, source: ModelSource, plan: Plan, handle: Handle, world: World, progress: bool):
        self.plan, self.handle, self.world, self.receipt, self.loaded = plan, handle, world, {}, {}
        self._family, self._source, self._state, self._workers = [self], source, PipelineState(pipeline), None
        self._progress, self._load_s, self._closed = progress, 0.0, False
        self._lane, self._inside = lane_of(world), threading.local()
        self.pipeline = pipeline
        self._compiling, self._loading = None, []
        self.chosen = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        config: Config | str | None = None,
        *,
        plan: Plan | None = None,
        progress: bool = False,
        alone: bool = False,
        agree_on: Any = None,
        expect: Mapping[str, Any] | None = None,
        ranks: int | None = None,
        **pipeline_kwargs: Any,
    ) -> Engine:
        """Loads `model` (embedded name, random:NAME or tiny:NAME, diffusers folder, single file, hub id) and makes it
        run on all ranks.

        Under a launcher (torchrun) every rank calls it. In a plain process that asks for several ranks (`ranks`, or
        degrees of the config), it starts the other ones itself and this process is rank 0; close the engine to end
        them. With `alone`, this rank runs by
        itself, and the others of a launcher may do something else. `pipeline_kwargs` are those of diffusers'
        `from_pretrained`, or `from_single_file` (engine/loading_keywords.py); `agree_on` is anything else that all
        ranks must have been given alike. `expect`: keywords of the calls to come (sizes, steps, guidance), by which a
        layout is chosen where the config names none; not given: the model's own. Raises ConfigError before any weight
        is loaded, RankError when ranks disagree
        or fail."""
        config, pipeline_kwargs = own_config(config, pipeline_kwargs)
        source = locate(model, allow_pickle=config.allow_pickle, given=pipeline_kwargs)
        ours = alone or not launched()
        config, pipeline_kwargs = taken(source, config, plan, pipeline_kwargs)
        given_plan = plan is not None
        size = number_of_ranks(config, plan, ranks, ours=ours)
        if alone:
            refuse_several(size)
        refuse_ignored(config, given_plan, expect)
        chosen = None
        if plan is None:
            given = {"given": pipeline_kwargs, "alone": ours}
            chosen = choose_together(config, source, size, computes_in(config, size), expect, **given)
            is_free = config.parallel == Parallel()
            plan = resolve(chosen.config, source, size, pipeline_kwargs, why=chosen.why, chosen=is_free)
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
        check_loading(source, plan, pipeline_kwargs, sent=ours and size > 1)
        Extras.of(plan.config(), plan.device).check(plan.device, plan.degree)
        check_components(source, plan, pipeline_kwargs)
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
            world = join_world(plan.device, plan.timeout_s, size, workers and workers.store, plan.devices_per_rank)
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
        engine.chosen = None if chosen is None else chosen.found
        if workers:
            workers.forget_setup()
        engine._guard()
        return engine

    @classmethod
    def from_pipeline(
        cls, pipeline: Any, config: Config | None = None, *, progress: bool = False, alone: bool = False
    ) -> Engine:
        """Runs a pipeline that is loaded already: every rank has its own, with the same weights, and calls this.

        Ranks come from a launcher (torchrun), or there is one; with `alone`, this rank runs by itself. Dtype and device
        are the pipeline's own. Raises ConfigError before anything is changed, RankError when ranks disagree."""
        config = config or Config()
        source = source_of(pipeline)
        size = launched_size() if not alone and (launched() or dist.is_initialized()) else 1
        if alone:
            refuse_several(asked_size(config))
        if config.dtype != "auto" or config.device != "auto":
            raise ConfigError("config: dtype and device are the pipeline's own here; leave them out.")
        found = denoisers(pipeline, DENOISERS, required=False)
        first = next(found[0][1].parameters()) if found else pipeline
        dtype = (compute_dtype(found[0][1]) if found else str(first.dtype).removeprefix("torch.")) or "auto"
        device = "auto" if config.placement else device_for(config.offload, first.device.type)
        config = replace(config, device=device, dtype=dtype)
        chosen = choose_together(config, source, size, computes_in(config, size), pipeline=pipeline, alone=size == 1)
        is_free = config.parallel == Parallel()
        plan = resolve(chosen.config, source, size, pipeline.components, why=chosen.why, chosen=is_free)
        check_components(source, plan)
        world = join_world(plan.device, plan.timeout_s, size, num_devices=plan.devices_per_rank)
        settings = {"plan": plan, "pipeline_kwargs": {}, "agree_on": None}
        try:
            engine = cls._on_rank(source, settings, world, progress, pipeline)
        except BaseException:
            world.leave()
            raise
        engine.chosen = chosen.found
        return engine

    @classmethod
    def load(cls, folder: str | Path, config: Config | None = None, *, progress: bool = False, **kwargs: Any) -> Engine:
        """An engine as `save` has left it, with all of it that fits these ranks and this machine; one line says what.

        As `from_pretrained`, whose `kwargs` it takes but for `plan`. Without a config the plan is the saved one where
        it fits: in a plain process it starts as many ranks. Raises ModelError for a folder without an engine."""
        ours = kwargs.get("alone", False) or not launched()
        found = saved.read(Path(folder), config, None if ours else launched_size())
        note("; ".join(f"{name}: {what}" for name, what in found.used.items()))
        engine = cls.from_pretrained(str(folder), found.config, plan=found.plan, progress=progress, **kwargs)
        engine.loaded = found.used
        return engine

    def save(self, folder: str | Path) -> None:
        """Writes a diffusers folder, and beside it the plan, how blocks are split, and what was compiled so far.

        Under a launcher every rank calls it, and rank 0 writes. Raises ConfigError for adapters that are not fused."""
        self._refuse_if_over()
        if not self._feeds_ranks:
            self._agree("save", {"folder": str(folder)})
        with self.handle.set_aside():
            self._save(Path(folder))

    def _save(self, folder: Path) -> None:
        saved.check(self.pipeline)

        def written() -> str:
            try:
                methods = {name: one.method for name, one in self.handle.quantized.items()}
                plans = self.handle.block_plans()
                saved.save(folder, self.pipeline, self.plan, self._source.defaults, plans, methods)
            except OSError as error:
                return str(error)
            return ""

        fault = written() if self._feeds_ranks else self.world.tell("what was saved", written)
        if fault:
            raise OSError(f"save: {fault}")

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
        loaded = load_for_ranks(source, settings, world) if pipeline is None else Loaded(pipeline)
        hush(loaded.pipeline)
        engine = cls(loaded.pipeline, source, plan, Handle(), world, progress)
        engine._put_on(loaded.quantized)
        engine._loading = loaded.ranks
        engine._load_s = time.perf_counter() - begun
        return engine

    def _put_on(self, quantized: Sequence[Quantized] = ()) -> None:
        """Puts on all that the plan says. Collective. `quantized`: what was done while it was loaded."""
        if self.plan.changes_nothing:
            checked(None, *weighty(self.pipeline), 1)
            self.handle.quantize_weights(self.pipeline)
            return
        if not denoisers(self.pipeline, DENOISERS, required=False):
            note(f"{type(self.pipeline).__name__} has no denoiser: every rank does all of the work")
            return
        config = replace(self.plan.config(), device="auto", dtype="auto")  # the pipeline has both
        # alone, it is one rank whatever a launcher has started
        mesh = (
            make_mesh(config.parallel.degrees(1), self.plan.device, config.timeout_s) if self.world.size == 1 else None
        )
        self.handle = apply(self.pipeline, config, mesh=mesh)
        self.handle.quantized |= {one.choice.component: one for one in quantized}
        self._compiling = Compiling(self.handle, self.plan) if self.plan.compile else None
        self._guard()

    def _guard(self) -> None:
        """All ranks make the calls of a request; a process that has started ranks refuses others, which these miss."""
        self.handle.agree(lambda: self._busy)
        if self._workers:
            self.handle.guard(lambda: self._busy)

    def follow(self, request: dict[str, Any]) -> None:
        """What a rank that was started does with a request."""
        engine = self._family[request["engine"]]
        if engine is None:
            raise RankError("a request for an engine that is closed here.")
        if request["do"] == "submit":
            with self._lane.entering():
                engine._begin(request["keywords"], request["seed"])
            return
        self._lane.drain()
        with engine._together():
            if request["do"] == "run":
                engine.run(request["keywords"], request["seed"])
            elif request["do"] == "act":
                engine._act(request["act"])
            elif request["do"] == "use_cache":
                engine._use_cache(request["on"])
            elif request["do"] == "from_pipe":
                engine._from_pipe(request["pipeline_class"], request["kwargs"])
            else:
                engine.close()

    def from_pipe(self, pipeline_class: Any, **kwargs: Any) -> Engine:
        """An engine for another pipeline over the same components and ranks, as diffusers' `from_pipe`.

        Under a launcher every rank calls it. `kwargs` are those of `from_pipe`; the dtype is kept if none is given."""
        self._refuse_if_over()
        kwargs = referred(self.pipeline, kwargs)
        request = {"do": "from_pipe", "pipeline_class": pipeline_class, "kwargs": kwargs}
        return self._everywhere(
            request, {"pipeline_class": pipeline_class, **kwargs}, lambda: self._from_pipe(pipeline_class, kwargs)
        )

    def _from_pipe(self, pipeline_class: Any, kwargs: dict[str, Any]) -> Engine:
        self._agree("from_pipe", {"pipeline_class": pipeline_class.__name__} | kwargs)
        with self.world.request():
            pipeline = pipeline_over(self.pipeline, pipeline_class, resolved(self.pipeline, kwargs))
        source = source_of(pipeline)
        plan = replace(self.plan, model=source.name, model_id=source.model_id, replay=None)
        engine = type(self)(pipeline, source, plan, Handle(), self.world, self._progress)
        engine._family, engine._workers, engine._lane = self._family, self._workers, self._lane
        engine._put_on()
        self._family.append(engine)
        return engine

    def close(self) -> None:
        """Takes everything off and ends the ranks that this engine started, with the engines made from it. Weights are
        freed with the engine itself (`del engine`). A second call does nothing."""
        if self._closed:
            return
        first = self._family[0] is self
        try:
            self._lane.close(last=first)
            if not first and self._workers and not self.world.broken:
                self._workers.send({"engine": self._family.index(self), "do": "close"})
            for one in reversed(self._family[1:]) if first else ():
                if one is not None:
                    one._take_off()
            self._take_off()
        finally:
            if first and self._workers:
                self._workers.stop()
                self._workers = None
            if first:
                self.world.leave()

    def _take_off(self) -> None:
        for module in self.handle.own_modules():
            remove_offload(module)  # it stands on what parafuse has put on
        self.handle.remove(quietly=True)
        self._closed = True
        if self._family[0] is not self:
            self._family[self._family.index(self)] = None  # the places of the others stay

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
