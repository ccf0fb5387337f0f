"""Checks a call of the pipeline before anything runs, and lets all ranks agree on it. Checking is torch-free."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import secrets
from collections.abc import Iterable
from typing import Any, cast

from parafuse.engine.source import ModelSource
from parafuse.errors import ConfigError, reject_unknown

AT_LEAST_ONE = ("num_inference_steps", "num_images_per_prompt", "num_videos_per_prompt", "num_frames")
LONGEST_FACT = 60
SIZES = ("width", "height")
SAME_CALL = (
    "Start every rank with the same arguments, or give all prompts in one call, with Parallel(data=N); an engine made "
    "with alone=True runs each rank's own."
)

NUM_PICTURES = ("num_images_per_prompt", "num_videos_per_prompt")
"""Keywords of pipelines that say how many pictures each prompt gets."""


def check_call(source: ModelSource, keywords: dict[str, Any], *, encodes: bool = True) -> dict[str, Any]:
    """The keywords of a call with the model's defaults filled in. Raises ConfigError for the first that is wrong.

    `prompt` may be any text or list of texts: empty, long, or in any script. `encodes`: whether the pipeline can read
    text; where its text encoders were left out, texts among the defaults are too."""
    defaults = _defaults(source, keywords, encodes)
    # None is "not given", but no negative prompt is a thing to ask for.
    out = defaults | {k: v for k, v in keywords.items() if v is not None or k.startswith("negative_")}
    _check_prompt(out)
    for name in AT_LEAST_ONE:
        if out.get(name) is not None and not _is_count(out[name]):
            raise ConfigError(f"{name}={out[name]!r}: must be a whole number of at least 1.")
    for name in SIZES:
        _check_size(name, out.get(name), source.size_multiple)
    for name in ("guidance_scale", "true_cfg_scale"):
        if out.get(name) is not None and not _is_number(out[name]):
            raise ConfigError(f"{name}={out[name]!r}: must be a finite number.")
    prompt, negative = out.get("prompt"), out.get("negative_prompt")
    for index, text in enumerate(cast("list[Any]", negative) if isinstance(negative, list) else ()):
        if not isinstance(text, (str, list)):
            raise ConfigError(f"negative_prompt[{index}]={text!r}: must be a text.")
    _check_generators(out)
    if isinstance(prompt, list) and isinstance(negative, list):
        prompts, negatives = cast("list[str]", prompt), cast("list[str]", negative)
        if len(prompts) != len(negatives):
            raise ConfigError(f"negative_prompt: {len(negatives)} given for {len(prompts)} prompts; give one for each.")
    if "negative_prompt" not in keywords and isinstance(negative, str) and isinstance(prompt, list):
        out["negative_prompt"] = [negative] * len(cast("list[str]", prompt))
    return out


def _defaults(source: ModelSource, keywords: dict[str, Any], encodes: bool) -> dict[str, Any]:
    """Those of the model's defaults that can stand beside what is given."""
    defaults = dict(source.defaults)
    if any(name.startswith("negative_") for name in keywords):  # embeddings, say: not both
        defaults.pop("negative_prompt", None)
    if not encodes:
        if keywords.get("prompt") is not None and keywords.get("prompt_embeds") is None:
            raise ConfigError(
                "prompt: given, but the pipeline was loaded without its text encoders; give prompt_embeds, of an "
                "engine's encode_prompt."
            )
        for name in ("prompt", "negative_prompt"):
            defaults.pop(name, None)
    return defaults


def can_encode(pipeline: Any) -> bool:
    """Whether a pipeline can read text: not so where it has places for text encoders, and all of them are empty."""
    names = [name for name in inspect.signature(type(pipeline).__init__).parameters if name.startswith("text_encoder")]
    return not names or any(getattr(pipeline, name, None) is not None for name in names)


def _check_generators(keywords: dict[str, Any]) -> None:
    """A list has one for each picture."""
    given, prompt = keywords.get("generator"), keywords.get("prompt")
    if not isinstance(given, list) or not isinstance(prompt, (str, list)):
        return
    prompts = len(cast("list[Any]", prompt)) if isinstance(prompt, list) else 1
    each = next((keywords[name] for name in AT_LEAST_ONE[1:3] if keywords.get(name)), 1)
    found = len(cast("list[Any]", given))
    if found != prompts * each:
        raise ConfigError(f"generator: {found} given for {prompts * each} pictures; give one for each, or one for all.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_prompt(keywords: dict[str, Any]) -> None:
    prompt = keywords.get("prompt")
    if prompt is None or isinstance(prompt, str):
        return
    prompts = cast("list[Any]", prompt)
    if isinstance(prompt, list) and not prompts:
        raise ConfigError("prompt=[]: is empty; give at least one text.")
    if not isinstance(prompt, list):
        raise ConfigError(f"prompt={prompt!r}: must be a text or a list of texts.")
    for index, text in enumerate(prompts):
        if not isinstance(text, str):
            raise ConfigError(f"prompt[{index}]={text!r}: must be a text.")


def _check_size(name: str, value: Any, multiple: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r}: must be a whole number of pixels, at least 1.")
    if multiple and value % multiple:
        below, above = value // multiple * multiple, -(-value // multiple) * multiple
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"{name}={value}: must be a multiple of {multiple} for this model's VAE and patches; use {near}."
        )


def check_keywords(names: Iterable[str], accepted: Iterable[str], pipeline: str) -> None:
    """Raises ConfigError for a keyword that the pipeline's call does not take, with the nearest one that it does."""
    reject_unknown(f"call of {pipeline}", names, accepted)


def fresh_seed() -> int:
    """A seed for a request that gave none."""
    return secrets.randbits(31)


def facts(values: Any) -> dict[str, str]:
    """Name -> value as text, equal on ranks that were given the same; nested names with dots. Long values by hash,
    tensors and pictures by content."""
    found: dict[str, str] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in cast("dict[Any, Any]", value).items():
                walk(f"{name}.{key}" if name and key else name or str(key), inner)
            return
        text = json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)
        hashed = hashlib.sha256(text.encode()).hexdigest()[:16]
        found[name] = text if len(text) <= LONGEST_FACT else f"{text[:LONGEST_FACT]}... ({hashed})"

    walk("", values)
    return found


def _plain(value: Any) -> Any:
    if hasattr(type(value), "__dataclass_fields__"):  # a modular pipeline's state
        names: Iterable[str] = type(value).__dataclass_fields__
        value = {"": type(value).__name__} | {name: getattr(value, name) for name in names}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in cast("list[Any]", value)]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if hasattr(value, "detach"):  # a tensor
        import torch

        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return [str(value.dtype), list(value.shape), hashlib.sha256(flat.numpy().tobytes()).hexdigest()]
    if hasattr(value, "get_state"):  # a generator
        return ["generator", _plain(value.get_state())]
    if isinstance(value, bytes):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    if hasattr(value, "tobytes"):  # an array, or a picture with its palette
        layout = [str(getattr(value, name, None)) for name in ("dtype", "shape", "mode", "size")]
        palette = value.getpalette() if hasattr(value, "getpalette") else None
        return [type(value).__name__, layout, palette, hashlib.sha256(value.tobytes()).hexdigest()]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return str(value) if name in ("torch.dtype", "torch.device") else name
