"""LoRAs that requests name: loaded once, kept while they are used, the least recently used one goes first."""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parafuse.errors import ConfigError, nearest
from parafuse.launch.serve.messages import Adapter

if TYPE_CHECKING:
    from parafuse.engine.engine import Engine

SUFFIX = ".safetensors"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""Of a file without its suffix: no way into another folder."""
Agreed = Callable[[str, Callable[[], str]], list[str]]
"""(topic, what this rank does by itself) -> what every rank gave; raises on all ranks what one has raised."""


@dataclass
class _Loaded:
    known_as: str
    """peft's name for it, in which there is no point."""
    digest: str


class AdaptersKept:
    """Of one engine, the same on every rank: all see the same calls."""

    def __init__(
        self, engine: Engine, folder: Path | None, most: int, agreed: Agreed, *,
        loading: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """`loading`: called before files are read, which takes long."""
        self._loading = loading
        self._engine, self._folder, self._most, self._agreed = engine, folder, most, agreed
        self._kept: OrderedDict[str, _Loaded] = OrderedDict()
        """By name, the one used last at the end."""
        self._active: tuple[Adapter, ...] | None = ()
        """None: not known, since putting some on has failed."""
        self._number = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are loaded, the one used last at the end."""
        return tuple(self._kept)

    def digests(self, asked: Sequence[Adapter]) -> list[dict[str, str | float]]:
        """For a receipt: which adapters, by what is in their files, at which scale."""
        return [{"name": one.name, "scale": one.scale, "sha256": self._kept[one.name].digest} for one in asked]

    def use(self, asked: Sequence[Adapter]) -> None:
        """From now on exactly these are on. Collective. Raises ConfigError on all ranks for one that is unknown, broken
        or of another model; then the engine is as it was, but for adapters that had to go to make room."""
        if self._active == tuple(asked):
            for one in asked:
                self._kept.move_to_end(one.name)
            return
        names = self._check(asked)
        digests = self._read([name for name in names if name not in self._kept])
        self._make_room(names, len(digests))
        for name, digest in digests.items():
            self._load(name, digest)
        for name in names:
            self._kept.move_to_end(name)
        self._turn_on(tuple(asked))

    def _check(self, asked: Sequence[Adapter]) -> list[str]:
        names = [one.name for one in asked]
        if asked and self._folder is None:
            raise ConfigError(f"lora={names[0]!r}: this server has no folder of LoRAs (--loras).")
        if len(set(names)) < len(names):
            raise ConfigError(f"lora={', '.join(names)}: each may be named once.")
        if len(names) > self._most:
            raise ConfigError(f"lora: {len(names)} in one request; at most {self._most} (--max-loras).")
        return names

    def _read(self, names: Sequence[str]) -> dict[str, str]:
        """Digests of their files, which every rank can read, and which are the same everywhere."""
        if not names:
            return {}
        self._loading()
        said = self._agreed("adapters", lambda: json.dumps({name: self._digest(name) for name in names}))
        first: dict[str, str] = json.loads(said[0])
        for rank, word in enumerate(said):
            theirs = json.loads(word)
            other = next((name for name in names if theirs[name] != first[name]), None)
            if other is not None:
                raise ConfigError(f"lora={other!r}: the file of rank {rank}'s machine is another than rank 0's.")
        return first

    def _digest(self, name: str) -> str:
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                if not list(file.keys()):
                    raise ConfigError(f"lora={name!r}: the file is empty.")
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"lora={name!r}: the file is broken, or cannot be read.") from error

    def _path(self, name: str) -> Path:
        folder = self._folder
        there = [] if folder is None else sorted(file.stem for file in folder.glob(f"*{SUFFIX}"))
        if folder is None or not NAME.fullmatch(name) or name not in there:
            raise ConfigError(f"lora={name!r}: there is none of this name{nearest(name, there)}.")
        return folder / f"{name}{SUFFIX}"

    def _make_room(self, needed: Sequence[str], coming: int) -> None:
        going = [name for name in self._kept if name not in needed]
        for name in going[: max(0, len(self._kept) + coming - self._most)]:
            self._active = None
            self._engine.delete_adapters(self._kept.pop(name).known_as)

    def _load(self, name: str, digest: str) -> None:
        self._number += 1
        self._active, known_as = None, f"served{self._number}"
        self._engine.load_lora_weights(str(self._path(name)), adapter_name=known_as)
        self._kept[name] = _Loaded(known_as, digest)

    def _turn_on(self, asked: tuple[Adapter, ...]) -> None:
        """Puts these on; none leaves the model's own layers alone."""
        self._active = None
        if asked:
            self._engine.enable_lora()
            self._engine.set_adapters([self._kept[one.name].known_as for one in asked], [one.scale for one in asked])
        elif self._kept:
            self._engine.disable_lora()
        self._active = asked
