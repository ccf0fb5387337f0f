"""The components of a model as modules without memory, made from its configuration: their names, shapes and order are
known before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parafuse.engine.architecture import read_architecture
from parafuse.engine.folder import SAFE, tensor_shapes
from parafuse.engine.random_weights import build_part
from parafuse.engine.source import ModelSource, read_json
from parafuse.errors import ConfigError

META = torch.device("meta")
_CONFIGS = ["*.json", "**/*.json"]


@dataclass
class Unbuilt:
    """Of one pipeline."""

    modules: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    """Component -> module, in the order of model_index.json. Those that were given as objects are these."""
    others: dict[str, int] = field(default_factory=dict[str, int])
    """Component -> bytes of its files, where its class is not known before it is loaded."""


def unbuilt(source: ModelSource, dtype: str, given: Mapping[str, Any] | None = None) -> Unbuilt:
    """All components that have weights. Fetches configurations of a hub id. Raises ConfigError for a source whose
    modules are known only after loading."""
    given = given or {}
    found = Unbuilt()
    for name, part in _parts(source, given).items():
        if name in given or part is None:
            if isinstance(given.get(name), nn.Module):
                found.modules[name] = given[name]
            continue
        made = _made(name, part, _dtype_of(name, dtype, given))
        if isinstance(made, nn.Module):
            found.modules[name] = made
        elif isinstance(made, int):
            found.others[name] = made
    return found


def _parts(source: ModelSource, given: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """Component -> library, class, and its config or its folder; None for one that is given."""
    if source.kind == "random":
        return dict(read_architecture(source.name).components)
    if source.kind == "pipeline":
        return dict.fromkeys(given)
    if source.kind == "file":
        raise ConfigError(
            f"placement: model={source.name!r} is a single file, whose modules are known only after loading; save it "
            "as a folder (pipeline.save_pretrained), and give that."
        )
    folder = Path(source.path) if source.kind == "folder" else _fetched(source, given)
    index = read_json(folder / "model_index.json", source.name)
    parts: dict[str, dict[str, Any] | None] = {}
    for name, entry in index.items():
        if name in given:
            parts[name] = None
        elif not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and None not in entry:
            parts[name] = {"library": entry[0], "class": entry[1], "folder": folder / name}
    return parts


def _fetched(source: ModelSource, given: Mapping[str, Any]) -> Path:
    """The configurations of a hub id, as diffusers would fetch them."""
    from huggingface_hub import snapshot_download

    from parafuse.engine.loader import HUB_KEYWORDS

    where = {name: given[name] for name in HUB_KEYWORDS if name in given}
    try:
        return Path(snapshot_download(source.path, allow_patterns=_CONFIGS, **where))
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"placement: the configuration of model={source.name!r} is needed, and cannot be fetched ({reason}); give "
            "a folder."
        ) from error


def _made(name: str, part: dict[str, Any], dtype: torch.dtype) -> Any:
    """The module; the bytes of its files where its class is not known here, None for what has no weights."""
    if "folder" not in part:
        return build_part(name, part, META, dtype) if _has_weights(part) else None
    folder = part["folder"]
    file = folder / "config.json"
    if part["library"] not in ("diffusers", "transformers") or not file.is_file() or not _has_weights(part):
        files = sorted(folder.glob("*")) if folder.is_dir() else []
        return sum(file.stat().st_size for file in files if file.suffix in SAFE) or None
    config = read_json(file, name)
    if isinstance(config.get("quantization_config"), dict):
        return _stored_bytes(folder, name)
    keywords = config if part["library"] == "transformers" else {k: v for k, v in config.items() if k[0] != "_"}
    return build_part(name, {**part, "config": keywords}, META, dtype)


def _has_weights(part: dict[str, Any]) -> bool:
    import diffusers
    import transformers

    if "stand_in" in part:
        return False
    library = {"diffusers": diffusers, "transformers": transformers}.get(part["library"])
    found = getattr(library, str(part["class"]), None)
    return isinstance(found, type) and issubclass(found, nn.Module)


def _stored_bytes(folder: Path, name: str) -> int:
    """Of a component that was quantized in files: as many as these have."""
    files = [file for file in sorted(folder.glob("*")) if file.suffix in SAFE]
    for file in files:
        tensor_shapes(file, f"{name}/{file.name}")  # says which one was not copied to its end
    return sum(file.stat().st_size for file in files)


def _dtype_of(name: str, dtype: str, given: Mapping[str, Any]) -> torch.dtype:
    """diffusers' rule for dtypes by component."""
    asked = given.get("dtype")
    if isinstance(asked, dict):
        return asked.get(name, asked.get("default", torch.float32))
    return getattr(torch, dtype)
