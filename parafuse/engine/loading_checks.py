"""Checks what is given to `Engine.from_pretrained` beside the model, before ranks are started or weights are loaded."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from parafuse.config import DTYPES, Config
from parafuse.engine.architecture import read_architecture
from parafuse.engine.folder import check_variant
from parafuse.engine.loading_keywords import REFUSED, Keyword, keywords_of
from parafuse.engine.memory.check import check_files
from parafuse.engine.plan import Plan
from parafuse.engine.quantize.saved import saved_by
from parafuse.engine.quantize.settle import check_settled
from parafuse.engine.quantized import check_quantized
from parafuse.engine.source import ModelSource, read_json
from parafuse.errors import ConfigError, reject_unknown

DENOISER = ("transformer", "unet", "prior", "decoder")
MOST_SENT_BYTES = 1 << 30
"""Of objects that are pickled for the ranks that an engine starts."""


def own_config(config: Any, given: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The `Config`, and the keywords: diffusers too has a `config`, the configuration of a single file."""
    if isinstance(config, (str, Path)):
        return Config(), {"single_file_config": str(config), **given}
    if config is not None and not isinstance(config, Config):
        raise ConfigError(
            f"config={type(config).__name__}: must be a parafuse.Config, or, for a single file, the folder or hub id "
            "that has its configuration."
        )
    return config or Config(), dict(given)


def taken(
    source: ModelSource, config: Config, plan: Plan | None, given: dict[str, Any]
) -> tuple[Config, dict[str, Any]]:
    """The config with what keywords of diffusers say of it (dtype, device), and the keywords that go to diffusers.

    Raises ConfigError for one that is unknown, refused, or says something else than the config or plan."""
    kind, known = source.kind, keywords_of(source.kind)
    left = dict(given)
    if kind != "file" and "single_file_config" in left:
        raise ConfigError(
            f"config={left['single_file_config']!r}: must be a parafuse.Config; diffusers reads the configuration of a "
            "single file from another place, that of a folder or hub id from its own."
        )
    check_names(source, left)
    for name, word in known.items():
        if word.verdict == REFUSED and name in left:
            _refuse(name, left.pop(name), word)
    config = _dtype(source, config, plan, left)
    config = _device(config, plan, left)
    if kind in ("folder", "hub"):
        _check_safetensors(config, left)
        _check_custom(source, left)
        if left.get("quantization_config") is not None and left.get("low_cpu_mem_usage") is False:
            raise ConfigError("low_cpu_mem_usage=False: diffusers quantizes only without it; leave it out.")
    if kind == "folder" and left.get("variant"):
        check_variant(source.name, Path(source.path), left["variant"])
    for name in source.components or ():
        if isinstance(left.get(name), (str, Path)) and kind != "pipeline":
            raise ConfigError(f"{name}={str(left[name])!r}: must be a loaded part, or None; load it with its class.")
    return config, left


def check_loading(source: ModelSource, plan: Plan, given: dict[str, Any], *, sent: bool) -> None:
    """What depends on the plan. `sent`: this process starts other ranks, which get all that is given."""
    check_quantized(source, plan, given)
    check_settled(plan, saved_by(source, given))
    check_files(source, plan, given)
    for name, value in given.items() if sent else ():
        _check_sent(name, value)


def check_names(source: ModelSource, given: Iterable[str], parameters: Iterable[str] | None = None) -> None:
    """Raises ConfigError for keywords that neither a loader nor the pipeline takes, with the nearest name.

    `parameters`: those of the pipeline's class; without them they are looked up where something is unknown otherwise,
    and if the class is not known yet, everything passes."""
    known = [*keywords_of(source.kind), *(source.components or ())]
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    if parameters is None:
        parameters = _parameters(source, given)
    if parameters is not None:
        reject_unknown(f"from_pretrained of model={source.name!r}", unknown, [*known, *parameters])


def parameters_of(found: Any) -> list[str] | None:
    """Arguments of a pipeline class; None where it takes any."""
    import inspect

    parameters = list(inspect.signature(found.__init__).parameters.values())[1:]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters]


def _parameters(source: ModelSource, given: Iterable[str]) -> list[str] | None:
    """Arguments of the pipeline's class; None where the class is not known before it is loaded."""
    if source.kind == "random":
        return list(read_architecture(source.name).keywords)
    names = dict(given) if isinstance(given, dict) else {}
    file = custom_file(source, names.get("custom_pipeline"))
    if file is not None:
        return _parameters_in(file)
    if names.get("custom_pipeline") or names.get("load_connected_pipeline") or not source.pipeline_class:
        return None
    import diffusers

    found = getattr(diffusers, str(source.pipeline_class), None)
    return None if found is None else parameters_of(found)


