"""What Ray is asked for, and what is refused before it is."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parafuse.config import Config
from parafuse.errors import ConfigError
from parafuse.launch import ray_serve
from parafuse.launch.ray_serve.application import REPLICA, STORE, application, by_queue
from parafuse.launch.serve import command
from parafuse.launch.serve.command import Serve, ServeJob


def deployments(app: Any) -> dict[str, Any]:
    replica = app._bound_deployment
    store = replica.init_args[1]._bound_deployment
    return {REPLICA: replica, STORE: store}


@pytest.mark.parametrize(
    ("device", "actor", "bundle"),
    [
        ("cuda", {"num_cpus": 1, "num_gpus": 6}, {"CPU": 1, "GPU": 6}),
        ("cpu", {"num_cpus": 3}, {"CPU": 3}),
    ],
)
def test_a_replica_is_one_group_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, actor: dict[str, int], bundle: dict[str, int]
) -> None:
    monkeypatch.setenv("PARAFUSE_API_KEYS", "{}")
    asked = Serve(ray=True, ranks=3, replicas=2, state=str(tmp_path / "state"), drain_s=7.0)
    job = ServeJob(serve=asked, config=Config(), device=device, num_devices=6 if device == "cuda" else 3)
    found = deployments(application(job))
    replica, store = found[REPLICA], found[STORE]
    options = replica.ray_actor_options
    assert {name: options[name] for name in actor} == actor
    assert options["runtime_env"]["env_vars"]["PARAFUSE_API_KEYS"] == "{}"
    config = replica._replica_config
    assert (config.placement_group_bundles, config.placement_group_strategy) == ([bundle], "STRICT_PACK")
    assert (replica.num_replicas, store.num_replicas, store.ray_actor_options["num_cpus"]) == (2, 1, 0)
    assert replica._deployment_config.graceful_shutdown_timeout_s > 7.0
    assert replica.init_args[0]["settings"]["state"] == str(tmp_path / "state")


def test_replicas_follow_the_jobs() -> None:
    asked = Serve(ray=True, replicas=2, max_replicas=5)
    job = ServeJob(serve=asked, config=Config(), device="cpu", num_devices=1)
    scaling = deployments(application(job))[REPLICA]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.policy.policy_function == by_queue or "by_queue" in str(scaling.policy.policy_function)

    def wanted(jobs: dict[str, float]) -> int:
        context = SimpleNamespace(
            aggregated_metrics={"jobs": jobs}, capacity_adjusted_min_replicas=2, capacity_adjusted_max_replicas=5
        )
        return by_queue(context)[0]

    assert [wanted({"a": jobs, "b": 0.0}) for jobs in (0.0, 4.0, 5.0, 8.0, 100.0)] == [2, 2, 3, 4, 5]
    assert wanted({}) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"replicas": 2}, "--replicas 2: is for --ray"),
        ({"max_replicas": 2}, "--max-replicas 2: is for --ray"),
        ({"ray_address": "auto"}, "--ray-address auto: is for --ray"),
        ({"ray": True, "replicas": 3, "max_replicas": 2}, "--max-replicas 2: is less than --replicas 3"),
        ({"ray": True, "replicas": 0}, "--replicas 0: must be at least 1"),
        ({"ray": True, "nnodes": 2, "rdzv_endpoint": "a:1"}, "--nnodes 2: not with --ray"),
        ({"ray": True, "port": 0}, "--port 0: with --ray"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Serve(**given)


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "NEEDED_OF_RAY", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"needs no_such_package; pip install 'parafuse\[ray\]'"):
        command.check_packages(ray=True)
    command.check_packages()


def test_the_builder_takes_options_as_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARAFUSE_API_KEYS", raising=False)
    args = {"model": "emoji", "ranks": "1", "replicas": "2", "state": str(tmp_path), "host": "127.0.0.1"}
    app = ray_serve.app({**args, "config": {"dtype": "float32"}})
    replica = deployments(app)[REPLICA]
    assert replica.num_replicas == 2
    assert replica.init_args[0]["config"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"rank": "2"}, "rank: is no option of replicas"),
        ({"ranks": "two", "host": "127.0.0.1"}, "Expected `int`, got `str` - at `\\$.ranks`"),
        ({}, "others can reach it, and there are no keys"),
        ({"host": "127.0.0.1", "config": {"no_such": 1}}, "no_such"),
        ({"host": "127.0.0.1", "ranks": "0"}, "--ranks 0: must be at least 1"),
    ],
)
def test_the_builder_refuses(monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], said: str) -> None:
    monkeypatch.delenv("PARAFUSE_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=said):
        ray_serve.app(args)


def test_a_cluster_without_room_and_a_port_that_is_taken(tmp_path: Path) -> None:
    """Said at once, and nothing is left running."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, said in (
            (["--replicas", "999"], "--replicas 999: the cluster has CPUs for "),
            ([], f"--port {port}: cannot be listened at"),
        ):
            command_line = [
                sys.executable,
                "-m",
                "parafuse",
                "serve",
                "--ray",
                "--port",
                port,
                "--state",
                str(tmp_path),
            ]
            ended = subprocess.run([*command_line, *options], capture_output=True, text=True, timeout=120, check=False)
            assert ended.returncode == 2
            assert said in ended.stderr.splitlines()[-1]
            assert "Traceback" not in ended.stderr
