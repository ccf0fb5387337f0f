"""What a diffusers folder lacks, seen from file names and headers: no torch, no weights."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from parafuse.errors import ModelError

SAFE = (".safetensors",)
_SHARD = re.compile(r"-\d+-of-\d+")
WAY_OUT = "Download the model again, or give a whole folder."


def check_folder(name: str, path: Path, index: dict[str, Any], given: Collection[str]) -> None:
    """Raises ModelError for a component of model_index.json that is not there, or weights that cannot be read.

    `given`: keywords of diffusers' loader that the caller gives, such as components that he brings himself."""
    variant = str(given.get("variant") or "") if isinstance(given, Mapping) else ""
    pipeline = index.get("_class_name")
    own = (path / "pipeline.py").is_file() or "custom_pipeline" in given
    if isinstance(pipeline, str) and not own and not _diffusers_has(pipeline):
        raise ModelError(
            f"model={name!r}: model_index.json names the pipeline {pipeline!r}, which this version of diffusers has "
            "not. Install a version that has it, or check the name."
        )
    for component, entry in index.items():
        is_component = isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)
        if component.startswith("_") or component in given or not is_component:
            continue  # settings stand there too, and parts that the pipeline does without
        folder = path / component
        if not folder.is_dir():
            raise ModelError(f"model={name!r}: has no folder {component!r}, which model_index.json names. {WAY_OUT}")
        for file in weight_files(name, component, folder, variant):
            if not file.is_file():
                raise ModelError(f"model={name!r}: {component}/{file.name} is missing. {WAY_OUT}")
            tensor_shapes(file, f"{name}/{component}/{file.name}")


def check_variant(name: str, path: Path, variant: str) -> None:
    """Raises ModelError for a variant of which no component has weights."""
    found = {_variant(file) for file in path.glob("*/*") if file.suffix in (*SAFE, ".bin")}
    if variant not in found:
        there = ", ".join(repr(one) for one in sorted(found - {""})) or "none"
        raise ModelError(f"model={name!r}: has no weights of variant={variant!r}; variants that it has: {there}.")


def _variant(file: Path) -> str:
    """`fp16` of `model.fp16.safetensors`, of its shards and of their index; empty for the files of no variant."""
    if ".index" in file.name:
        return file.name.partition(".index")[2].removesuffix(".json").strip(".")
    return _SHARD.sub("", file.stem).partition(".")[2]


def weight_files(name: str, component: str, folder: Path, variant: str = "") -> Iterator[Path]:
    """The safetensors files of a component that diffusers loads, those that an index file names included."""
    files = [p for p in sorted(folder.glob("*.safetensors")) if p.is_file()]
    indexes = sorted([*folder.glob("*.safetensors.index.json"), *folder.glob("*.safetensors.index.*.json")])
    variants = {_variant(file) for file in (*files, *indexes)}
    if variants and variant not in variants and "" not in variants and not any(folder.glob("*.bin")):
        one = sorted(variants)[0]
        raise ModelError(f"model={name!r}: {component} has weights of variant {one!r} alone; give variant={one!r}.")
    chosen = variant if variant in variants else ""
    for index_file in indexes:
        if _variant(index_file) != chosen:
            continue
        try:
            yield from (
                folder / file for file in sorted(set(json.loads(index_file.read_text())["weight_map"].values()))
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"model={name!r}: {component}/{index_file.name} cannot be read ({error}). {WAY_OUT}"
            ) from error
    yield from (file for file in files if _variant(file) == chosen)


def _diffusers_has(pipeline: str) -> bool:
    """Whether diffusers' own list of names has it; True where diffusers is not found, which others say."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        return True
    return f'"{pipeline}"' in Path(spec.origin).read_text(encoding="utf-8")


def tensor_shapes(path: Path, name: str) -> dict[str, list[int]]:
    """Shape of every tensor of a safetensors file. Raises ModelError as `tensor_facts` does."""
    return {tensor: shape for tensor, (_, shape) in tensor_facts(path, name).items()}


def tensor_facts(path: Path, name: str) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of every tensor of a safetensors file, from its header: 8 bytes of length, then one JSON object.

    Raises ModelError for a file that is none, or that was not copied to its end."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"it has {size} bytes and no header")
            header = json.loads(file.read(length))
        tensors = {tensor: facts for tensor, facts in header.items() if tensor != "__metadata__"}
        end = 8 + length + max((facts["data_offsets"][1] for facts in tensors.values()), default=0)
        found = {tensor: (str(facts["dtype"]), list(facts["shape"])) for tensor, facts in tensors.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ModelError(f"model={name!r}: cannot be read as safetensors ({error}). Download it again.") from error
    if end != size:
        raise ModelError(f"model={name!r}: has {size} bytes instead of {end}. Download it again.")
    return found
