"""Whether a model of known size fits, before it is built. Imports no torch."""

from __future__ import annotations

import os

from parafuse.config import Config
from parafuse.engine.architecture import RANDOM, TINY, is_architecture, read_architecture
from parafuse.errors import ConfigError
from parafuse.hardware import gpus, memory_bytes, num_cuda_devices

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_memory(model: str, config: Config, world_size: int) -> None:
    """Raises ConfigError for an architecture whose weights alone are more than a rank's device has."""
    if not is_architecture(model) or model.startswith(TINY):
        return
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    on_gpu = config.device == "cuda" or (config.device == "auto" and num_cuda_devices() >= local)
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    needs = sum(read_architecture(model).parameters.values()) * BYTES[dtype]
    found = gpus()[1]
    there = min((gpu.memory_bytes for gpu in found), default=0) if on_gpu else memory_bytes() // local
    if there and needs > there:
        where = found[0].name if on_gpu else "this machine, for each rank,"
        raise ConfigError(
            f"model={model!r}: its weights take {needs / 1e9:.0f} GB in {dtype}, and {where} has {there / 1e9:.0f} GB; "
            f"take a larger device, or try it with tiny parts: {TINY}{model.removeprefix(RANDOM)} (bench: --tiny)."
        )
