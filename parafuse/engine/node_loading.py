"""Loads a pipeline once for all ranks of a machine: one of them loads it, the others map its memory."""

from __future__ import annotations

import copy
import importlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from parafuse.engine.loader import load_pipeline
from parafuse.engine.plan import Plan
from parafuse.engine.quantize.put_on import Quantized, quantize_loaded
from parafuse.engine.source import ModelSource, read_json
from parafuse.engine.targets import weighty
from parafuse.log import note
from parafuse.parallel.node import Node, hand_out, leave, meet_on_node, take
from parafuse.parallel.node_memory import CannotShareError
from parafuse.parallel.world import World
from parafuse.quantization import quantize_of

READ = "read"
"""How a rank came to a pipeline that it has loaded itself."""
BY_ITSELF = "every rank loads the model for itself: "


@dataclass
class Loaded:
    """A pipeline on its device."""

    pipeline: Any
    quantized: Sequence[Quantized] = ()
    ranks: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What it took, by rank, for receipts."""


def load_for_ranks(source: ModelSource, settings: dict[str, Any], world: World) -> Loaded:
    """The pipeline of a model, quantized as the plan says, on this rank's device. Collective.

    On the CPU ranks of a machine share what is loaded and quantized; on GPUs each takes it from the host's memory to
    its own, where it quantizes. Raises what the rank that loads raises, on all ranks of its machine."""
    plan: Plan = settings["plan"]
    keywords = {"dtype": plan.dtype} | settings["pipeline_kwargs"]  # dtypes by component may be among them
    on_cpu, begun = world.device.type == "cpu", time.perf_counter()
    place = torch.device("cpu") if plan.offload or plan.placement else world.device  # weights come when they are used
    where = place if plan.placement else world.device  # of quantizing
    method = quantize_of(plan.quantize or None)
    is_early = on_cpu and not (method is not None and method.keep_originals)

    def make() -> tuple[Any, list[Quantized]]:
        pipeline = load_pipeline(source, allow_pickle=settings["allow_pickle"], device=place, **keywords)
        return pipeline, quantize_loaded(plan, *weighty(pipeline), where) if is_early else []

    is_built = source.kind == "random" and place.type != "cpu"  # on the device, from nothing
    if world.size == 1 or is_built:
        (pipeline, done), how = make(), READ
    else:
        (pipeline, done), how = _once(source, world, make, settings)
    if not is_early:
        done = quantize_loaded(plan, *weighty(pipeline), where)
    if place.type != "cpu" or not (plan.offload or plan.placement):
        pipeline.to(place)
    took = {"how": how, "seconds": round(time.perf_counter() - begun, 3), **host_memory()}
    return Loaded(pipeline, done, [json.loads(text) for text in world.everyone("loading", json.dumps(took))])


def _once(source: ModelSource, world: World, make: Callable[[], Any], settings: dict[str, Any]) -> tuple[Any, str]:
    """What `make` gives, made by one rank of each machine, and how this rank came to it."""
    given = settings["pipeline_kwargs"]
    node = meet_on_node(world)
    try:
        if not node.shares:
            if node.why and node.leads:
                note(BY_ITSELF + node.why)
            return make(), f"{READ}: {node.why}" if node.why and not node.leads else READ
        if node.leads:
            value, why = hand_out(node, make, given, world.watch, introduce)
            if why:
                note(BY_ITSELF + why)
            return value, READ
        import_classes(source)
        value, why = take(node, given, world.timeout_s, world.watch)
    finally:
        leave(node)
    if not why:
        try:
            introduce(value)
        except CannotShareError as error:
            why = str(error)
    return (make(), f"{READ}: {why}") if why else (value, _from(node))


def import_classes(source: ModelSource) -> None:
    """Imports what a folder's pipeline is made of, while another rank loads it: seconds, of which this rank waits
    anyway."""
    index = Path(source.path) / "model_index.json"
    parts = read_json(index, source.name) if source.kind == "folder" else {}
    for part in parts.values():
        if isinstance(part, list) and part[0] in ("diffusers", "transformers"):
            with suppress(ImportError, RuntimeError):  # what is missing is told where it is loaded
                getattr(importlib.import_module(part[0]), str(part[1]), None)


def introduce(made: tuple[Any, Any]) -> None:
    """Makes classes of transformers known to this process, as they make themselves when one of them is built: without
    that, `output_hidden_states` is not heard. Without memory; what is built is dropped. `made`: a pipeline and more.

    Raises CannotShareError for a class that is not built from its configuration alone: then no rank maps it."""
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    for name, part in made[0].components.items():
        if isinstance(part, PreTrainedModel):
            try:
                with init_empty_weights(include_buffers=True):
                    type(part)(copy.deepcopy(part.config))
            except Exception as error:  # whatever the class does
                raise CannotShareError(
                    f"{name}: {type(part).__name__} cannot be built from its configuration alone "
                    f"({type(error).__name__}: {error})"
                ) from error


def _from(node: Node) -> str:
    return f"mapped from rank {node.ranks[0]}"


def host_memory() -> dict[str, int]:
    """Bytes of this process: the most that was resident so far, and its share now, in which a page counts for as much
    as this is of the processes that have it. Empty where the system does not tell."""
    try:
        peak = _kilobytes("/proc/self/status", "VmHWM:")
        share = _kilobytes("/proc/self/smaps_rollup", "Pss:")
    except (OSError, StopIteration):
        return {}
    return {"peak_resident_bytes": peak, "proportional_bytes": share}


def _kilobytes(path: str, name: str) -> int:
    lines = Path(path).read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
