"""The memory of a request before anything is loaded: the pipeline's own call on weights without memory, under all that
a plan puts on it, as one rank of its world runs it."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from parafuse.encoding import Everywhere, encoding_of
from parafuse.engine.apply import Handle, apply
from parafuse.engine.calls import call_keywords, paint
from parafuse.engine.host_times import host_times
from parafuse.engine.memory.by_shape import ByShape
from parafuse.engine.memory.fake_pipeline import components, convertible, fake_mode, fake_pipeline, nbytes
from parafuse.engine.memory.kernels import LIBRARIES, CudaAttention, bodies, kernels_of
from parafuse.engine.memory.ledger import ACTIVATIONS, EXCHANGE, PIPELINE, WEIGHTS, Ledger
from parafuse.engine.memory.phases import DENOISE, PHASES, counting, met
from parafuse.engine.memory.repeats import repeats
from parafuse.engine.modular import takes_generator
from parafuse.engine.plan import Plan
from parafuse.engine.source import ModelSource
from parafuse.errors import ConfigError, ParafuseError, UnsupportedError
from parafuse.parallel.mesh import Mesh, make_mesh
from parafuse.quantization import Fp8, quantize_of

STEPS = 2
STEPS_WITH_CACHE = 6
"""Until a cache has all that it ever keeps."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The most memory of one phase, on the rank's device."""

    nbytes: int
    """Of weights and all else at one time."""
    weights: int
    """Of these, weights that are there at that time."""
    activations: int
    """What components have computed, and what the operator at that time takes beside it."""
    exchange: int
    """Buffers that go to other ranks or came from them."""
    kept: int
    """By caches, from step to step."""
    pipeline: int
    """Of the pipeline's own code: embeddings, latents, pictures."""
    libraries: int
    """Workspaces that libraries keep."""
    at: str = ""
    """Component and operator at that time."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one rank; the other ranks of the plan have no more."""

    plan: Plan
    call: dict[str, Any]
    """Keywords of the request that was followed."""
    weights: dict[str, int]
    """Component -> bytes, after quantization."""
    elsewhere: dict[str, int] = field(default_factory=dict[str, int])
    """Place (cpu, disk, another device of the rank) -> bytes of weights that stay there."""
    first: dict[str, Phase]
    """Phase -> its most memory in the first request of these sizes, in which blocks and batches are examined."""
    later: dict[str, Phase]
    """Phase -> its most memory in a request after that."""
    host: int = 0
    """Bytes of the host's memory that loading takes, where the device is another one."""
    notes: list[str] = field(default_factory=list[str])
    """What was taken for granted."""

    @property
    def staying(self) -> int:
        """Of the weights, those that are on the rank's main device all the time."""
        return sum(self.weights.values()) - sum(self.elsewhere.values())

    @property
    def nbytes(self) -> int:
        """The most of all phases."""
        return max(phase.nbytes for phase in (*self.first.values(), *self.later.values()))

    def to_dict(self) -> dict[str, Any]:
        values = {name: asdict(getattr(self, name)) if name == "plan" else getattr(self, name) for name in _FIELDS}
        for name in ("first", "later"):
            values[name] = {phase: asdict(one) for phase, one in values[name].items()}
        return {**values, "nbytes": self.nbytes}


_FIELDS = ("plan", "call", "weights", "elsewhere", "first", "later", "host", "notes")


def predict(
    source: ModelSource, plan: Plan, call: Mapping[str, Any] | None = None, *, mesh: Mesh | None = None
) -> Prediction:
    """What a request takes on one rank of `plan`, phase by phase. Nothing is loaded, downloaded or exchanged.

    `mesh`: of a world whose other ranks are not there, for a plan of several ranks. Raises ConfigError for a call that
    the pipeline does not take."""
    mode = fake_mode()
    pipeline = fake_pipeline(source, getattr(torch, plan.dtype), mode)
    pipeline.set_progress_bar_config(disable=True)
    keywords = call_keywords(pipeline, source, plan, (), {"prompt": "a red apple", **(call or {})})
    keywords = _short(pipeline, keywords, plan)
    found = _Following(pipeline, source, plan, mesh)
    try:
        first = found.request(keywords)
        later = found.request(keywords)
    finally:
        found.close()
    shown = {name: value for name, value in keywords.items() if isinstance(value, (str, int, float, list))}
    return Prediction(
        plan=plan,
        call=shown,
        weights=found.weights,
        elsewhere=found.elsewhere,
        first=first,
        later=later,
        host=found.host,
        notes=_notes(plan, keywords),
    )


