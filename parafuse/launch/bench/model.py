"""The pipeline that is measured: a checkpoint, or a true architecture with random weights."""

from __future__ import annotations

import inspect
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from parafuse.config import Config
from parafuse.engine.loader import load_pipeline
from parafuse.engine.source import ModelSource, locate
from parafuse.engine.targets import DENOISERS, denoisers
from parafuse.hardware import num_cuda_devices
from parafuse.launch.bench.clock import wait

CALLBACK = "callback_on_step_end"


@dataclass
class Loaded:
    """A pipeline on its device."""

    pipeline: Any
    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    load_s: float = 0.0
    """Until it was there."""

    @property
    def gpu(self) -> str:
        """Its name; empty on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""

    @property
    def calls_back(self) -> bool:
        """Whether it tells the end of each step."""
        return CALLBACK in inspect.signature(type(self.pipeline).__call__).parameters


def load(model: str, config: Config) -> Loaded:
    """Loads on this rank's device: CUDA where there is one for each local rank, else the CPU."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    kind = config.device if config.device != "auto" else ("cuda" if num_cuda_devices() >= local else "cpu")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if kind == "cuda" else "float32")
    begun = time.perf_counter()
    source = locate(model, allow_pickle=config.allow_pickle)
    pipeline = load_pipeline(source, allow_pickle=config.allow_pickle, dtype=name, device=device)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    parameter = next(denoisers(pipeline, DENOISERS)[0][1].parameters())
    wait(device)
    return Loaded(pipeline, source, device, parameter.dtype, time.perf_counter() - begun)