def _parameters_in(file: Path) -> list[str] | None:
    """Arguments of the classes in a file of code, which is not run."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"custom_pipeline={str(file)!r}: cannot be read as Python ({error}).") from error
    makers = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    if not makers or any(maker.args.kwarg for maker in makers):
        return None  # a class that inherits them
    return [arg.arg for maker in makers for arg in (*maker.args.args[1:], *maker.args.kwonlyargs)]


def custom_file(source: ModelSource, custom: Any) -> Path | None:
    """The file on this disk that has the pipeline's class; None where diffusers has it, or the hub.

    Raises ConfigError for a path that does not exist."""
    if source.kind == "folder":
        index = Path(source.path) / "model_index.json"
        named = read_json(index, source.name).get("_class_name") if index.is_file() else None
        module = custom if custom is not None else (named[0] if isinstance(named, list) and named else None)
        own = Path(source.path) / f"{module}.py"
        if module is not None and own.is_file():
            return own
    if custom is None:
        return None
    path = Path(custom).expanduser()
    file = path if path.suffix == ".py" else path / "pipeline.py"
    if file.is_file():
        return file
    if path.suffix == ".py" or path.is_dir():
        raise ConfigError(
            f"custom_pipeline={str(custom)!r}: {file} does not exist; give a .py file, a folder with pipeline.py, a "
            "hub id, or the name of a community pipeline of diffusers."
        )
    return None


def _refuse(name: str, value: Any, word: Keyword) -> None:
    if value is None or value is False:
        return
    shown = repr(value) if isinstance(value, (str, int, float, dict, list, tuple)) else type(value).__name__
    raise ConfigError(f"{name}={shown}: {word.note}.")


def _dtype(source: ModelSource, config: Config, plan: Plan | None, left: dict[str, Any]) -> Config:
    """Takes one dtype out of the keywords into the config. Dtypes by component stay; the plan says the denoiser's."""
    names = [name for name in ("dtype", "torch_dtype") if left.get(name) is not None]
    if len(names) == 2:
        raise ConfigError("dtype: given beside torch_dtype, its older name; leave one out.")
    for name in ("dtype", "torch_dtype"):
        if left.get(name, 0) is None:
            del left[name]
    if not names:
        return config
    name, value = names[0], left.pop(names[0])
    if isinstance(value, dict):
        if source.kind == "file":
            raise ConfigError(f"{name}={value}: a single file has one dtype for all parts; give a folder.")
        if source.components is not None:
            reject_unknown(name, value, [*source.components, "default"])
        texts = {part: _dtype_name(f"{name}[{part!r}]", one) for part, one in value.items()}
        left["dtype"] = {part: _torch_dtype(text) for part, text in texts.items()}
        denoiser = next((part for part in DENOISER if part in (source.components or texts)), None)
        text = texts.get(denoiser or "", texts.get("default", "float32"))
    else:
        text = _dtype_name(name, value)
    there = plan.dtype if plan is not None else config.dtype
    if there not in ("auto", text):
        whose = "plan" if plan is not None else "Config"
        raise ConfigError(f"{name}={text}: the {whose} says dtype={there!r}; leave one out.")
    return config if plan is not None else replace(config, dtype=text)


def _dtype_name(name: str, value: Any) -> str:
    text = str(value).removeprefix("torch.")
    if text not in DTYPES[1:]:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(DTYPES[1:])} (or the torch.dtype).")
    return text


def _torch_dtype(text: str) -> Any:
    import torch

    return getattr(torch, text)


def _device(config: Config, plan: Plan | None, left: dict[str, Any]) -> Config:
    """Takes `device_map` out of the keywords into the config."""
    value = left.pop("device_map", None)
    if value is None:
        return config
    if value not in ("cpu", "cuda"):
        raise ConfigError(
            f"device_map={value!r}: must be 'cpu' or 'cuda': each rank has one device, and a pipeline's parts stay "
            "together on it. Leave it out and use Config(parallel=...); or, on one rank, load the pipeline with "
            "diffusers and give it to Engine.from_pipeline."
        )
    there = plan.device if plan is not None else config.device
    if there not in ("auto", value):
        whose = "plan" if plan is not None else "Config"
        raise ConfigError(f"device_map={value!r}: the {whose} says device={there!r}; leave one out.")
    return config if plan is not None else replace(config, device=value)


def _check_safetensors(config: Config, left: dict[str, Any]) -> None:
    """Pickles are loaded only by those who have allowed them."""
    if left.get("use_safetensors", 0) is None:
        del left["use_safetensors"]
    if left.get("use_safetensors") is False and not config.allow_pickle:
        raise ConfigError(
            "use_safetensors=False: loads pickles, which can run code; leave it out, or Config(allow_pickle=True) if "
            "you trust their source."
        )


def _check_custom(source: ModelSource, left: dict[str, Any]) -> None:
    """Code that comes with a model is run only by those who trust it."""
    custom = left.get("custom_pipeline")
    file = custom_file(source, custom)
    where = str(file) if file else custom if isinstance(custom, str) and "/" in custom else None
    if where and not left.get("trust_remote_code"):
        raise ConfigError(
            f"custom_pipeline={where!r}: is code that would be run; read it, and give trust_remote_code=True."
        )


def _check_sent(name: str, value: Any) -> None:
    """Raises ConfigError for an object that cannot go to the ranks that this process starts."""
    parameters = getattr(value, "parameters", None)
    weights: Any = parameters() if callable(parameters) else ()
    size = sum(p.nbytes for p in weights)
    way_out = "start all ranks with torchrun, or save it into the model's folder"
    if size > MOST_SENT_BYTES:
        raise ConfigError(f"{name}: {size / 1e9:.0f} GB would be sent to every rank that is started; {way_out}.")
    try:
        pickle.dumps(value)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{name}: cannot be sent to the ranks that are started ({reason}); {way_out}.") from error
