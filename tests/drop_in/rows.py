"""Runs every script on a plain pipeline and on an engine, and says how they compare."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import parafuse
from tests.drop_in import base, flux_sdxl_wan
from tests.drop_in.pipelines import BASE, BUILDERS, ON_TWO
from tests.drop_in.script import Script, Scripts

EXACT = 1e-5
SCRIPTS: dict[str, Callable[[], Scripts]] = {
    BASE: base.scripts,
    "FluxPipeline": flux_sdxl_wan.flux,
    "StableDiffusionXLPipeline": flux_sdxl_wan.sdxl,
    "WanPipeline": flux_sdxl_wan.wan,
}
WORKS, REFUSED, AS_DIFFUSERS = "works", "refused", "as diffusers"


@dataclasses.dataclass(frozen=True)
class Row:
    """One member on one number of ranks."""

    member: str
    state: str
    reason: str = ""
    fault: str = ""
    """What is wrong with it; empty where all is as it is declared."""


@dataclasses.dataclass(frozen=True)
class Raised:
    kind: str
    text: str


def rows(name: str, num_ranks: int, only: str = "") -> list[Row]:
    """Of one class, on this rank. `only`: part of the names of members."""
    scripts = {member: script for member, script in SCRIPTS[name]().items() if only in member}
    shared = None
    found: list[Row] = []
    for member, script in scripts.items():
        want = seen(script, plain(script.on or name))
        if shared is None or not script.is_read:
            if shared is not None:
                shared.close()
            shared = engine_of(script.on or name, num_ranks)
        is_mine = not script.writes or shared.rank == 0
        found.append(row(member, script, want, seen(script, shared), num_ranks) if is_mine else Row(member, WORKS))
        if not script.is_read:
            if not isinstance(want, Raised):  # what diffusers could not put on, it may not be able to take off
                shared.close()
            shared = None
    if shared is not None:
        shared.close()
    return found


@functools.cache
def _built(name: str) -> Any:
    return BUILDERS[name]()


def plain(name: str) -> Any:
    """A pipeline of its own, with the same weights every time."""
    return copy.deepcopy(_built(name))


def engine_of(name: str, num_ranks: int) -> parafuse.Engine:
    if num_ranks == 1:
        return parafuse.Engine.from_pipeline(plain(name), alone=True)
    return parafuse.Engine.from_pipeline(plain(name), parafuse.Config(parallel=ON_TWO[name]))


def seen(script: Script, x: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        # One folder for the ranks: what rank 0 writes, all may read.
        shared = [folder]
        is_shared = isinstance(x, parafuse.Engine) and x.world.size > 1 and not script.writes
        if is_shared:
            dist.broadcast_object_list(shared)
        try:
            return script.run(x, Path(shared[0]))
        except Exception as error:
            return Raised(type(error).__name__, " ".join(str(error).split()))
        finally:
            if is_shared:
                dist.barrier()  # the folder goes with rank 0


def row(member: str, script: Script, want: Any, got: Any, num_ranks: int) -> Row:
    """How what the engine gave compares with what the plain pipeline gave and with what is declared."""
    refused = script.refused.get(num_ranks)
    if refused is not None:
        ok = isinstance(got, Raised) and got.kind == "ConfigError" and re.search(refused, got.text)
        return Row(member, REFUSED, getattr(got, "text", ""), "" if ok else f"was to be refused; gave {got}")
    if isinstance(want, Raised):
        same = isinstance(got, Raised) and got.kind in (want.kind, "ConfigError")
        ok = script.raises and re.search(script.raises, want.text) and same
        return Row(member, AS_DIFFUSERS, want.text, "" if ok else f"diffusers raised {want}, the engine gave {got}")
    if script.raises or isinstance(got, Raised):
        return Row(member, WORKS, "", "diffusers was to raise" if script.raises else f"raised {got}")
    fault = differs(want, got, 0.0 if num_ranks == 1 else EXACT)
    return Row(member, WORKS, "", fault)


def differs(want: Any, got: Any, bound: float) -> str:
    """What differs by more than the bound, relative to the largest value; empty where nothing does."""
    if isinstance(want, (torch.Tensor, np.ndarray)):
        a, b = torch.as_tensor(want), torch.as_tensor(got)
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {tuple(a.shape)} became {b.dtype} {tuple(b.shape)}"
        if not a.is_floating_point():
            return "" if torch.equal(a, b) else "other values"
        error = float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1e-12)) if a.numel() else 0.0
        return "" if error <= bound else f"error {error:.2g}"
    if isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)):
        if len(want) != len(got):
            return f"{len(want)} items became {len(got)}"
        return next(filter(None, (differs(a, b, bound) for a, b in zip(want, got, strict=True))), "")
    if isinstance(want, dict) and isinstance(got, dict):
        return differs(sorted(want.items(), key=str), sorted(got.items(), key=str), bound)
    return "" if want == got else f"{want!r} became {got!r}"[:400]
