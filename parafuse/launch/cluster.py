"""Ray: started or joined by a command, and asked whether it has room. Nothing here imports it before it is needed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

from parafuse.errors import ConfigError


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def start_ray(address: str | None, *, verbose: bool) -> bool:
    """Joins the cluster at `address` (None: that of RAY_ADDRESS), else starts Ray on this machine, which ends with this
    process; whether it did. Ray of this process alone: it sends no usage statistics, and keeps its logs in its own
    folder. Raises ConfigError."""
    import logging

    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(
            address=address, include_dashboard=False if address == "local" else None, log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--ray-address {address!r}: no cluster answers there ({why}).") from error
    return address == "local"


def room_for(device: str, each: int, *, replicas: int, ranks: int) -> dict[str, float]:
    """What an actor with `each` devices takes of a machine, as Ray's options. Raises ConfigError where the cluster has
    no room for `replicas` of them: Ray would wait for ever."""
    import ray

    kind, option = ("GPU", "num_gpus") if device == "cuda" else ("CPU", "num_cpus")
    machines = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
    if max(machines, default=0) < each:
        raise ConfigError(
            f"--ranks {ranks}: a replica needs {each} {kind}s of one machine, and the largest has "
            f"{max(machines, default=0)}; give fewer ranks."
        )
    places = sum(there // each for there in machines)
    if places < replicas:
        raise ConfigError(
            f"--replicas {replicas}: the cluster has {kind}s for {places} of {each}; give fewer, or add machines."
        )
    return {option: each}
