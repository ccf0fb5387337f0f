"""How many ranks there are, or are asked for; and what is asked for twice."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from parafuse.config import Axis, Config
from parafuse.engine.plan import Plan
from parafuse.errors import ConfigError


def refuse_ignored(config: Config, given_plan: bool, expect: Any = None) -> None:
    """Raises ConfigError for what a plan or named degrees would override without a word."""
    if expect is not None and (given_plan or not config.parallel.is_chosen):
        named = "a plan" if given_plan else "degrees"
        raise ConfigError(f"expect: says by which calls a layout is chosen, but {named} settle it; leave one out.")
    if given_plan and replace(config, allow_pickle=False) != Config():
        raise ConfigError("config: given beside a plan, which decides all of it but allow_pickle; leave one out.")


def refuse_several(size: int) -> None:
    """Raises ConfigError where an engine alone was asked for several ranks."""
    if size > 1:
        raise ConfigError(f"alone=True: runs on one rank, but {size} were asked for; leave out one of the two.")


def launched_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def number_of_ranks(config: Config, plan: Plan | None, ranks: int | None, *, ours: bool) -> int:
    """How many an engine has: those of the launcher, or, where it starts its own (`ours`), as many as are asked for.

    Raises ConfigError for a number that is none, or another one than the launcher's or the plan's."""
    if ranks is not None and (not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1):
        raise ConfigError(f"ranks={ranks!r}: must be a whole number of at least 1.")
    there = plan.world_size if plan is not None else None
    if not ours:
        there = launched_size()
    if ranks is not None and there is not None and ranks != there:
        who = "the plan is for" if ours else "the launcher started"
        raise ConfigError(f"ranks={ranks}: {who} {there}; leave ranks out, or say {there}.")
    return there or ranks or asked_size(config)


def asked_size(config: Config) -> int:
    """Ranks that a config asks for in a plain process; "auto" asks for none beside the others."""
    size = 1
    for axis in Axis:
        degree = getattr(config.parallel, axis)
        size *= 1 if degree == "auto" else degree
    return size
