"""What was measured of one model, for the caches that need it: torch-free. `parafuse calibrate` writes such a file."""

# Files are written by hand too, so types are checked at run time.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from parafuse.errors import ConfigError, reject_unknown

SCHEMA = 1
FEWEST_STEPS = 5
"""Of a run that tells something: the first ones have nothing to be held against."""
MEASURED = "measured"
"""In a denoiser's part of a file: what the curves were made of, for people. It is not read."""
ANEW = "Write it with parafuse calibrate."


@dataclass(frozen=True)
class Curves:
    """Of one denoiser."""

    architecture: str
    """Its class, and a fingerprint of its configuration."""
    polynomial: tuple[float, ...]
    """From the change of the first block's modulated input to that of the stack's residual; the constant first."""
    between: tuple[float, float]
    """The least and the largest change that the polynomial was fitted to."""
    ratios: tuple[tuple[float, ...], ...]
    """Branch of guidance, in the order of a step's calls -> by step: the size of the stack's residual over that of the
    step before."""


@dataclass(frozen=True)
class Calibration:
    """Of one model, at one number of steps."""

    model: str
    """Its name, folder or hub id, as it was given."""
    model_id: str
    """Fingerprint of the model's configuration files."""
    steps: int
    """Of each request."""
    prompts: int
    """How many were painted."""
    versions: Mapping[str, str]
    """Of parafuse and the libraries that painted them."""
    denoisers: Mapping[str, Curves]
    """By component."""
    file: str = field(default="", compare=False)
    """Where it was read from."""

    def __str__(self) -> str:
        return self.file or "measured"

    def check(self, *, model: str, model_id: str) -> None:
        """Raises ConfigError for another architecture."""
        if self.model_id != model_id:
            raise ConfigError(
                f"calibration={self.file!r}: was measured on {self.model!r} (model_id {self.model_id!r}), not on "
                f"{model!r} ({model_id!r}), which is built otherwise. Measure it: parafuse calibrate --model {model}."
            )

    def curves(self, name: str, architecture: str) -> Curves:
        """Of a component; without one of that name, of one that is built alike. Raises ConfigError without that."""
        alike = {one: curves for one, curves in self.denoisers.items() if curves.architecture == architecture}
        if not alike:
            known = ", ".join(f"{one} ({curves.architecture})" for one, curves in self.denoisers.items())
            raise ConfigError(
                f"calibration={self.file!r}: was measured on {self.model!r} with {known}; {name} ({architecture}) is "
                "built otherwise. Measure it with parafuse calibrate."
            )
        return alike.get(name) or next(iter(alike.values()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, but for what it was read from."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "file"}
        values["versions"] = dict(self.versions)
        values["denoisers"] = {
            name: dataclasses.asdict(one) | {"ratios": [list(x) for x in one.ratios]}
            | {"polynomial": list(one.polynomial), "between": list(one.between)}
            for name, one in self.denoisers.items()
        }  # fmt: skip
        return {"schema": SCHEMA} | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], file: str = "") -> Calibration:
        """Raises ConfigError for the first value that no calibration has."""
        where = f"calibration={file!r}"
        names = [f.name for f in dataclasses.fields(cls) if f.name != "file"]
        reject_unknown(where, values, ["schema", *names])
        if values.get("schema") != SCHEMA:
            raise ConfigError(f"{where}: schema {values.get('schema')!r}; this version reads {SCHEMA}. {ANEW}")
        kinds = {"model": str, "model_id": str, "steps": int, "prompts": int, "versions": dict, "denoisers": dict}
        for name in names:
            if not isinstance(values.get(name), kinds[name]):
                raise ConfigError(f"{where}: {name} is {values.get(name)!r}, which it cannot be. {ANEW}")
        if not values["denoisers"] or values["steps"] < 1:
            raise ConfigError(f"{where}: has no denoiser, or no steps. {ANEW}")
        denoisers = {
            name: _curves(f"{where}: denoisers.{name}", one, values["steps"])
            for name, one in cast("dict[str, Any]", values["denoisers"]).items()
        }
        given: dict[str, Any] = {name: values[name] for name in names}
        given |= {"denoisers": denoisers, "file": file}
        return cls(**given)

    @classmethod
    def read(cls, file: str) -> Calibration:
        """Raises ConfigError for what is no calibration."""
        where = f"calibration={file!r}"
        if not Path(file).is_file():
            raise ConfigError(f"{where}: does not exist, or is no file. {ANEW}")
        try:
            values = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: cannot be read as JSON ({error}). {ANEW}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: must hold one JSON object. {ANEW}")
        return cls.from_dict(cast("dict[str, Any]", values), file)

    def write(self, file: str, measured: Mapping[str, Any]) -> None:
        """`measured`: by component, what the curves were made of."""
        values = self.to_dict()
        for name, one in measured.items():
            values["denoisers"][name][MEASURED] = one
        Path(file).write_text(json.dumps(values, indent=1) + "\n")


def _curves(where: str, values: Any, steps: int) -> Curves:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a JSON object. {ANEW}")
    given = cast("dict[str, Any]", values)
    names = [f.name for f in dataclasses.fields(Curves)]
    reject_unknown(where, given, [*names, MEASURED])
    if not isinstance(given.get("architecture"), str):
        raise ConfigError(f"{where}.architecture: must be a text. {ANEW}")
    between = _numbers(f"{where}.between", given.get("between"), lambda x: x >= 0)
    if len(between) != 2 or between[0] > between[1]:
        raise ConfigError(f"{where}.between={between!r}: must be the least and the largest change. {ANEW}")
    rows: Any = given.get("ratios")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{where}.ratios: must have a list for each branch of guidance. {ANEW}")
    ratios = [_numbers(f"{where}.ratios", row, lambda x: x > 0) for row in cast("list[Any]", rows)]
    if any(len(row) != steps for row in ratios):
        raise ConfigError(f"{where}.ratios: must have a number for each of {steps} steps. {ANEW}")
    polynomial = _numbers(f"{where}.polynomial", given.get("polynomial"), lambda _: True)
    return Curves(given["architecture"], polynomial, (between[0], between[1]), tuple(ratios))


def _numbers(where: str, values: Any, fits: Callable[[float], bool]) -> tuple[float, ...]:
    found: list[Any] = cast("list[Any]", values) if isinstance(values, list) and values else [None]
    for value in found:
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not math.isfinite(value)
            or not fits(value)
        ):
            raise ConfigError(f"{where}: {value!r} is no number that it can have. {ANEW}")
    return tuple(map(float, found))
