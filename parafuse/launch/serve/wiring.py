"""What the processes of one server are told when they start: a file of JSON in the folder that they meet in."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from parafuse.config import Config
from parafuse.launch.serve.settings import Serving

FILE = "server.json"


class Wiring(Struct, frozen=True, kw_only=True):
    """The same for the HTTP process, the supervisor and the ranks."""

    folder: str
    """Short-lived, for sockets: Unix sockets have names of at most 107 bytes. Only the server's user can enter it."""
    model: str
    ranks: int
    """On this machine."""
    config: dict[str, Any]
    settings: dict[str, Any]
    verbose: bool = False

    @classmethod
    def make(cls, folder: Path, model: str, *, ranks: int, config: Config, serving: Serving, verbose: bool) -> Wiring:
        wiring = cls(
            folder=str(folder),
            model=model,
            ranks=ranks,
            config=config.to_dict(),
            settings=asdict(serving),
            verbose=verbose,
        )
        (folder / FILE).write_bytes(msgspec.json.encode(wiring))
        return wiring

    @classmethod
    def read(cls, path: str | Path) -> Wiring:
        return msgspec.json.decode(Path(path).read_bytes(), type=cls)

    @property
    def file(self) -> Path:
        return Path(self.folder) / FILE

    @property
    def supervisor_socket(self) -> str:
        """Where the supervisor listens for HTTP processes."""
        return str(Path(self.folder) / "supervisor")

    @property
    def serving(self) -> Serving:
        return Serving.from_dict(self.settings)
