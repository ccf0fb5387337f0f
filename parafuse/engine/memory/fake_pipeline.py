"""A pipeline whose weights have sizes and no memory: from an architecture, or from the configurations of a folder.

Schedulers, tokenizers, processors and buffers are real, so that the pipeline's own call runs; parameters are fake
tensors, which say that they are on the CPU.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from parafuse.engine.architecture import read_architecture
from parafuse.engine.random_weights import class_of, empty_module, fill, make_processor
from parafuse.engine.source import ModelSource, read_json
from parafuse.engine.stand_in import make_tokenizer
from parafuse.engine.targets import AUTOENCODERS
from parafuse.errors import ConfigError, ModelError
from parafuse.parallel.hooks import override
from parafuse.parallel.packed import inside

CPU = torch.device("cpu")


def fake_mode() -> FakeTensorMode:
    """What makes weights without memory; real tensors may go beside them."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_pipeline(source: ModelSource, dtype: torch.dtype, mode: FakeTensorMode) -> Any:
    """The pipeline of a model that was found, with fake weights in `dtype`. No download, no weights, no communication.

    Raises ModelError for a model whose configurations are not at hand."""
    if source.kind == "random":
        return _of_architecture(source.name, dtype, mode)
    return _of_folder(source, folder_of(source), dtype, mode)


def folder_of(source: ModelSource) -> Path:
    """Where the configurations of a model lie. Raises ModelError for a single file, or a hub id that is not in the
    local cache."""
    if source.kind == "folder":
        return Path(source.path)
    if source.kind != "hub":
        raise ModelError(
            f"model={source.name!r}: its memory cannot be told before it is loaded: a single file holds no "
            "configurations. Give a diffusers folder, or a hub id that is in the local cache."
        )
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.path, "model_index.json")
    if not isinstance(found, str):
        raise ModelError(
            f"model={source.name!r}: is not in the local cache, and nothing is downloaded to tell its memory. Load it "
            "once, or give a diffusers folder."
        )
    return Path(found).parent


def _of_architecture(name: str, dtype: torch.dtype, mode: FakeTensorMode) -> Any:
    import diffusers

    found = read_architecture(name)
    parts: dict[str, Any] = {}
    for key, part in found.components.items():
        if "parts" in part:
            parts[key] = make_processor(part, parts)
        elif "stand_in" in part:
            parts[key] = make_tokenizer(part["stand_in"], part["config"])
        elif issubclass(kind := class_of(part), nn.Module):
            parts[key] = _faked(empty_module(kind, part["config"], dtype), key, dtype, mode)
        else:
            parts[key] = kind(**part["config"])
    return getattr(diffusers, found.pipeline_class)(**(found.keywords | parts))


def _of_folder(source: ModelSource, folder: Path, dtype: torch.dtype, mode: FakeTensorMode) -> Any:
    import diffusers

    index = read_json(folder / "model_index.json", source.name)
    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is None:
        raise ModelError(
            f"model={source.name!r}: its memory cannot be told before it is loaded: its pipeline "
            f"{index.get('_class_name')!r} is none of diffusers' own."
        )
    parts: dict[str, Any] = {}
    for key, entry in index.items():
        if key.startswith("_"):
            continue
        if not isinstance(entry, list):
            parts[key] = entry  # a setting of the pipeline
            continue
        library, name = cast("list[Any]", entry)
        parts[key] = None if library is None else _part(source.name, folder / key, library, name, dtype, mode)
    expected = inspect.signature(kind.__init__).parameters
    return kind(**{key: part for key, part in parts.items() if key in expected})  # others are told of when it is loaded


def _part(model: str, folder: Path, library: str, name: str, dtype: torch.dtype, mode: FakeTensorMode) -> Any:
    """One component, from its own configuration."""
    from diffusers import pipelines

    module = getattr(pipelines, library, None) or importlib.import_module(library)
    kind: Any = getattr(module, name, None)
    where = f"model={model!r}: {folder.name}"
    if kind is None:
        raise ModelError(f"{where}: {library} has no class {name!r}, which model_index.json names.")
    try:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)) and not hasattr(kind, "from_config"):
            return kind.from_pretrained(folder)
        if not issubclass(kind, nn.Module) and not name.startswith("AutoModel"):
            return kind.from_pretrained(folder)  # a scheduler
        module = _faked(empty_module(kind, _settings(kind, folder), dtype), folder.name, dtype, mode)
        return module.requires_grad_(True)  # as it is loaded: torch takes some products in another way then
    except (OSError, ValueError, TypeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{where}: its configuration cannot be read ({first}).") from error


def _settings(kind: Any, folder: Path) -> Any:
    """The configuration of a module, as its class takes it."""
    if hasattr(kind, "extract_init_dict"):  # diffusers'
        return kind.extract_init_dict(kind.load_config(folder))[0]
    import transformers

    own: Any = getattr(kind, "config_class", None) or transformers.AutoConfig
    return own.from_pretrained(folder)


def _faked(module: nn.Module, name: str, dtype: torch.dtype, mode: FakeTensorMode) -> nn.Module:
    """Gives every parameter a size and no memory."""
    with mode:
        fill(module, name, CPU, dtype)
    return module.eval().requires_grad_(False)


@contextmanager
def convertible(pipeline: Any) -> Iterator[None]:
    """Inside, a pipeline can give an autoencoder another dtype, as those of Stable Diffusion XL do before they decode:
    torch puts no fake tensor in the place of another. Stands on instances; gone afterwards, the dtype stays."""
    undo: list[Callable[[], None]] = []
    try:
        for name, module in components(pipeline).items():
            if name in AUTOENCODERS:
                undo.append(override(module, "to", partial(_converted, module)))
        yield
    finally:
        for back in reversed(undo):
            back()


def _converted(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """What `Module.to` does, but for the device: all of it is on none."""
    dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), None)
    for part in module.modules() if dtype is not None else ():
        for name, x in part._parameters.items():
            if x is not None and x.is_floating_point():
                part._parameters[name] = nn.Parameter(x.detach().to(dtype), requires_grad=x.requires_grad)
        for name, x in part._buffers.items():
            if x is not None and x.is_floating_point():
                part._buffers[name] = x.to(dtype)
    return module


def weights(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers that take memory, each storage once; of packed ones what they are made of."""
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        for part in inside(tensor):
            key = part.untyped_storage()._cdata
            if key not in seen:
                seen.add(key)
                yield part


def nbytes(module: nn.Module) -> int:
    """Of a module's weights and buffers, as they are now: quantized ones count as what they are packed in."""
    return sum(part.untyped_storage().nbytes() for part in weights(module))


def bytes_by_path(module: nn.Module) -> dict[str, int]:
    """Path of each submodule that holds tensors itself -> their bytes; a tensor that several share counts at the first
    one. For who places parts of a model."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for tensor in (*owner.parameters(recurse=False), *owner.buffers(recurse=False)):
            for part in inside(tensor):
                key = part.untyped_storage()._cdata
                if key not in seen:
                    seen.add(key)
                    found[path] = found.get(path, 0) + part.untyped_storage().nbytes()
    return found


def components(pipeline: Any) -> dict[str, nn.Module]:
    """Name -> component with weights, each module once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            found.setdefault(id(part), (name, part))
    if not found:
        raise ConfigError(f"{type(pipeline).__name__}: has no component with weights.")
    return dict(found.values())
