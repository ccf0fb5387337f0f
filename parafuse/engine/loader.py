"""Loads the pipeline of a model that was found: from a diffusers folder, the hub, a single file, or without weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parafuse.engine.folder import SAFE, WAY_OUT, tensor_shapes
from parafuse.engine.loading_checks import check_names, custom_file, parameters_of
from parafuse.engine.loading_keywords import keywords_of
from parafuse.engine.source import ModelSource, read_json
from parafuse.errors import ConfigError, ModelError
from parafuse.parallel.packed import inside

SHAPES = re.compile(r"(\S+) expected shape (?:torch\.Size\()?(\[[\d, ]*\])\)?, but got (?:torch\.Size\()?(\[[\d, ]*\])")
"""diffusers' words for a tensor in a file that is not as large as in the model."""


def load_pipeline(
    source: ModelSource, *, dtype: str | dict[str, Any], allow_pickle: bool, device: Any = "cpu", **kwargs: Any
) -> Any:
    """The diffusers pipeline in eval mode, on the CPU; one without weights is built on `device`. Every rank calls it;
    no communication.

    Raises ModelError for what diffusers cannot load."""
    import torch
    from safetensors import SafetensorError

    if "torch_dtype" not in kwargs:
        kwargs["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if source.kind == "random":
        return _random(source, torch.device(device), kwargs)
    if not allow_pickle and source.kind != "file":
        kwargs.setdefault("use_safetensors", True)
    try:
        pipeline = _single_file(source, kwargs) if source.kind == "file" else _from_pretrained(source, kwargs)
        for name, part in pipeline.components.items():
            if hasattr(part, "requires_grad_") and name not in kwargs:
                part.requires_grad_(False)  # as adapters leave it: compiled code is made for one of both
        return pipeline
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, LookupError, ImportError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = _not_fetched(error) if source.kind == "hub" else None
        if reason:
            raise ModelError(f"model={source.name!r}: {reason}, or give a folder.") from error
        reason = _of_another_shape(source, error) or f"cannot be loaded ({_first_line(error)})"
        raise ModelError(f"model={source.name!r}: {reason}") from error


def _from_pretrained(source: ModelSource, kwargs: dict[str, Any]) -> Any:
    """A folder or hub id. Raises ConfigError for keywords that the pipeline's class does not take: diffusers drops them
    with a warning."""
    import diffusers

    more = kwargs.keys() - keywords_of(source.kind).keys()
    if more and source.kind == "hub" and not kwargs.get("custom_pipeline"):
        where = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
        index: Any = diffusers.DiffusionPipeline.load_config(source.path, **where)
        named = getattr(diffusers, str(index.get("_class_name")), None)
        if named is not None and not kwargs.get("load_connected_pipeline"):
            check_names(source, kwargs, parameters_of(named))
    found, rest = _custom_class(source, kwargs)
    pipeline = (found or diffusers.DiffusionPipeline).from_pretrained(source.path, **rest)
    check_names(source, kwargs, parameters_of(type(pipeline)))
    _refuse_missing(source, pipeline, kwargs)
    return pipeline


def _custom_class(source: ModelSource, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that code beside the model or a custom pipeline defines, and the keywords without it; None where
    diffusers has the class. diffusers copies the code to a place of its own, where ranks would write at once."""
    from diffusers.utils.constants import HF_MODULES_CACHE
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
    from filelock import FileLock

    custom = kwargs.get("custom_pipeline")
    file = custom_file(source, custom)
    if file is None and custom is None:
        return None, kwargs
    folder, name = (str(file.parent.absolute()), file.name) if file else (str(custom), "pipeline.py")
    is_own = file is not None and custom is None
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(HF_MODULES_CACHE) / "parafuse.lock"):
        found = get_class_from_dynamic_module(
            folder,
            module_file=name,
            class_name=source.pipeline_class if is_own else None,
            cache_dir=kwargs.get("cache_dir"),
            revision=kwargs.get("custom_revision"),
            trust_remote_code=kwargs.get("trust_remote_code", False),
        )
    return found, {key: value for key, value in kwargs.items() if key not in ("custom_pipeline", "custom_revision")}


def _random(source: ModelSource, device: Any, kwargs: dict[str, Any]) -> Any:
    """An architecture with random weights."""
    from parafuse.engine.architecture import read_architecture
    from parafuse.engine.random_weights import build_pipeline

    dtypes = [kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs]
    return build_pipeline(read_architecture(source.name), device=device, dtype=dtypes[-1], **kwargs)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _of_another_shape(source: ModelSource, error: BaseException) -> str | None:
    """Which file of a folder has the tensor that diffusers found to have another shape; None for other errors."""
    found = SHAPES.search(str(error))
    if found is None or source.kind != "folder":
        return None
    tensor, wanted, there = found[1], found[2], found[3]
    for file in sorted(Path(source.path).glob("*/*.safetensors")):
        shape = tensor_shapes(file, file.name).get(tensor)
        if shape is not None and str(shape) == there:
            name = f"{file.parent.name}/{file.name}"
            return f"{name} has {tensor} of shape {there}, and its config.json asks for {wanted}. {WAY_OUT}"
    return None


def _not_fetched(error: BaseException) -> str | None:
    """Why the hub did not give a repository, and the way out; None where something else is wrong."""
    from huggingface_hub import errors

    chain: list[BaseException] = [error]
    for link in chain:
        chain += [e for e in (link.__cause__, link.__context__) if e is not None and e not in chain]
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return "its terms must be accepted on its page on the hub; do that, then `hf auth login`"
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return "the hub has no such repository, or it is private; check the name, `hf auth login`"
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return "is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it; unset it"
    if any(isinstance(e, errors.LocalEntryNotFoundError) for e in chain):
        why = _first_line(chain[-1])
        return f"is not in the local cache, and the hub cannot be reached ({why}); check the connection"
    return None


HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
"""Those of `from_pretrained` and `from_single_file` that say how to fetch from the hub."""
_CONFIGS = ["**/*.json", "*.json", "*.txt", "**/*.txt", "**/*.model"]


def _single_file(source: ModelSource, kwargs: dict[str, Any]) -> Any:
    """A single-file checkpoint. Its keys tell its type, and diffusers which hub repository holds the configuration of
    that type; the repository's model_index.json names the pipeline class."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, SingleFileComponentError
    from huggingface_hub import snapshot_download

    given = kwargs.pop("single_file_config", None)
    where = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
    kind = "given by config" if given else _single_file_type(source)
    hub_id = str(given) if given else DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    try:
        folder = hub_id if Path(hub_id).is_dir() else snapshot_download(hub_id, allow_patterns=_CONFIGS, **where)
    except OSError as error:
        raise ModelError(
            f"model={source.name!r}: a single file of type {kind!r}; its configuration {hub_id!r} "
            f"{_not_fetched(error) or _first_line(error)}, or convert the file to a diffusers folder."
        ) from error
    index = Path(folder) / "model_index.json"
    parts = read_json(index, source.name) if index.is_file() else {}
    found: Any = getattr(diffusers, str(parts.get("_class_name")), None)
    if not hasattr(found, "from_single_file"):
        raise _only_a_part(source, hub_id, parts, f"a single file of type {kind!r} holds no whole pipeline")
    check_names(source, kwargs, parameters_of(found))
    try:
        pipeline = found.from_single_file(source.path, config=folder, **kwargs)
    except SingleFileComponentError as error:
        raise _only_a_part(source, hub_id, parts, _first_line(error)) from error
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # diffusers leaves the dropout of a T5 encoder on
    _refuse_missing(source, pipeline, kwargs)
    return pipeline


def _single_file_type(source: ModelSource) -> str:
    """diffusers' name of the checkpoint's type, from the names and shapes of its tensors."""
    import torch
    from diffusers.loaders.single_file_utils import (
        DIFFUSERS_DEFAULT_PIPELINE_PATHS,
        infer_diffusers_model_type,
        load_single_file_checkpoint,
    )

    path = Path(source.path)
    if path.suffix in SAFE:
        shapes = tensor_shapes(path, source.name)
        tensors = {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items()}
    else:
        tensors = load_single_file_checkpoint(source.path)
    try:
        kind = infer_diffusers_model_type(tensors)
    except (NameError, KeyError, RuntimeError):  # a known layout in a size that diffusers does not know
        kind = None
    # "v1" is also what diffusers says of keys that it does not know: those of a LoRA, or of one component.
    unknown = kind == "v1" and not any(tensor.startswith("model.diffusion_model.") for tensor in tensors)
    if unknown or kind not in DIFFUSERS_DEFAULT_PIPELINE_PATHS:
        raise ModelError(
            f"model={source.name!r}: is no checkpoint that diffusers knows (a LoRA, or one part of a model?). "
            "Give a checkpoint of a whole model, or a diffusers folder."
        )
    return kind


def _only_a_part(source: ModelSource, hub_id: str, parts: dict[str, Any], why: str) -> ModelError:
    """The refusal of a file that lacks text encoders or VAE, as most files of transformers do."""
    name = next((n for n in ("transformer", "unet") if n in parts), None)
    way = "Give a diffusers folder."
    if name:
        part = f"{name}={parts[name][1]}.from_single_file({source.name!r})"
        way = f"In Python, load the other parts from the hub: Engine.from_pretrained({hub_id!r}, {part})."
    return ModelError(f"model={source.name!r}: {why.rstrip('.')}. {way}")


def _refuse_missing(source: ModelSource, pipeline: Any, given: Mapping[str, Any]) -> None:
    """Raises ModelError for weights that the files did not hold: diffusers leaves them empty, transformers draws random
    ones. What the user has loaded is his."""
    for name, part in pipeline.components.items():
        if part is None or part is given.get(name):
            continue
        if _missing(part) and hasattr(part, "tie_weights"):
            part.tie_weights()  # embeddings of T5, which may be written once or twice
        if missing := _missing(part):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            way_out = "Give a checkpoint of a whole model, or a diffusers folder."
            if source.kind != "file":
                way_out = f"Download it again, or load that part with its class and give it: {name}=..."
            raise ModelError(f"model={source.name!r}: lacks weights of {name}: {missing[0]}{more}. {way_out}")


def _missing(part: Any) -> list[str]:
    """Names of parameters that no file has given a value. transformers marks those that it has read."""
    found = dict(part.named_parameters()) if hasattr(part, "named_parameters") else {}
    is_read = {name: getattr(p, "_is_hf_initialized", False) for name, p in found.items()}
    marks = any(is_read.values()) and getattr(part, "hf_quantizer", None) is None  # which puts in others
    return [name for name, p in found.items() if any(x.is_meta for x in inside(p)) or (marks and not is_read[name])]
