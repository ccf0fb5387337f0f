"""`parafuse serve`: checks everything that can be checked, then keeps the server's processes running."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parafuse.config import Config
from parafuse.errors import ConfigError
from parafuse.launch.cluster import missing
from parafuse.launch.options import Option, build, given
from parafuse.launch.serve.settings import Serving

LOCK = "lock"
HTTP_PATIENCE_S = 10.0
SUPERVISOR_PATIENCE_S = 15.0
START_S = 120.0
"""For a process to import what it needs, on a machine that is busy."""


@dataclass(frozen=True, kw_only=True)
class Serve(Serving):
    """What is served: the options of `serve` beside the configuration."""

    model: str = "emoji"
    """The built-in emoji, a diffusers folder, a single-file checkpoint, a hub id, or an architecture without weights:
    random:flux.1-dev, or tiny:flux.1-dev for a CPU."""
    ranks: int = 1
    """Processes on this machine, one for each GPU."""
    ray: bool = False
    """On Ray Serve: replicas, each with ranks of its own, on the machines of a cluster. --state is a folder that all of
    them see."""
    replicas: int = 1
    """With --ray: replicas at first, and at least."""
    max_replicas: int | None = None
    """With --ray: Ray starts up to so many, by the jobs that wait. Not given: as many as --replicas."""
    ray_address: str | None = None
    """With --ray: of a cluster, HOST:PORT or auto. Not given: RAY_ADDRESS, or Ray on this machine alone."""
    config: str | None = None
    """JSON file with a configuration; options given beside it win."""
    verbose: bool = False
    """Show the warnings and logs of the libraries underneath."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks < 1:
            raise ConfigError(f"--ranks {self.ranks}: must be at least 1.")
        if self.replicas < 1:
            raise ConfigError(f"--replicas {self.replicas}: must be at least 1.")
        if self.most_replicas < self.replicas:
            raise ConfigError(f"--max-replicas {self.max_replicas}: is less than --replicas {self.replicas}.")
        if not self.ray:
            for name, default in (("replicas", 1), ("max_replicas", None), ("ray_address", None)):
                if getattr(self, name) != default:
                    flag = name.replace("_", "-")
                    raise ConfigError(f"--{flag} {getattr(self, name)}: is for --ray; give that too, or leave it out.")
        elif self.nnodes > 1:
            raise ConfigError(
                f"--nnodes {self.nnodes}: not with --ray, whose replicas have their ranks on one machine."
            )
        elif not self.port:
            raise ConfigError("--port 0: with --ray the port has a number; choose one.")

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """A checked request for a server."""

    serve: Serve
    config: Config
    device: str
    num_devices: int
    """Of all ranks of one machine."""


def prepare(serve: Serve, options: list[Option], typed: dict[str, Any], config: Config | None = None) -> ServeJob:
    """Checks the request, torch-free and without loading weights. `config`: instead of a file of one. Raises
    ConfigError at the first fault."""
    check_packages(ray=serve.ray)
    from parafuse.engine.planner import resolve
    from parafuse.launch.serve.card import card_of
    from parafuse.launch.serve.keys import Keys, check_exposed

    if "RANK" in os.environ:
        raise ConfigError("serve: starts its ranks itself; start it without torchrun, once on each machine.")
    config = build(config or (Config.from_file(serve.config) if serve.config else Config()), given(options, typed))
    world_size = serve.ranks * serve.nnodes
    config.parallel.degrees(world_size)
    card = card_of(serve.model, allow_pickle=config.allow_pickle)
    plan = resolve(config, card.source, world_size)
    check_exposed(serve, Keys.load(Path(serve.keys) if serve.keys else None, os.environ))
    if serve.loras is not None and not Path(serve.loras).is_dir():
        raise ConfigError(f"--loras {serve.loras!r}: is no folder.")
    num_devices = serve.ranks * plan.devices_per_rank
    return ServeJob(serve=serve, config=config, device=plan.device, num_devices=num_devices)


NEEDED = ("fastapi", "uvicorn", "msgspec", "structlog", "prometheus_client", "httpx2", "standardwebhooks")
NEEDED_OF_RAY = ("ray", "aiohttp", "grpc", "opencensus")
"""Of ray[serve]."""


def check_packages(*, ray: bool = False) -> None:
    """Raises ConfigError where what a server needs is not installed."""
    extra = "ray" if ray else "serve"
    if not_there := missing((*NEEDED, *NEEDED_OF_RAY) if ray else NEEDED):
        raise ConfigError(f"serve: needs {', '.join(not_there)}; pip install 'parafuse[{extra}]'.")


def run(job: ServeJob) -> int:
    """Keeps the server running until it is told to end; its exit code."""
    if job.serve.ray:
        from parafuse.launch.ray_serve.command import run as run_on_ray

        return run_on_ray(job)
    from parafuse.launch.serve import logs
    from parafuse.launch.serve.keeper import Child, Keeper, python
    from parafuse.launch.serve.wiring import Wiring

    serve = job.serve
    logs.configure()
    with state_of(serve), tempfile.TemporaryDirectory(prefix="parafuse-") as folder, listening(serve) as door:
        wiring = Wiring.make(
            Path(folder), serve.model, ranks=serve.ranks, config=job.config, serving=plain(serve), verbose=serve.verbose
        )
        supervisor = Child(
            name="supervisor",
            argv=lambda beat: python("parafuse.launch.serve.supervisor", str(wiring.file), str(beat)),
            patience_s=SUPERVISOR_PATIENCE_S,
            start_s=START_S,
        )
        children = [supervisor]
        if door is not None:
            number = door.fileno()
            http = Child(
                name="http",
                argv=lambda beat: python(
                    "parafuse.launch.serve.http.process", str(wiring.file), str(beat), str(number)
                ),
                patience_s=HTTP_PATIENCE_S,
                start_s=START_S,
                keeps=(number,),
            )
            children.append(http)
            host = f"[{serve.host}]" if ":" in serve.host else serve.host
            print(f"parafuse: http://{host}:{door.getsockname()[1]} (/health/ready says when)", flush=True)
        return Keeper(children, drain_s=serve.drain_s).run()


def plain(serve: Serve) -> Serving:
    """Without what is the command's alone."""
    names = Serving.__dataclass_fields__
    return Serving(**{name: getattr(serve, name) for name in names})


@contextmanager
def state_of(serve: Serving) -> Iterator[None]:
    """Makes the folder of a server's state, and holds it. Raises ConfigError where another server has it, or it cannot
    be written."""
    folder = Path(serve.state)
    try:
        for one in (folder, serve.inputs, serve.results):
            one.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        why = "is no folder" if folder.exists() and not folder.is_dir() else f"cannot be written ({error.strerror})"
        raise ConfigError(f"--state {serve.state!r}: {why}; choose another.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"--state {serve.state!r}: another server uses it; end that one, or choose another folder."
            ) from error
        yield


@contextmanager
def listening(serve: Serving) -> Iterator[socket.socket | None]:
    """The socket that requests come to; None on a machine that lends its ranks. Raises ConfigError."""
    from parafuse.launch.serve.keeper import listen

    if serve.lend:
        yield None
        return
    try:
        door = listen(serve.host, serve.port)
    except OSError as error:
        raise ConfigError(
            f"--host {serve.host!r} --port {serve.port}: cannot be listened at ({error.strerror}); choose another."
        ) from error
    with door:
        yield door
