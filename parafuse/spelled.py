"""Choices with a short text, for the command line and for files: `first-block:0.1,warmup_steps=4`, `fp8:scale=tensor`.

A frozen dataclass stands for each method. Values without a name fill the fields in their order. Torch-free.
"""

# Users pass what they like, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from parafuse.errors import ConfigError, nearest, reject_unknown

SWITCH = {"true": True, "false": False}


@dataclass(frozen=True)
class Spelled:
    """What all of them have in common."""

    what: ClassVar[str]
    """The option that it is a value of: cache, quantize."""
    method: ClassVar[str]
    """Its name in texts."""

    def __str__(self) -> str:
        """The text that makes it again, every field by name."""
        fields = ",".join(f"{f.name}={_shown(getattr(self, f.name))}" for f in dataclasses.fields(self))
        return f"{self.method}:{fields}"

    @property
    def brief(self) -> str:
        """The shortest text that makes it again: `first-block:0.1`."""
        fields = {f.name: f for f in dataclasses.fields(self)}
        said = [_shown(getattr(self, name)) for name, f in fields.items() if not f.kw_only]
        said += [
            f"{name}={_shown(getattr(self, name))}"
            for name, f in fields.items()
            if f.kw_only and getattr(self, name) != f.default
        ]
        return f"{self.method}:{','.join(said)}" if said else self.method

    def _check(self, name: str, *, least: float, whole: bool = True, optional: bool = False) -> None:
        """Raises ConfigError for a field that is no number of at least `least`."""
        value = getattr(self, name)
        if optional and value is None:
            return
        is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < least:
            kind = "a whole number" if whole else "a number"
            more = ", or none" if optional else ""
            raise ConfigError(f"{self._named(name)}: must be {kind} of at least {least:g}{more}.")

    def _check_switch(self, name: str) -> None:
        """Raises ConfigError for a field that is not true or false."""
        if not isinstance(getattr(self, name), bool):
            raise ConfigError(f"{self._named(name)}: must be true or false.")

    def _check_word(self, name: str, words: tuple[str, ...]) -> None:
        """Raises ConfigError for a field that is none of these."""
        value = getattr(self, name)
        if value not in words:
            hint = nearest(value, words) if isinstance(value, str) else ""
            raise ConfigError(f"{self._named(name)}: must be one of {', '.join(words)}{hint or '.'}")

    def _named(self, name: str) -> str:
        return f"{self.what} {self.method}: {name}={getattr(self, name)!r}"


One = TypeVar("One", bound=Spelled)


def chosen(what: str, value: Any, methods: Mapping[str, type[One]], allowed: str) -> One:
    """The method that a text names, or the value itself. Raises ConfigError with what is `allowed`."""
    if type(value) in methods.values():
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{what}={value!r}: must be {allowed}.")
    return read(what, value, methods)


def read(what: str, text: str, methods: Mapping[str, type[One]]) -> One:
    """What a text names. Raises ConfigError with what is allowed."""
    name, _, rest = text.partition(":")
    if name not in methods:
        hint = nearest(name, methods) or "."
        raise ConfigError(f"{what}={text!r}: {name!r} is no {what}; there are {', '.join(methods)}{hint}")
    kind = methods[name]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    in_order = [f.name for f in fields.values() if not f.kw_only]
    given: dict[str, Any] = {}
    for place, item in enumerate(rest.split(",") if rest else ()):
        key, is_named, value = item.partition("=")
        if not is_named:
            if place >= len(in_order):
                raise ConfigError(f"{what}={text!r}: {item!r} has no name; {name} takes {', '.join(fields)}.")
            key, value = in_order[place], item
        reject_unknown(f"{what} {name}", [key], fields)
        if key in given:
            raise ConfigError(f"{what}={text!r}: {key} is given twice.")
        given[key] = _parsed(f"{what} {name}", key, value, str(fields[key].type))
    return kind(**given)


def _parsed(where: str, name: str, text: str, kind: str) -> Any:
    """A field's value from its text; what is no number where one is needed is refused."""
    if "None" in kind and text.lower() == "none":
        return None
    if "str" in kind:
        return text
    if kind == "bool":
        return SWITCH.get(text.lower(), text)
    try:
        return int(text) if "int" in kind else float(text)
    except ValueError as error:
        wanted = "a whole number" if "int" in kind else "a number"
        more = " or none" if "None" in kind else ""
        raise ConfigError(f"{where}: {name}={text!r}: must be {wanted}{more}.") from error


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
