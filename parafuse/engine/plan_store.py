"""How blocks of a class are split, kept from one process to the next: examining a block runs it dozens of times.

A plan from here is only a suggestion: it is held against the serial run before it is used, like one from other sizes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils._pytree import TreeSpec

import parafuse
from parafuse.engine.kept import cache_folder
from parafuse.parallel.block_plan import BlockPlan, Site, TokenDim
from parafuse.parallel.fingerprint import fingerprint, signature


def folder() -> Path | None:
    """Where plans are kept."""
    where = cache_folder()
    return None if where is None else where / "plans"


def key_of(block: nn.Module, leaves: list[Any], spec: TreeSpec) -> str:
    """Equal for blocks and arguments that are split alike, under the same versions of everything."""
    return key_for(fingerprint(block), str(spec), tuple(map(signature, leaves)))


def key_for(kind: str, spec: str, signatures: tuple[Any, ...]) -> str:
    """The same, for what a block and its arguments are in words: as `SequenceParallel` keeps its plans."""
    versions = (parafuse.__version__, diffusers.__version__, torch.__version__)
    return hashlib.sha256(repr((versions, kind, spec, signatures)).encode()).hexdigest()


def load_plan(key: str) -> BlockPlan | None:
    """The plan under a key; None where there is none that can be read."""
    where = folder()
    if where is None:
        return None
    try:
        values: dict[str, Any] = json.loads((where / f"{key}.json").read_text())
        return BlockPlan(
            arguments=_token_dims(values["arguments"]),
            sites=tuple(Site(_atoms(queries), _atoms(keys)) for queries, keys in values["sites"]),
            results=_token_dims(values["results"]),
            why_not_local=values["why_not_local"],
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def save_plan(key: str, name: str, plan: BlockPlan) -> None:
    """Keeps a plan; a folder that cannot be written is let be."""
    where = folder()
    if where is None:
        return
    with contextlib.suppress(OSError):
        where.mkdir(parents=True, exist_ok=True)
        write(where, key, name, plan)


def write(where: Path, key: str, name: str, plan: BlockPlan) -> None:
    """One file for a plan, whole or not at all: other ranks read it meanwhile."""
    values = {
        "block": name,
        "arguments": {str(i): (label.dim, label.atoms) for i, label in plan.arguments.items()},
        "sites": [(site.queries, site.keys) for site in plan.sites],
        "results": {str(i): (label.dim, label.atoms) for i, label in plan.results.items()},
        "why_not_local": plan.why_not_local,
    }
    part = where / f"{key}.{os.getpid()}.part"
    try:
        part.write_text(json.dumps(values))
        part.replace(where / f"{key}.json")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _token_dims(values: dict[str, Any]) -> dict[int, TokenDim]:
    return {int(i): TokenDim(int(dim), tuple(map(int, atoms))) for i, (dim, atoms) in values.items()}


def _atoms(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(map(int, values))
