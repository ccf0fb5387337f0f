"""What `parafuse bench serve` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parafuse.errors import ConfigError
from parafuse.launch.bench.record import FOLDER

ARRIVALS = ("poisson", "bursts")


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """What load to put on which server."""

    url: str = "http://127.0.0.1:8000"
    """The server, one that runs already."""
    secrets: str | None = None
    """File with the secrets of API keys, one a line; requests come from each in turn. Not given: none are sent."""
    arrivals: str = "poisson"
    """How requests come: poisson (one by one, at random) or bursts (--burst at once, at even distances)."""
    rate: float = 1.0
    """Requests a second, on average, whatever the server makes of them."""
    burst: int = 10
    """Requests of one burst."""
    duration_s: float = 60.0
    """For how long they come."""
    patience_s: float = 600.0
    """How long after that answers are waited for."""
    size: str | None = None
    """Width and height in pixels: 512x512. Not given: the model's."""
    steps: int | None = None
    """Denoising steps. Not given: the model's."""
    n: int = 1
    """Pictures of one request."""
    deadline_s: float | None = None
    """That each request asks for; what is done later is not good."""
    cancel: float = 0.0
    """The share of requests that is cancelled half a second after they were sent, from 0 to 1."""
    mix: str | None = None
    """TOML file with a table "request" for each kind of requests, instead of --size, --steps, --n, --deadline and
    --cancel."""
    seed: int = 0
    """The same seed gives the same load."""
    out: str = FOLDER
    """Folder for the record (JSON)."""
    json: bool = False
    """As one JSON object."""

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise ConfigError(f"--arrivals {self.arrivals!r}: must be one of {', '.join(ARRIVALS)}.")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {self.url!r}: must begin with http:// or https://.")
        for name in ("rate", "duration_s", "patience_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"--{name.removesuffix('_s')} {value}: must be a positive number.")
        for name in ("burst", "steps", "n"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: must be at least 1.")
        if not 0 <= self.cancel <= 1:
            raise ConfigError(f"--cancel {self.cancel}: must be from 0 to 1.")
        if self.mix is not None:
            given = [
                name
                for name in ("size", "steps", "n", "deadline_s", "cancel")
                if getattr(self, name) != _DEFAULTS[name]
            ]
            if given:
                flag = given[0].removesuffix("_s").replace("_", "-")
                raise ConfigError(f"--{flag}: each kind of request of --mix has its own; leave it out.")


_DEFAULTS: dict[str, Any] = {"size": None, "steps": None, "n": 1, "deadline_s": None, "cancel": 0.0}
