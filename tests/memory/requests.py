"""Requests that are measured and predicted: pipelines, layouts and options as data."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from parafuse import Config, Engine, Parallel
from parafuse.config import Axis
from parafuse.engine.memory.predict import Prediction, predict
from parafuse.engine.planner import resolve
from parafuse.engine.source import locate
from parafuse.parallel import absent
from tests.memory.measure import Meter, weights

PROMPT = "a red apple"
Figures = dict[str, dict[str, int]]


def config_of(options: dict[str, Any] | Config, ranks: int) -> Config:
    """Degrees and all else, flat; without degrees Ulysses on all ranks."""
    if isinstance(options, Config):
        return options
    axes = {name: value for name, value in options.items() if name in set(Axis)}
    rest = {name: value for name, value in options.items() if name not in axes}
    axes = axes or {"ulysses": ranks}
    if "offload_folder" in rest:
        rest["offload_folder"] = tempfile.gettempdir()
    return Config(parallel=Parallel(**axes), device="cpu", **rest)


def ranks_here() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def measured(model: str, options: dict[str, Any], call: dict[str, Any]) -> tuple[Figures, int]:
    """(request -> phase -> most bytes beside weights, bytes of weights) of this rank. On every rank of a world."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = Engine.from_pretrained(model, config_of(options, ranks_here()))
        meter = Meter()
        held = {
            request: meter.peaks(engine.pipeline, lambda: engine(seed=0, prompt=PROMPT, **call))
            for request in ("first", "later")
        }
        have = sum(weights(engine.pipeline).values())
        engine.close()
        return held, have
    finally:
        torch.set_num_threads(before)


def predicted(model: str, options: dict[str, Any] | Config, call: dict[str, Any], ranks: int) -> Prediction:
    """The same request, followed in this process."""
    config, source = config_of(options, ranks), locate(model)
    plan = resolve(config, source, ranks, elsewhere=True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if ranks == 1:
            return predict(source, plan, call)
        absent.enter(ranks, 60.0)
        try:
            return predict(source, plan, call, mesh=absent.mesh_of(config.parallel.degrees(ranks), "cpu", 60.0))
        finally:
            absent.leave()
    finally:
        torch.set_num_threads(before)
