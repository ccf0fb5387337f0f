"""Ray Serve around the server: replicas, each a group of ranks, on the machines of a cluster; one store behind them.

Routing, autoscaling, health checks and rollout are Ray's. `app` builds the application for `serve run` and for Serve's
configuration files; `parafuse serve --ray` does the same from its options."""

from __future__ import annotations

from typing import Any


def app(args: dict[str, Any]) -> Any:
    """`serve run parafuse.launch.ray_serve:app model=emoji ranks=2`: a Ray Serve application. `args`: the options of
    `parafuse serve` by their names in Python, `config` also as a dictionary. Raises ConfigError."""
    from parafuse.launch.ray_serve.application import from_args

    return from_args(args)
