"""How many ranks there are, or are asked for; and what is asked for twice."""

from __future__ import annotations

import os
from dataclasses import replace

import torch.distributed as dist

from parafuse.config import Axis, Config
from parafuse.errors import ConfigError


def refuse_ignored(config: Config, given_plan: bool) -> None:
    """Raises ConfigError for what a plan would override without a word."""
    if given_plan and replace(config, allow_pickle=False) != Config():
        raise ConfigError("config: given beside a plan, which decides all of it but allow_pickle; leave one out.")


def refuse_several(size: int) -> None:
    """Raises ConfigError where an engine alone was asked for several ranks."""
    if size > 1:
        raise ConfigError(f"alone=True: runs on one rank, but {size} were asked for; leave out one of the two.")


def launched_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def asked_size(config: Config) -> int:
    """Ranks that a config asks for in a plain process; "auto" asks for none beside the others."""
    size = 1
    for axis in Axis:
        degree = getattr(config.parallel, axis)
        size *= 1 if degree == "auto" else degree
    return size
