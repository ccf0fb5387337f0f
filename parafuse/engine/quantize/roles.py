"""Which linear layers of repeated blocks see one row for each sample instead of tokens: modulation, time embeddings.

They are no work and decide much, so they are never quantized. Measured: `python -m tests.quantize.roles` runs every
transformer class of diffusers and writes roles.json. For a class that is not there, told by what holds the layer.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from torch import nn

FILE = Path(__file__).with_name("roles.json")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@cache
def measured() -> dict[str, list[str]]:
    """Class -> full names of such layers, * for a number; a class without any has an empty list."""
    return json.loads(FILE.read_text())


def pattern_of(name: str) -> str:
    """`transformer_blocks.3.attn.to_q` -> `transformer_blocks.*.attn.to_q`."""
    return _NUMBER.sub("*", name)


def is_measured(model: nn.Module) -> bool:
    return type(model).__name__ in measured()


def sees_samples(model: nn.Module, name: str, holder: nn.Module) -> bool:
    """Whether the layer of that full name, which `holder` holds, sees one row for each sample."""
    known = measured().get(type(model).__name__)
    if known is not None:
        return pattern_of(name) in known
    if isinstance(holder, nn.Sequential):
        first = next(iter(holder))
        return isinstance(first, nn.SiLU) or len(holder) == 1
    return type(holder).__module__ in ("diffusers.models.normalization", "diffusers.models.embeddings")
