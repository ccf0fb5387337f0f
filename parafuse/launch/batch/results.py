"""What a batch has made: a folder for each 1000 lines, in it the outputs of each line and, written last, its result."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parafuse.errors import ConfigError
from parafuse.launch.batch.lines import Place

OF, LOCK, ALL = "batch.json", "lock", "results.jsonl"
RECEIPT = "receipt"
IN_FOLDER = 1000
SCHEMA = 1


class Results:
    """The folder of one batch, on a disk that all of its machines see. A line is done once its result is there."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def held(self, of: dict[str, Any]) -> Iterator[None]:
        """Makes the folder, and keeps others out. `of`: what makes its pictures; a folder that was begun with something
        else is refused, and so is one that another batch is writing to. Raises ConfigError."""
        told = json.dumps({"schema": SCHEMA, **of}, indent=1, sort_keys=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK).open("a+")
        except OSError as error:
            raise ConfigError(f"--out {str(self.folder)!r}: cannot be written ({error.strerror}).") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"--out {str(self.folder)!r}: another batch is writing to it.") from error
            file = self.folder / OF
            if file.exists() and file.read_text() != told:
                raise ConfigError(
                    f"--out {str(self.folder)!r}: was begun with another model or configuration ({OF} says which): "
                    "use that, or choose another folder."
                )
            _write(file, told.encode())
            yield

    def done(self) -> set[str]:
        """Stems of the lines that are done."""
        found: set[str] = set()
        for folder in self.folder.glob("[0-9]*"):
            with os.scandir(folder) as files:
                found |= {file.name.removesuffix(".json") for file in files if file.name.endswith(".json")}
        return found

    def is_done(self, place: Place) -> bool:
        return self._result(place).exists()

    def write(self, place: Place, outputs: Sequence[tuple[str, bytes]], result: dict[str, Any]) -> None:
        """Outputs as (suffix, bytes), then the result, which names them: whole or not at all. Raises OSError."""
        names = [f"{place.stem}-{index}{suffix}" for index, (suffix, _) in enumerate(outputs)]
        file = self._result(place)
        file.parent.mkdir(exist_ok=True)
        for name, (_, data) in zip(names, outputs, strict=True):
            _write(file.with_name(name), data)
        files = [f"{file.parent.name}/{name}" for name in names]
        _write(file, json.dumps({"line": place.number, **result, "files": files}).encode())

    def gather(self, wanted: Iterator[Place]) -> int:
        """Writes results.jsonl: the results of these lines, in their order, without receipts. How many there were."""
        part, number = self.folder / f"{ALL}.part", 0
        with part.open("wb") as out:
            for place in wanted:
                if self.is_done(place):
                    result = json.loads(self._result(place).read_bytes())
                    out.write(
                        json.dumps({name: one for name, one in result.items() if name != RECEIPT}).encode() + b"\n"
                    )
                    number += 1
        part.replace(self.folder / ALL)
        return number

    def _result(self, place: Place) -> Path:
        return self.folder / f"{place.number // IN_FOLDER:06d}" / f"{place.stem}.json"


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all, also where two write the same at once."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(file)
