"""Whether a model of known size fits, before it is built. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parafuse.config import Config
from parafuse.engine.architecture import RANDOM, TINY, read_architecture
from parafuse.engine.folder import SAFE, tensor_facts, weight_files
from parafuse.errors import ConfigError
from parafuse.hardware import gpus, memory_bytes, num_cuda_devices
from parafuse.offload import DISK, RANKS, Offload, offload_of

if TYPE_CHECKING:
    from parafuse.engine.plan import Plan
    from parafuse.engine.source import ModelSource

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOATS = ("F64", "F32", "BF16", "F16")
"""safetensors' names of dtypes that a loader casts; others stay as they are in the file."""
OTHERS = {"I64": 8, "I32": 4, "I16": 2, "U16": 2}
"""Bytes of others that have more than one."""
MATRIX = 2
"""Dims of what may be quantized."""


def weight_bytes(
    source: ModelSource, dtype: str, *, quantized: bool = False, given: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Component -> bytes of its weights in `dtype`, from an architecture's numbers or the headers of files; empty where
    they are not at hand. A single file counts as one component, "".

    `quantized`: at the least that a quantization leaves: a byte for each element of a matrix. `given`: the keywords of
    the loader, with `variant`, and components that are not loaded."""
    if source.kind == "random":
        return {
            name: number * (1 if quantized else BYTES[dtype])
            for name, number in read_architecture(source.name).parameters.items()
        }
    path = Path(source.path)
    if source.kind == "file":
        return {"": _of_file(path, dtype, quantized)} if path.suffix in SAFE else {}
    if source.kind != "folder":
        return {}
    variant = str((given or {}).get("variant") or "")
    found: dict[str, int] = {}
    for name in source.components or ():
        if name in (given or {}) or not (path / name).is_dir():
            continue
        files = list(weight_files(source.name, name, path / name, variant))
        if files:
            found[name] = sum(_of_file(file, dtype, quantized) for file in dict.fromkeys(files))
    return found


def _of_file(path: Path, dtype: str, quantized: bool) -> int:
    total = 0
    for kind, shape in tensor_facts(path, path.name).values():
        each = BYTES[dtype] if kind in FLOATS else OTHERS.get(kind, 1)
        total += math.prod(shape) * (1 if quantized and len(shape) >= MATRIX else each)
    return total


def saved_in(source: ModelSource) -> str:
    """The dtype of most of the weights in a folder or a file; empty where there are none at hand."""
    path, total = Path(source.path), dict[str, int]()
    files = [path] if source.kind == "file" and path.suffix in SAFE else []
    for name in source.components or () if source.kind == "folder" else ():
        files += weight_files(source.name, name, path / name, "") if (path / name).is_dir() else []
    for file in dict.fromkeys(files):
        for kind, shape in tensor_facts(file, file.name).values():
            total[kind] = total.get(kind, 0) + math.prod(shape)
    most = max(total, key=lambda kind: total[kind], default="")
    return {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(most, "")


def check_memory(source: ModelSource, config: Config, world_size: int) -> None:
    """Raises ConfigError for an architecture whose weights alone are more than a rank's device has, or where they are
    offloaded to, which a disk is never."""
    if source.kind != "random" or source.name.startswith(TINY) or config.placement is not None:
        return
    local = _local(world_size)
    device = "cuda" if config.device == "cuda" or (config.device == "auto" and num_cuda_devices() >= local) else "cpu"
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    home = _home(device, offload_of(config.offload))
    parts = _parts(offload_of(config.offload), world_size)
    _check(source, home, dtype, config.quantize is not None, local, {}, parts)


def check_files(source: ModelSource, plan: Plan, given: Mapping[str, Any]) -> None:
    """The same for a folder or a file, by the headers of its files. `given`: the keywords of the loader."""
    elsewhere = {"device_map", "quantization_config"} & given.keys()  # others place or pack the weights
    by_part = any(isinstance(given.get(name), dict) for name in ("dtype", "torch_dtype"))
    offload = offload_of(plan.offload or None)
    if offload is not None and offload.folder is not None:
        _check_folder(offload.folder)
    if source.kind in ("folder", "file") and not elsewhere and not by_part and not plan.placement:
        home = _home(plan.device, offload)
        parts = _parts(offload, plan.sequence_degree)
        _check(source, home, plan.dtype, bool(plan.quantize), _local(plan.world_size), given, parts)


def _check_folder(folder: str) -> None:
    """Raises ConfigError for one in which no file can be."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is no folder" if not there.is_dir() else "cannot be written"
        raise ConfigError(f"offload: folder={folder!r}: {there} {why}; give another one.")


def _home(device: str, offload: Offload | None) -> str:
    """Where all weights are at once: cuda, cpu (which the ranks of a machine share), pinned (each has its own) or
    disk."""
    if offload is None or offload.to == RANKS:
        return device
    return DISK if offload.to == DISK else "pinned"


def _local(world_size: int) -> int:
    """Ranks on this machine."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)


def _parts(offload: Offload | None, degree: int) -> int:
    """Into how many parts the weights of every component are cut, at most."""
    return degree if offload is not None and offload.to == RANKS else 1


def _check(
    source: ModelSource, device: str, dtype: str, quantized: bool, local: int, given: Mapping[str, Any], parts: int
) -> None:
    needs = sum(weight_bytes(source, dtype, quantized=quantized, given=given).values()) // parts
    where, there = device_memory(device, local)
    if there and needs > there:
        least = "at least " if quantized else ""
        what = f"a {parts}th of its weights takes" if parts > 1 else "its weights take"
        tiny = f", or try it with tiny parts: {TINY}{source.name.removeprefix(RANDOM)} (bench: --tiny)"
        raise ConfigError(
            f"model={source.name!r}: {what} {least}{needs / 1e9:.0f} GB in {dtype}, and {where} has "
            f"{there / 1e9:.0f} GB; take a larger device, or quantize it"
            f"{tiny if source.kind == 'random' else ''}. parafuse plan --memory shows what takes how much."
        )


def device_memory(device: str, ranks: int) -> tuple[str, int]:
    """(a rank's device in words, its bytes) of this machine; 0 bytes where that is unknown."""
    if device == DISK:
        return "the disk", 0
    if device == "pinned":
        return "this machine, for each rank,", memory_bytes() // ranks
    if device == "cpu":
        return "this machine", memory_bytes()
    found = gpus()[1]
    return (found[0].name if found else "no GPU here"), min((gpu.memory_bytes for gpu in found), default=0)
