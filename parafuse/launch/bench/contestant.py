"""The pipelines that are timed: each variant has denoisers of its own over the same weights, so all are run in turn."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from parafuse.cache import cache_of
from parafuse.config import Axis, Config
from parafuse.engine.apply import Handle, apply
from parafuse.engine.caches.report import SKIPPED as LETTER
from parafuse.engine.engine import Engine
from parafuse.engine.quantize.settle import TEXT_ENCODERS
from parafuse.engine.stack import block_stack
from parafuse.engine.targets import DECODERS, DENOISERS
from parafuse.launch.bench.case import CACHES, REPLICATED, Variant
from parafuse.launch.bench.parts import PartClock
from parafuse.launch.bench.peers import PEERS, watch_blocks
from parafuse.launch.bench.record import CALLS, KEPT, QUANTIZED, RAN, SKIPPED
from parafuse.parallel import absent

Counts = dict[str, int]
"""What shows that an option acted: graphs run, calls and bytes exchanged by axis, calls whose blocks were skipped and
bytes that a cache kept."""


class Contestant:
    """One variant, ready to paint. Made, called and closed on all ranks that it uses."""

    def __init__(self, variant: Variant, pipeline: Any, ranks: int, device: torch.device, timeout_s: float = 60.0):
        self.variant, self.ranks = variant, ranks
        self.counts: Counts = {}
        self.compile_s = 0.0
        self._engine: Engine | None = None
        self._handle = Handle()
        pipeline = twin(pipeline)
        self.parts = PartClock(pipeline, device)
        self.run: Callable[..., Any] = pipeline
        if variant.share_of > 1:
            degrees = variant.config(variant.share_of).degrees(variant.share_of)
            config = Config(
                quantize=variant.quantize or None, attention=variant.attention or "torch", sparse=variant.sparse or None
            )
            self._handle = apply(pipeline, config, mesh=absent.mesh_of(degrees, device.type, timeout_s))
        elif variant.way == "parafuse":
            config = Config(
                parallel=variant.config(ranks),
                cache=variant.cache or None,
                quantize=variant.quantize or None,
                attention=variant.attention or "torch",
                sparse=variant.sparse or None,
                timeout_s=timeout_s,
            )
            self._engine = Engine.from_pipeline(pipeline, config, alone=ranks == 1)
            self._handle, self.run = self._engine.handle, self._engine
        elif variant.way in PEERS:
            keep_apart(pipeline)
            watch_blocks(pipeline, self.count)
            self.run = PEERS[variant.way](pipeline, ranks, variant.threshold)
        if variant.compile:
            self._compile(pipeline)

    def paint(self, call: dict[str, Any]) -> Any:
        """One request. Collective on the ranks that it uses."""
        before = self._handle.exchanged()
        self.parts.forget()
        output = self.run(**call)
        for name, now in self._handle.exchanged().items():
            old = before.get(name)
            self.count(f"{name} calls", now.calls - (old.calls if old else 0))
            self.count(f"{name} bytes", now.bytes - (old.bytes if old else 0))
        self._count_skips()
        self.count(QUANTIZED, sum(len(one.choice.layers) for one in self._handle.quantized.values()))
        return output

    def _count_skips(self) -> None:
        """What parafuse's own cache did in the request, by its receipt: the same on every rank."""
        said = self._engine.receipt["cache"] if self._engine else {}
        if said:
            calls = calls_of(said)
            self.count(CALLS, len(calls))
            self.count(SKIPPED, sum(calls))
            self.count(KEPT, sum(said["bytes"]))

    def count(self, name: str, number: int = 1) -> None:
        if number or name in self.counts:
            self.counts[name] = self.counts.get(name, 0) + number

    def missing(self, exchanges: int) -> list[str]:
        """Options that were asked for and did nothing, by the counters. `exchanges`: seen in the profiled step."""
        sent = [name.partition(".")[0] for name, count in self.counts.items() if count and name.endswith(" bytes")]
        found = [f"{axis}: no byte was exchanged" for axis in self.degrees if axis not in sent]
        if self.variant.compile and not self.counts.get("graphs run"):
            found.append("compile: no graph was run")
        if self.variant.quantize and not self.counts.get(QUANTIZED):
            found.append(f"quantize {self.variant.quantize}: no layer was quantized")
        way, cache = self.variant.way, cache_of(self.variant.cache or None)
        if cache is not None and not self.counts.get(SKIPPED) and getattr(cache, "threshold", None) != 0:
            found.append(f"cache {cache.brief}: no call was skipped")
        skipped = self.counts.get(CALLS, 0) - self.counts.get(RAN, 0)
        is_whole = self.ranks == 1 or way in REPLICATED
        if way in CACHES and is_whole and skipped <= 0:
            found.append(f"{way}: no block was skipped")
        if way in PEERS and not is_whole and not exchanges:
            found.append(f"{way}: nothing was exchanged")
        return found

    @property
    def degrees(self) -> dict[str, int]:
        """Of the axes that are split."""
        mesh = self._handle.mesh
        return {str(axis): mesh.degree(axis) for axis in Axis if mesh.degree(axis) > 1} if mesh else {}

    def close(self) -> None:
        if self._engine:
            self._engine.close()
        self._handle.remove()
        self.parts.remove()

    def _compile(self, pipeline: Any) -> None:
        for name in DENOISERS:
            module = getattr(pipeline, name, None)
            if not isinstance(module, nn.Module):
                continue
            if getattr(module, "_repeated_blocks", None):
                model: Any = module
                model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=self._backend)
                continue
            for block in block_stack(module):  # a class that does not name them
                block.compile(fullgraph=True, dynamic=False, backend=self._backend)

    def _backend(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        """Inductor, counting the graphs that are run."""
        from torch._inductor.compile_fx import compile_fx

        begun = time.perf_counter()
        compiled: Any = compile_fx(graph, inputs)
        self.compile_s += time.perf_counter() - begun

        def run(*args: Any) -> Any:
            self.count("graphs run")
            return compiled(*args)

        return run


def twin(pipeline: Any) -> Any:
    """The same pipeline with all that parafuse puts something on of its own, over the same weights."""
    made = copy.copy(pipeline)
    for name in (*DENOISERS, *DECODERS, *TEXT_ENCODERS):
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            tensors = [*module.parameters(), *module.buffers()]
            setattr(made, name, copy.deepcopy(module, {id(x): x for x in tensors}))
    made.scheduler = copy.deepcopy(pipeline.scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def keep_apart(pipeline: Any) -> None:
    """Gives a pipeline and its denoisers classes of their own, so that an engine that patches classes changes none but
    its own."""
    for one in (pipeline, *(getattr(pipeline, name, None) for name in DENOISERS)):
        if one is not None:
            kind = type(one)
            one.__class__ = type(
                kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            )


def calls_of(said: dict[str, Any]) -> list[bool]:
    """Call by call whether all of its samples were skipped, of a receipt's "cache"."""
    decisions = said.get("decisions", {})
    return [set(samples) == {LETTER} for component in decisions.values() for samples in component]


def call_of(keywords: dict[str, Any], seed: int) -> dict[str, Any]:
    """Keywords of one request, with noise of its own."""
    return keywords | {"generator": torch.Generator("cpu").manual_seed(seed)}
