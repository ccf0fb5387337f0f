"""What a server is asked for: the options of `parafuse serve` beside the model, its ranks and their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from parafuse.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Where it listens, what it keeps, what it allows."""

    host: str = "127.0.0.1"
    """Address to listen at. Other than the loopback address only with keys."""
    port: int = 8000
    """Port to listen at."""
    state: str = "parafuse-server"
    """Folder for jobs, inputs and results. One server uses it at a time; it outlives the server."""
    keys: str | None = None
    """File with hashed API keys (`parafuse serve-key` writes lines for it). Not given: PARAFUSE_API_KEYS, or none."""
    keep_hours: float = 24.0
    """How long results are kept."""
    keep_gigabytes: float = 10.0
    """How much of results is kept; the oldest go first."""
    max_queued: int = 1000
    """Jobs that wait at most; more are refused with 429."""
    max_queued_of_key: int = 200
    """Jobs of one key that wait at most."""
    max_body_megabytes: float = 32.0
    """Of one HTTP request."""
    max_prompt_characters: int = 4000
    """Of one prompt."""
    max_pixels: int = 4_194_304
    """Width times height of a picture, asked for or sent."""
    max_steps: int = 200
    """Denoising steps of one request."""
    max_outputs: int = 10
    """Pictures of one request."""
    max_frames: int = 512
    """Frames of a video."""
    deadline_s: float | None = None
    """Seconds after which a job is given up, where its request names none."""
    batch: int = 4
    """Compatible requests in one call at most, where a gain is predicted; 1: never several."""
    served_model_name: tuple[str, ...] = ()
    """What requests may call the model, instead of its own name; clients are told the first. May be repeated."""
    loras: str | None = None
    """Folder of LoRA files that requests may name."""
    max_loras: int = 4
    """LoRAs that stay loaded."""
    webhook_hosts: tuple[str, ...] = ()
    """Hosts that webhooks may go to; none: no webhooks. May be repeated."""
    image_hosts: tuple[str, ...] = ()
    """Hosts that pictures may be fetched from; none: pictures are sent in the request. May be repeated."""
    probe_s: float = 60.0
    """Idle seconds after which a real step shows that the ranks still work."""
    drain_s: float = 120.0
    """How long a server that is told to end lets the running job take."""
    nnodes: int = 1
    """Machines; each runs the same command."""
    rdzv_endpoint: str | None = None
    """HOST:PORT of torchrun's rendezvous, on the machine that takes requests."""
    lend: bool = False
    """Of several machines: this one takes no requests, and lends its ranks to the one that does."""

    def __post_init__(self) -> None:
        for name in ("port", "max_queued", "max_queued_of_key", "max_prompt_characters", "max_pixels", "max_steps",
                     "max_outputs", "max_frames", "batch", "max_loras", "nnodes"):  # fmt: skip
            low = 0 if name == "port" else 1
            if getattr(self, name) < low:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {low}.")
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, float) and not 0 < value < float("inf"):
                flag = one.name.removesuffix("_s").replace("_", "-")
                raise ConfigError(f"--{flag} {value}: must be a positive number.")
        for name in self.served_model_name:
            if not 0 < len(name) <= 200 or not name.isprintable():
                raise ConfigError(f"--served-model-name {name!r}: must be a name of 1 to 200 printable characters.")
        if self.port > 65535:
            raise ConfigError(f"--port {self.port}: must be at most 65535.")
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise ConfigError(f"--nnodes {self.nnodes}: give --rdzv-endpoint HOST:PORT too, the same on each machine.")
        if self.lend and self.nnodes == 1:
            raise ConfigError("--lend: needs --nnodes; one machine takes requests, and with one it is this.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Serving:
        """Of what `dataclasses.asdict` made, also by way of JSON, which has no tuples."""
        lists: dict[str, Any] = {name: tuple(one) for name, one in values.items() if isinstance(one, list)}
        return cls(**{**values, **lists})

    @property
    def is_local(self) -> bool:
        return self.host in LOOPBACK

    @property
    def database(self) -> Path:
        return Path(self.state) / "jobs.sqlite"

    @property
    def inputs(self) -> Path:
        """Pictures that requests have brought."""
        return Path(self.state) / "inputs"

    @property
    def results(self) -> Path:
        """A folder for each attempt of a call."""
        return Path(self.state) / "results"
