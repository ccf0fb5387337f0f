"""One cell of the table of autoencoders: a method of a class, in a form, on some ranks, for some input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parafuse.engine.vae.choice import make_spread
from parafuse.errors import ConfigError, UnsupportedError
from tests.vae import case as zoo
from tests.vae.case import Case
from tests.vae.zoo import CASES

METHODS = ("decode", "encode")
FORMS = ("tiled", "sharded")
RANKS = (2, 3, 4)
INPUTS: dict[str, dict[str, Any]] = {
    "even": {"batch": 1, "odd": False},
    "odd": {"batch": 1, "odd": True},
    "batch 2": {"batch": 2, "odd": True},
}
EXACT = 1e-4
"""Largest difference over the largest value that counts as exact."""
BITWISE = "bitwise"
Cell = tuple[str, str, str, str]
"""Case, method, form, input."""


def cells(names: Iterable[str] = (), inputs: Iterable[str] = INPUTS) -> list[Cell]:
    wanted = list(names)
    return [
        (case.name, method, form, given)
        for case in CASES
        if not wanted or case.name in wanted
        for method in METHODS
        for form in FORMS
        for given in inputs
    ]


def measured(asked: list[Cell]) -> list[str]:
    """What each cell gives, on this rank. Every rank of the default group calls it."""
    found: list[str] = []
    by_name = {case.name: case for case in CASES}
    modules: dict[str, Any] = {}
    for name, method, form, given in asked:
        case = by_name[name]
        if case.unbuilt:
            found.append(f"none: {case.unbuilt}")
            continue
        if name not in modules:
            modules = {name: zoo.build(case)}
        found.append(_cell(case, modules[name], method, form, INPUTS[given]))
    return found


def _cell(case: Case, module: Any, method: str, form: str, given: dict[str, Any]) -> str:
    if not (case.latents if method == "decode" else case.picture):
        return f"none: the class has no `{method}`"
    if form == "sharded" and find_spec("parafuse.engine.vae.sharded") is None:
        return "none: this form is not built"
    make, call = (zoo.latents, zoo.decode) if method == "decode" else (zoo.picture, zoo.encode)
    x = make(case, **given)
    if form == "tiled" and case.tiles is not None:
        zoo.tile(case, module)
    try:
        try:
            want = call(case, module, x)
        except (RuntimeError, ValueError, TypeError) as error:
            return f"none: diffusers itself fails ({_short(error)})"
        return _held(case, module, form, lambda: call(case, module, x), want)
    finally:
        if case.tiles is not None:
            module.use_tiling = case.always_tiled


def _held(case: Case, module: Any, form: str, run: Callable[[], Tensor], want: Tensor) -> str:
    try:
        one = make_spread(form, "vae", module, dist.group.WORLD)
        if one is None:
            return "wrong: nothing is put on"
        one.install()
        try:
            got = run()
        finally:
            one.remove()
    except (ConfigError, UnsupportedError) as error:
        return f"refused: {_short(error)}"
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        return f"wrong: {type(error).__name__}: {_short(error)}"
    undone = run()
    if not torch.equal(undone, want):
        return "wrong: differs after remove()"
    return compared(got, want)


def compared(got: Tensor, want: Tensor) -> str:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"wrong: {tuple(got.shape)} instead of {tuple(want.shape)}"
    if torch.equal(got, want):
        return BITWISE
    worst = float((got - want).abs().max() / want.abs().max())
    return f"exact {worst:.1e}" if worst <= EXACT else f"wrong: {worst:.1e} of the largest value"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


ORDER = (BITWISE, "exact", "refused", "none", "wrong")
"""From the best to the worst."""


def rank_of(text: str) -> int:
    return next(i for i, word in enumerate(ORDER) if text.startswith(word))


def worst_of(texts: Iterable[str]) -> str:
    """Of several ranks or inputs: the worst, with the largest difference."""
    return max(texts, key=lambda text: (rank_of(text), float(text.split()[1]) if text.startswith("exact") else 0.0))
