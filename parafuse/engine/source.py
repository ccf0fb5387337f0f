"""Finds a model and says what it is: from file names, configurations and headers, without torch or weights."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from parafuse.engine.architecture import architectures, is_architecture, read_architecture
from parafuse.engine.folder import SAFE, check_folder, tensor_shapes
from parafuse.errors import ModelError, nearest

EMBEDDED = Path(__file__).parents[1] / "models"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DEFAULTS_FILE = "parafuse.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_VARYING = ("_diffusers_version", "_name_or_path", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found."""

    name: str
    """As the user gave it."""
    path: str
    """Folder or file to load from, or the hub id. Of an architecture without weights: the file that describes it."""
    kind: str
    """folder, file, hub, random: an architecture without weights, or pipeline: one that is loaded already."""
    model_id: str
    """Fingerprint of the configuration files: equal architectures are equal here, whatever their weights."""
    components: tuple[str, ...] | None = None
    """Component names from model_index.json; None where they are known only after loading."""
    pipeline_class: str | None = None
    """Class name from model_index.json; None where it is known only after loading."""
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])
    """Keywords of the call that the model itself sets when they are not given: those of its parafuse.json."""
    size_multiple: int | None = None
    """Width and height must be multiples of it; None: unknown, left to the pipeline."""
    vae: dict[str, Any] | None = field(default=None, repr=False)
    """The autoencoder's configuration, as its file has it; None: unknown before loading, or there is none."""


def write_defaults(folder: Path, defaults: dict[str, Any]) -> None:
    """Keeps a model's own keywords of the call in its folder. One rank calls it."""
    if defaults:
        (folder / DEFAULTS_FILE).write_text(json.dumps({"call": defaults}, indent=2) + "\n")


def source_of(pipeline: Any) -> ModelSource:
    """The source of a pipeline that is loaded already: what its components say of themselves."""
    components: dict[str, Any] = {name: part for name, part in pipeline.components.items() if part is not None}
    name = type(pipeline).__name__
    texts = [name]
    for key, part in sorted(components.items()):
        found: Any = getattr(part, "config", {})
        values = found.to_dict() if hasattr(found, "to_dict") else found  # transformers', or diffusers' own
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        texts.append(f"{key} {json.dumps(values, sort_keys=True, default=lambda value: type(value).__name__)}")
    return ModelSource(
        name=name,
        path="",
        kind="pipeline",
        model_id=hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
        components=tuple(components),
        pipeline_class=name,
    )


def embedded_models() -> list[str]:
    return sorted(p.parent.name for p in EMBEDDED.glob("*/model_index.json"))


