"""Data parallel: the pictures of one call, spread over replicas, each with the noise one GPU would have drawn for it.

The call of a replica has one prompt for each of its pictures; a list of generators is cut as prompts are. `noise.py`
has what a single generator draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from parafuse.errors import ConfigError
from parafuse.parallel.layout import head_range

PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
PICTURES = ("image", "mask_image", "masked_image_latents", "control_image", "video", "last_image", "audio")
"""Arguments that come once for each prompt where they are lists, or tensors, of as many."""


@dataclass(frozen=True)
class Share:
    """What one replica computes of a call."""

    call: dict[str, Any]
    first: int
    last: int
    total: int
    """Pictures [first, last) of so many."""
    prompts: int

    @property
    def count(self) -> int:
        return self.last - self.first

    @property
    def chosen(self) -> list[int]:
        """The prompt of each picture."""
        return [index // (self.total // self.prompts) for index in range(self.first, self.last)]

    @property
    def is_idle(self) -> bool:
        return self.first == self.last


def share_of(call: dict[str, Any], degree: int, replica: int) -> Share:
    """The part of a checked call that is one replica's. Raises ConfigError for lengths that do not fit each other."""
    prompts = _num_prompts(call)
    name, each = next(((name, call[name]) for name in PER_PROMPT if call.get(name)), ("", 1))
    total = prompts * each
    first, last = head_range(total, degree, replica)
    own = {key: _rows_of(key, value, prompts, total, first, last) for key, value in call.items()}
    if name:
        own[name] = 1
    if isinstance(own.get("prompt"), str) and last - first > 1:
        own["prompt"] = [own["prompt"]] * (last - first)
        own = {key: _texts(key, value, last - first) for key, value in own.items()}
    return Share(own, first, last, total, prompts)


def _texts(name: str, value: Any, count: int) -> Any:
    """Pipelines want the negative prompts in the form of the prompts."""
    return [value] * count if "prompt" in name and isinstance(value, str) else value


def _num_prompts(call: dict[str, Any]) -> int:
    embeds = [name for name in call if "prompt_embeds" in name]
    for name in ("prompt", *embeds, "image", "batch_size"):
        value = call.get(name)
        if isinstance(value, (list, Tensor)):
            return len(cast("list[Any]", value))
        if isinstance(value, int):
            return value
        if isinstance(value, str):
            return 1
    return 1


def _rows_of(name: str, value: Any, prompts: int, total: int, first: int, last: int) -> Any:
    """The rows of one argument for pictures [first, last); what is not by picture or prompt stays as it is."""
    if not isinstance(value, (list, Tensor)) or not ("prompt" in name or name in (*PICTURES, "latents", "generator")):
        return value
    rows, each = cast("list[Any]", value), total // prompts
    chosen = [index // each for index in range(first, last)]
    if len(rows) == total and (name in ("latents", "generator") or prompts == total):
        return rows[first:last]
    if len(rows) == prompts:
        return value[chosen] if isinstance(value, Tensor) else [rows[index] for index in chosen]
    if name.endswith("cu_seqlens") and isinstance(value, Tensor) and len(rows) == prompts + 1:
        lengths = value.diff()[chosen]
        return torch.cat([value[:1] * 0, lengths.cumsum(0).to(value.dtype)])
    if len(rows) == 1 or name in PICTURES:
        return value
    raise ConfigError(f"{name}: {len(rows)} given for {prompts} prompts and {total} pictures.")


def merged(outputs: Iterable[Any]) -> Any:
    """One output from those of the replicas, in order: lists and tuples of results, arrays and tensors joined."""
    parts = list(outputs)
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        fields = [field.name for field in dataclasses.fields(first)]
        return type(first)(**{name: merged(getattr(part, name) for part in parts) for name in fields})
    if isinstance(first, tuple):
        return tuple(merged(column) for column in zip(*parts, strict=True))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else first
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    return first
