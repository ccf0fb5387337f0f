"""`parafuse serve --ray`: gives the application to Ray Serve, and takes it back at its end."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import FrameType
from typing import Any

from parafuse.errors import ConfigError, ParafuseError
from parafuse.launch.cluster import room_for, start_ray
from parafuse.launch.serve.command import ServeJob, listening
from parafuse.launch.serve.keeper import END_S

NAME = "parafuse"
ANSWER_S = 5.0


def run(job: ServeJob) -> int:
    """Until SIGTERM or SIGINT: its exit code. Raises ConfigError where the cluster has no room, or nobody can listen;
    ParafuseError where the replicas cannot be started."""
    asked = job.serve
    is_ours = start_ray(asked.ray_address, verbose=asked.verbose)
    import ray

    try:
        room_for(job.device, job.num_devices, replicas=asked.replicas, ranks=asked.ranks)
        if is_ours:
            with listening(asked):
                pass  # Ray's own words for a port that is taken are long
        return _serve(job, is_ours)
    finally:
        ray.shutdown()


def _serve(job: ServeJob, is_ours: bool) -> int:
    from ray import serve

    from parafuse.launch.ray_serve.application import STORE, application

    asked = job.serve
    end = threading.Event()
    asked_by: list[int] = []
    starting, is_mine = True, False

    def ask(number: int, _frame: FrameType | None) -> None:
        asked_by.append(number)
        if starting:
            raise KeyboardInterrupt
        end.set()

    before: dict[int, Any] = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": asked.host, "port": asked.port})
        if NAME in serve.status().applications:
            raise ConfigError(
                f"--ray-address {asked.ray_address!r}: an application {NAME} runs there already; end that one first "
                f"(serve delete {NAME}), or change it with serve deploy."
            )
        is_mine = True
        try:
            serve.run(application(job), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise ParafuseError(f"serve: no replica can start: {_why(error)}") from error
        starting = False
        host = f"[{asked.host}]" if ":" in asked.host else asked.host
        print(f"parafuse: http://{host}:{asked.port}", flush=True)
        end.wait()
        store = serve.get_deployment_handle(STORE, NAME)  # while it can be reached: Ray ends all at once
        store.drain.remote(asked.drain_s + END_S).result()
        return _code(asked_by)
    except KeyboardInterrupt:
        return _code(asked_by)
    finally:
        if is_mine:
            _delete(is_ours)
        for number, handler in before.items():
            signal.signal(number, handler)


def _delete(is_ours: bool) -> None:
    """Takes the application away; Ray waits a minute for a replica that is still starting, and goes on by itself."""
    from ray import serve

    try:
        serve.delete(NAME)
        if is_ours:
            serve.shutdown()
    except TimeoutError:
        print(f"parafuse: a replica was still starting; Ray ends {NAME} by itself.", file=sys.stderr)


def _code(asked_by: list[int]) -> int:
    return 0 if asked_by[:1] == [signal.SIGTERM] else 130


def _why(error: Exception) -> str:
    """In one line: what a replica has said, else what Ray says."""
    from ray import serve

    from parafuse.launch.ray_serve.application import STORE

    with contextlib.suppress(Exception):  # the store may be what cannot start
        told = serve.get_deployment_handle(STORE, NAME).complaint.remote().result(timeout_s=ANSWER_S)
        if told:
            return " ".join(told.split())
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else "Ray does not say why; --verbose shows the replicas' logs."
