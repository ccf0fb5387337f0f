"""Builds the pipeline of an architecture without weights, on its device, with random weights: no copy on the CPU.

Modules are built as `from_pretrained` builds them: parameters without memory, buffers with their true values. Then
every parameter gets memory on the device, in its dtype, and values that depend on its name alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parafuse.engine.architecture import Architecture
from parafuse.engine.stand_in import PictureProcessor, make_tokenizer
from parafuse.errors import ConfigError, reject_unknown

SCALES = ("weight", "gamma", "scale")
"""Last parts of the names of norms' scales."""
CHUNK = 1 << 26
"""Values drawn at a time, in float32 whatever the dtype: a bfloat16 weight is the float32 one, rounded."""
Dtypes = torch.dtype | dict[str, torch.dtype]


def build_pipeline(architecture: Architecture, *, device: torch.device, dtype: Dtypes, **given: Any) -> Any:
    """The pipeline with random weights, the same on every rank and in every run. No communication.

    `given`: components to take instead, and other arguments of the pipeline. Raises ConfigError for any other."""
    import diffusers

    known = [*architecture.components, *architecture.keywords]
    reject_unknown(f"{architecture.pipeline_class} with random weights", given, known)
    parts: dict[str, Any] = {}
    for name, part in architecture.components.items():
        if name in given:
            continue
        if "parts" in part:
            parts[name] = make_processor(part, parts | given)
        else:
            parts[name] = build_part(name, part, device, _dtype_of(name, dtype))
    return getattr(diffusers, architecture.pipeline_class)(**(architecture.keywords | parts | given))


def build_part(name: str, part: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A component: a tokenizer, something with a config alone, or a module in eval mode. `device`: "meta" for none."""
    if "stand_in" in part:
        return make_tokenizer(part["stand_in"], part["config"])
    found = class_of(part)
    if not issubclass(found, nn.Module):
        return found(**part["config"])
    module = empty_module(found, part["config"], dtype)
    fill(module, name, device, dtype)
    return module.to(device).eval().requires_grad_(False)


def class_of(part: dict[str, Any]) -> type[Any]:
    """Of an architecture's component."""
    import diffusers
    import transformers

    library = {"diffusers": diffusers, "transformers": transformers}[part["library"]]
    return getattr(library, part["class"])


def make_processor(part: dict[str, Any], made: dict[str, Any]) -> PictureProcessor:
    """From what has been made of the pipeline so far."""
    inner = part["parts"]["image_processor"]
    return PictureProcessor(
        made[part["parts"]["tokenizer"]], class_of(inner)(**inner["config"]), part["stand_in"]["image_token"]
    )


def _dtype_of(name: str, dtype: Dtypes) -> torch.dtype:
    """diffusers' rule for dtypes by component."""
    found: Any = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype={found!r}: must be a torch dtype, or a dict of them by component.")
    return found


def empty_module(found: type[Any], config: Any, dtype: torch.dtype) -> nn.Module:
    """The module, its parameters on the meta device, its buffers on the CPU.

    `config`: its arguments, or a configuration of transformers."""
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    with _building(dtype), init_empty_weights(include_buffers=False):
        settings: Any = getattr(found, "config_class", None)  # of transformers' models
        if not isinstance(config, dict):
            kind: Any = found
            module = kind.from_config(config) if settings is None else kind(config)  # an AutoModel, or a class
        else:
            module = found(**config) if settings is None else found(settings(**config))
    if isinstance(module, PreTrainedModel):
        module.config.dtype = dtype
        module.tie_weights()  # building without memory has made two of each
    return module


@contextmanager
def _building(dtype: torch.dtype) -> Iterator[None]:
    """Modules are made on the CPU in this dtype; random numbers that they draw are given back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def fill(module: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every parameter memory and values, and every buffer that is loaded beside them its dtype."""
    in_float32 = _in_float32(module, dtype)

    def kept(key: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if in_float32 & set(key.split(".")) else dtype

    made: dict[int, nn.Parameter] = {}  # tied ones stay one
    for path, owner in module.named_modules():
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            key = f"{path}.{leaf}"
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=kept(key, parameter), device=device)
                _draw(values, leaf, isinstance(owner, nn.Embedding), zlib.crc32(f"{name}.{key}".encode()))
                made[id(parameter)] = nn.Parameter(values, requires_grad=False)
            owner._parameters[leaf] = made[id(parameter)]
        for leaf, buffer in list(owner._buffers.items()):
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                owner._buffers[leaf] = buffer.to(kept(f"{path}.{leaf}", buffer))


def _in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of modules and parameters that `from_pretrained` keeps in float32."""
    from transformers import PreTrainedModel

    names: Any = getattr(module, "_keep_in_fp32_modules", None) or ()
    if isinstance(module, PreTrainedModel):
        strict: Any = module._keep_in_fp32_modules_strict or ()
        if dtype not in (torch.float16, torch.bfloat16):
            return set()
        return {*strict, *(names if dtype == torch.float16 else ())}
    return {names} if isinstance(names, str) else set(names)


def _draw(values: Tensor, leaf: str, is_embedding: bool, seed: int) -> None:
    """Normal values. A product's keep the size of what goes through (variance 1 / fan-in), a norm's scale is about 1,
    a bias small: nothing grows or dies out with depth, and nothing is zero, so that every part has its effect."""
    if values.is_meta or type(values) is not Tensor or values.numel() == 0:  # fake ones have no values
        return
    generator = torch.Generator(values.device).manual_seed(seed)
    fan_in = values[0].numel() if values.ndim > 1 else 1
    mean = 1.0 if fan_in == 1 and leaf in SCALES else 0.0
    std = 1.0 if is_embedding else 1 / math.sqrt(fan_in) if fan_in > 1 else 0.1
    for part in values.view(-1).split(CHUNK):
        drawn = torch.empty(part.shape, dtype=torch.float32, device=part.device)
        part.copy_(drawn.normal_(mean, std, generator=generator))
