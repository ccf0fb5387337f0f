"""What Ray Serve is given: two deployments, the store and the replicas that share it."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from ray import serve

from parafuse.config import Config
from parafuse.errors import ConfigError, nearest
from parafuse.launch.ray_serve.replica import Replica, Served
from parafuse.launch.ray_serve.store_host import StoreHost
from parafuse.launch.serve import logs
from parafuse.launch.serve.command import Serve, ServeJob, plain, prepare
from parafuse.launch.serve.keeper import END_S
from parafuse.launch.serve.keys import ENVIRONMENT
from parafuse.launch.serve.settings import Serving

STORE, REPLICA = "store", "replica"
MANY = 100_000
"""Requests at once: how many are taken is the queue's to say."""
LOGGING = {"enable_access_log": False}
"""A replica writes its own, without what its clients say; the store would write many lines a second."""
HEALTH_S = 2.0
JOBS_PER_REPLICA = 2.0
"""That wait or run: one at work and one behind it."""


class Store(StoreHost):
    """The deployment of the store."""

    def __init__(self, settings: dict[str, Any]):
        logs.configure()
        super().__init__(Serving.from_dict(settings))

    async def __del__(self) -> None:
        await self.close()


def by_queue(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray's autoscaling policy: replicas by the jobs that wait and run, whoever waits for them. (number, nothing that
    it has to remember)."""
    told = (context.aggregated_metrics or {}).get("jobs", {})
    wanted = math.ceil(max(told.values(), default=0.0) / JOBS_PER_REPLICA)
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(low, min(high, wanted)), {}


def application(job: ServeJob) -> Any:
    """A checked request for a server as an application of Ray Serve's, not started. Raises ConfigError."""
    asked = job.serve
    settings = asdict(_seen_by_all(asked))
    env: dict[str, str] = {"OMP_NUM_THREADS": "1"}  # of each rank, as torchrun's
    if ENVIRONMENT in os.environ:
        env[ENVIRONMENT] = os.environ[ENVIRONMENT]
    environment = {"env_vars": env}
    model = str(Path(asked.model).resolve()) if Path(asked.model).exists() else asked.model
    served = Served(
        model=model, ranks=asked.ranks, config=job.config.to_dict(), settings=settings, verbose=asked.verbose
    )
    store: Any = serve.deployment(
        Store, name=STORE, num_replicas=1, max_ongoing_requests=MANY, logging_config=LOGGING,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
    )  # fmt: skip
    if job.device == "cuda":
        actor, bundle = {"num_cpus": 1, "num_gpus": job.num_devices}, {"CPU": 1, "GPU": job.num_devices}
    else:
        actor, bundle = {"num_cpus": asked.ranks}, {"CPU": asked.ranks}
    if asked.most_replicas > asked.replicas:
        policy = {"policy_function": "parafuse.launch.ray_serve.application:by_queue"}
        number: dict[str, Any] = {
            "autoscaling_config": {
                "min_replicas": asked.replicas, "max_replicas": asked.most_replicas, "policy": policy
            }
        }  # fmt: skip
    else:
        number = {"num_replicas": asked.replicas}
    replica: Any = serve.deployment(
        serve.ingress()(Replica),
        name=REPLICA,
        max_ongoing_requests=MANY,
        logging_config=LOGGING,
        ray_actor_options={**actor, "runtime_env": environment},
        placement_group_bundles=[{kind: float(number) for kind, number in bundle.items()}],
        placement_group_strategy="STRICT_PACK",
        graceful_shutdown_timeout_s=asked.drain_s + END_S,
        health_check_period_s=HEALTH_S,
        max_constructor_retry_count=3,
        **number,
    )
    return replica.bind(msgspec.to_builtins(served), store.bind(settings))


def from_args(args: dict[str, Any]) -> Any:
    """See `parafuse.launch.ray_serve.app`."""
    known = [name for name in Serve.__dataclass_fields__ if name not in ("ray", "ray_address")]
    for name in args:
        if name not in known:
            raise ConfigError(f"{name}: is no option of replicas{nearest(name, known) or '.'}")
    # where Ray listens is not said here: as far as we know, others can reach it
    given = {"host": "0.0.0.0", **args, "ray": True}
    config = Config.from_dict(given.pop("config")) if isinstance(given.get("config"), dict) else None
    try:
        asked = msgspec.convert(given, Serve, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error}.") from error
    return application(prepare(asked, [], {}, config))


def _seen_by_all(asked: Serve) -> Serving:
    """Its folders and files by their whole names."""
    values = asdict(plain(asked))
    for name in ("state", "keys", "loras"):
        if values[name] is not None:
            values[name] = str(Path(values[name]).resolve())
    return Serving(**values)
