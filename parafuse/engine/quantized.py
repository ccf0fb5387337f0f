"""Quantized weights: what library and device they need, before loading, and what a pipeline has, for the receipt."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parafuse.engine.plan import Plan
from parafuse.engine.quantize.saved import check_saved, configurations
from parafuse.engine.quantize.settle import capability_here
from parafuse.engine.source import ModelSource, read_json
from parafuse.engine.state import components_of
from parafuse.errors import ConfigError, reject_unknown


@dataclass(frozen=True)
class Method:
    """A quantization method of diffusers."""

    package: str
    """As pip calls it; empty: none beyond diffusers."""
    module: str
    needs_gpu: bool = False
    """diffusers' own quantizer refuses the CPU."""
    only_saved: bool = False
    """Loads what was quantized before; does not quantize."""


METHODS: dict[str, Method] = {
    "bitsandbytes_4bit": Method("bitsandbytes", "bitsandbytes", needs_gpu=True),
    "bitsandbytes_8bit": Method("bitsandbytes", "bitsandbytes", needs_gpu=True),
    "gguf": Method("gguf", "gguf", only_saved=True),
    "torchao": Method("torchao", "torchao"),
    "quanto": Method("optimum-quanto", "optimum.quanto"),
    "modelopt": Method("nvidia-modelopt", "modelopt"),
    "auto-round": Method("auto-round", "auto_round", only_saved=True),
    "nunchaku_lite": Method("kernels", "kernels", needs_gpu=True, only_saved=True),
    "sdnq": Method("sdnq", "sdnq"),
    "bfl": Method("", "", only_saved=True),
}
"""By diffusers' names. Others, as those of transformers for text encoders, are left to their library."""


def check_quantized(source: ModelSource, plan: Plan, given: dict[str, Any]) -> None:
    """Raises ConfigError for a quantized model, or a wish for one, that cannot be had here. Reads no weights."""
    device = plan.device
    check_saved(source, plan, given, capability_here() if device == "cuda" else None)
    saved = dict(configurations(source, given))
    for part, facts in saved.items():
        is_ours = _library(source, part) == "diffusers"
        _check(f"model={source.name!r}: {part} is quantized", _method(facts), device if is_ours else "", saved=True)
    wish = given.get("quantization_config")
    if wish is None:
        return
    if plan.quantize:
        raise ConfigError(f"quantization_config: given beside quantize={plan.quantize!r}; leave one out.")
    if type(wish).__name__ != "PipelineQuantizationConfig":
        raise ConfigError(
            f"quantization_config={type(wish).__name__}: must be a diffusers.PipelineQuantizationConfig, which says it "
            "for each component."
        )
    parts = list(wish.quant_mapping or wish.components_to_quantize or ())
    if source.components is not None:
        reject_unknown("quantization_config", parts, source.components)
    double = next((part for part in parts if part in saved), None)
    if double:
        raise ConfigError(
            f"quantization_config: {double} is saved as {_method(saved[double])}, and stays so; leave it out."
        )
    loaded = next((part for part in parts if given.get(part) is not None), None)
    if loaded:
        raise ConfigError(f"quantization_config: {loaded} is given as an object; quantize it when you load it.")
    for part, method in _asked(wish, source):
        on = device if _library(source, part) == "diffusers" else ""
        _check(f"quantization_config: {part}", method, on, saved=False)


def _check(what: str, method: str, device: str, *, saved: bool) -> None:
    found = METHODS.get(method)
    if found is None:
        return
    if found.module and not _is_there(found.module):
        raise ConfigError(f"{what} with {method}, which needs {found.package}: pip install {found.package}.")
    if found.needs_gpu and device == "cpu":
        raise ConfigError(f"{what} with {method}: diffusers loads it on GPUs alone; use one, or torchao or GGUF.")
    if found.only_saved and not saved:
        raise ConfigError(f"{what} with {method}: it loads what was quantized before; use torchao or bitsandbytes.")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False


def _method(facts: dict[str, Any]) -> str:
    method = str(getattr(facts.get("quant_method"), "value", facts.get("quant_method")))
    if method == "bitsandbytes" or facts.get("load_in_4bit") or facts.get("load_in_8bit"):
        return "bitsandbytes_8bit" if facts.get("load_in_8bit") or facts.get("_load_in_8bit") else "bitsandbytes_4bit"
    return method


def _asked(wish: Any, source: ModelSource) -> Iterator[tuple[str, str]]:
    """(component, method) of a PipelineQuantizationConfig."""
    for part, one in (wish.quant_mapping or {}).items():
        yield part, _method(vars(one))
    if not wish.quant_mapping:
        for part in wish.components_to_quantize or ("transformer",):
            if source.components is None or part in source.components:
                yield part, str(wish.quant_backend)


def _library(source: ModelSource, part: str) -> str | None:
    """Which library's class a component has; None where it is not known before loading."""
    index = Path(source.path) / "model_index.json"
    if source.kind != "folder" or not index.is_file():
        return "diffusers" if part in ("transformer", "transformer_2", "unet") else None
    entry = read_json(index, source.name).get(part)
    return entry[0] if isinstance(entry, list) else None


def compute_dtype(module: Any) -> str | None:
    """The dtype that a module computes in: that of most of its weights that are not packed. Some models keep a few in
    float32, and not always the last ones."""
    sizes: Counter[str] = Counter()
    for p in module.parameters():
        if type(p).__name__ == "Parameter":
            sizes[str(p.dtype).removeprefix("torch.")] += p.numel()
    known = [name for name, _ in sizes.most_common() if name in ("float32", "bfloat16", "float16")]
    return known[0] if known else None


def weights_of(pipeline: Any) -> dict[str, str]:
    """Component -> how its weights are kept, as `bfloat16` or `bfloat16, torchao`."""
    found: dict[str, str] = {}
    for name, part in components_of(pipeline).items():
        if not hasattr(part, "named_parameters"):
            continue
        kept = compute_dtype(part) or "packed"
        config: Any = getattr(part, "config", None)
        facts: Any = getattr(config, "quantization_config", None)
        if facts is None and isinstance(config, dict):
            facts = config.get("quantization_config")
        facts = facts or getattr(getattr(part, "hf_quantizer", None), "quantization_config", None)
        if facts is not None:
            facts = facts if isinstance(facts, dict) else vars(facts)
            kept += f", {_method(facts)}"
        found[name] = kept
    return found