def _short(pipeline: Any, keywords: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """With as few steps as tell everything."""
    steps = STEPS_WITH_CACHE if plan.cache else STEPS
    if "num_inference_steps" in inspect.signature(type(pipeline).__call__).parameters:
        keywords["num_inference_steps"] = min(keywords.get("num_inference_steps") or steps, steps)
    return keywords


def _notes(plan: Plan, keywords: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    if plan.device == "cuda":
        found.append("beside this, the CUDA context and its kernels take about 0.5 GB, and NCCL 0.3 GB for each group")
    if plan.compile:
        found.append("compiled blocks are taken as the same blocks uncompiled, which have no less at a time")
    if encoding_of(plan.text_encoders).one_rank:
        found.append("text encoders run on one rank each: this is a rank that runs all of them")
    if plan.cuda_graphs:
        found.append("CUDA graphs keep the activations of a block for themselves; they are counted once")
    return found


class _Following:
    """A pipeline that is followed, and what the plan has put on it."""

    def __init__(self, pipeline: Any, source: ModelSource, plan: Plan, mesh: Mesh | None):
        self.pipeline, self.plan = pipeline, plan
        self.ledger = Ledger(kernels_of(plan.device), bodies(lambda: self.ledger))
        for part in components(pipeline).values():
            self.ledger.know(part)
        whole = sum(map(nbytes, components(pipeline).values()))
        is_loaded = source.kind != "random" and plan.device != "cpu"  # what has random weights is built on its device
        self.host = whole if is_loaded else 0
        self.handle = self._apply(mesh)
        for one in self.handle.sequence.values():
            one.prober = ByShape(self.ledger.silent, self.ledger.agreeing)
        self.weights = {name: nbytes(part) for name, part in components(pipeline).items()}
        self.elsewhere = self._weigh()

    def _weigh(self) -> dict[str, int]:
        """Tells the ledger of all weights."""
        away: Any = self.handle.offloading
        elsewhere: dict[str, int] = away.elsewhere(self.ledger) if away is not None else {}
        self.ledger.weigh(sum(self.weights.values()) - sum(elsewhere.values()))
        for place, number in elsewhere.items():
            if place.isdigit():
                self.ledger.weigh(number, place)
        return elsewhere

    def _apply(self, mesh: Mesh | None) -> Handle:
        plan = self.plan
        if plan.changes_nothing:
            return Handle()
        config = replace(plan.config(), device="auto", dtype="auto", compile=False, cuda_graphs=False)
        config = replace(config, text_encoders=Everywhere(kept=encoding_of(plan.text_encoders).kept))
        method = quantize_of(config.quantize)
        if isinstance(method, Fp8) and plan.device != "cpu":
            config = replace(
                config, quantize=replace(method, reference=True)
            )  # fake weights say that they are on a CPU
        if plan.world_size > 1 and mesh is None:
            raise ConfigError("predict: a plan of several ranks needs a mesh.")
        mesh = mesh or make_mesh(config.parallel.degrees(1), "cpu", plan.timeout_s)
        handle = apply(self.pipeline, config, mesh=mesh)
        handle.agree(lambda: True)  # an engine's requests: all ranks make them, and share what is large
        return handle

    def request(self, keywords: dict[str, Any]) -> dict[str, Phase]:
        """One request; the most of each phase."""
        ledger, call = self.ledger, dict(keywords)
        if takes_generator(self.pipeline) and "generator" not in call:
            call["generator"] = torch.Generator("cpu").manual_seed(0)
        self.handle.rounds.forget()
        gc.collect()
        ledger.peaks.clear()
        with ExitStack() as inside:
            inside.enter_context(torch.no_grad())
            if self.plan.device == "cuda":
                inside.enter_context(CudaAttention())
            memories = inside.enter_context(self.handle.request())
            inside.enter_context(convertible(self.pipeline))
            inside.enter_context(host_times(self.pipeline))
            inside.enter_context(repeats(self.pipeline, ledger))
            inside.enter_context(met(self.pipeline, counting(ledger)))
            inside.enter_context(ledger)
            self._paint(call)
            kept = sum(memory.most_bytes for memory in memories.values())
        order = [name for phase in PHASES for name in sorted(ledger.peaks) if name.partition(",")[0] == phase]
        return {name: self._phase(name, kept) for name in order}

    def _paint(self, call: dict[str, Any]) -> None:
        """Raises UnsupportedError for a pipeline that cannot do without values."""
        try:
            paint(self.pipeline, call)
        except ParafuseError:
            raise
        except Exception as error:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise UnsupportedError(
                f"memory: {type(self.pipeline).__name__} cannot be followed without values "
                f"({type(error).__name__}: {first}); run it, and look at what it took."
            ) from error

    def _phase(self, name: str, kept: int) -> Phase:
        peak = self.ledger.peaks[name]
        kept, libraries = kept if name == DENOISE else 0, LIBRARIES.get(self.plan.device, 0)
        return Phase(
            nbytes=peak.nbytes + libraries,
            weights=peak.by_kind[WEIGHTS],
            activations=max(0, peak.by_kind[ACTIVATIONS] + peak.workspace - kept),
            exchange=peak.by_kind[EXCHANGE],
            kept=kept,
            pipeline=peak.by_kind[PIPELINE],
            libraries=libraries,
            at=f"{peak.module}: {peak.at}".strip(": "),
        )

    def close(self) -> None:
        self.handle.remove(quietly=True)