def locate(model: str, *, allow_pickle: bool = False, given: Collection[str] = ()) -> ModelSource:
    """The model named `model`: embedded, an architecture without weights (`random:NAME`, `tiny:NAME`), a diffusers
    folder, a single file, or a hub id. Torch-free, reads no weights.

    `given`: components that need not be there. Raises ModelError when the model does not exist, is not whole, is not a
    diffusers model, or holds pickles that were not allowed."""
    if model in embedded_models():
        return _folder(model, EMBEDDED / model, allow_pickle, given)
    if is_architecture(model):
        return _random(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(model, path, allow_pickle, given)
    if path.is_file():
        return _file(model, path, allow_pickle)
    known = embedded_models()
    if _HUB_ID.fullmatch(model) and not path.parent.is_dir() and path.suffix != ".safetensors":
        return ModelSource(name=model, path=model, kind="hub", model_id=_digest([model]))
    near = [*known, *(f"random:{name}" for name in architectures())]
    raise ModelError(
        f"model={model!r}: does not exist{nearest(model, near) or '.'} Give a diffusers folder, a .safetensors file, "
        f"a hub id (owner/name), a built-in model ({', '.join(known) or 'none is installed'}), or one without weights, "
        f"random:NAME or tiny:NAME ({', '.join(architectures())})."
    )


def _random(name: str) -> ModelSource:
    found = read_architecture(name)
    vae = found.config("vae")
    return ModelSource(
        name=name,
        path=str(found.path),
        kind="random",
        model_id=_digest([found.canonical()]),
        components=tuple(found.components),
        pipeline_class=found.pipeline_class,
        defaults=found.call,
        size_multiple=None if vae is None else _multiple(vae, found.config("transformer") or found.config("unet")),
        vae=vae,
    )


def _folder(name: str, path: Path, allow_pickle: bool, given: Collection[str]) -> ModelSource:
    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise ModelError(
            f"model={name!r}: is not a diffusers folder, it has no model_index.json. "
            "Give the folder that holds that file, or one that pipeline.save_pretrained wrote."
        )
    index = read_json(index_file, name)
    if not allow_pickle:
        _refuse_pickles(name, path, index)
    check_folder(name, path, index, given)
    configs = sorted(p for p in path.glob("*/*.json") if p.name in ("config.json", "scheduler_config.json"))
    texts = [_canonical(index)]
    texts += [f"{p.relative_to(path)}{_canonical(read_json(p, name))}" for p in configs]
    named: Any = index.get("_class_name")  # or [file, class] of code beside it
    return ModelSource(
        name=name,
        path=str(path),
        kind="folder",
        model_id=_digest(texts),
        components=tuple(key for key in index if not key.startswith("_")),
        pipeline_class=str(named[-1]) if isinstance(named, list) else cast("str | None", named),
        defaults=_defaults(path, name),
        size_multiple=_size_multiple(path, name),
        vae=_vae(path, name),
    )


def _file(name: str, path: Path, allow_pickle: bool) -> ModelSource:
    if path.suffix in PICKLES and not allow_pickle:
        raise ModelError(
            f"model={name!r}: {path.suffix} is a pickle, which can run code when it is loaded. Give a .safetensors "
            "file, or allow_pickle=True (--allow-pickle) if you trust its source."
        )
    if path.suffix == ".gguf":
        raise ModelError(
            f"model={name!r}: a GGUF file holds one part of a model. In Python, give it beside a folder or hub id that "
            f"has the others: transformer=X.from_single_file({name!r}, quantization_config=...)."
        )
    if path.suffix not in (*PICKLES, *SAFE):
        raise ModelError(
            f"model={name!r}: must be a folder, or a {' '.join(SAFE)} file; {path.suffix!r} is neither. Give one of "
            "these, a hub id (owner/name), or a built-in model."
        )
    if path.suffix in SAFE:
        facts = [f"{tensor} {shape}" for tensor, shape in sorted(tensor_shapes(path, name).items())]
    else:
        facts = [path.name, str(path.stat().st_size)]
    return ModelSource(name=name, path=str(path), kind="file", model_id=_digest(facts))


def _refuse_pickles(name: str, path: Path, index: dict[str, Any]) -> None:
    """Raises ModelError for a component whose weights exist only as pickles."""
    for component in index:
        files = [p.name for p in (path / component).glob("*") if p.is_file()]
        pickles = sorted(f for f in files if f.endswith(PICKLES))
        if pickles and not any(f.endswith(SAFE) for f in files):
            raise ModelError(
                f"model={name!r}: {component}/{pickles[0]} is a pickle, which can run code when it is loaded. Convert "
                "it to safetensors, or allow_pickle=True (--allow-pickle) if you trust its source."
            )


def read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model={name!r}: {path.name} cannot be read as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ModelError(f"model={name!r}: {path.name} must hold one JSON object.")
    return cast("dict[str, Any]", values)


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in values.items() if k not in _VARYING}, sort_keys=True)


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _defaults(path: Path, name: str) -> dict[str, Any]:
    """The `call` object of the folder's parafuse.json."""
    file = path / DEFAULTS_FILE
    if not file.is_file():
        return {}
    values = read_json(file, name)
    unknown = [key for key in values if key != "call"]
    if unknown or not isinstance(values.get("call", {}), dict):
        raise ModelError(
            f"model={name!r}: {DEFAULTS_FILE} must hold one object 'call'; found {unknown or 'no object'}."
        )
    return values.get("call", {})


def _size_multiple(path: Path, name: str) -> int | None:
    """VAE factor times the transformer's patch, from their configs; None where the configs do not say."""
    vae = _vae(path, name)
    if vae is None:
        return None
    model_file = next((p for n in ("transformer", "unet") if (p := path / n / "config.json").is_file()), None)
    return _multiple(vae, read_json(model_file, name) if model_file else None)


def _vae(path: Path, name: str) -> dict[str, Any] | None:
    file = path / "vae" / "config.json"
    return read_json(file, name) if file.is_file() else None


def _multiple(vae: dict[str, Any], model: dict[str, Any] | None) -> int | None:
    factor = vae_factor(vae)
    if factor is None or model is None:
        return factor
    patch = model.get("patch_size") or model.get("all_patch_size") or 1
    patch = int(patch[-1] if isinstance(patch, list) else patch)
    if patch == 1 and model.get("in_channels") == 4 * vae.get("latent_channels", 0):
        patch = 2  # latents are packed two by two into channels before the transformer (FLUX and its relatives)
    return factor * patch


def vae_factor(vae: dict[str, Any]) -> int | None:
    """Pixels per latent along one side, by the rules of diffusers' autoencoders; None for a config that fits none."""
    for key in ("scale_factor_spatial", "spatial_compression_ratio"):
        if vae.get(key) is not None:
            return int(vae[key])
    if "spatio_temporal_scaling" in vae:  # LTX
        return int(vae.get("patch_size", 1)) * 2 ** sum(map(bool, vae["spatio_temporal_scaling"]))
    if "spatial_expansions" in vae:  # Mochi
        return math.prod(vae["spatial_expansions"])
    if "temperal_downsample" in vae:
        return 2 ** len(vae["temperal_downsample"])
    for key in ("encoder_block_out_channels", "block_out_channels"):
        if key in vae:
            return 2 ** (len(vae[key]) - 1)
    return None
