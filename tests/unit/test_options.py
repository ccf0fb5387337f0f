"""Options derived from dataclasses: what becomes an option, what it accepts, and what it says when it does not."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from parafuse.config import Config, Parallel
from parafuse.errors import ConfigError
from parafuse.launch.options import Option, build, field_docs, given, options_of


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Stands for a part of a configuration."""

    depth: int = 1
    """How deep.

    Second paragraph."""
    bare: str = "x"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    """Nested."""
    wait_s: float = 2.5
    """Seconds."""
    mode: int | Literal["auto", "off"] = "auto"
    name: str | None = None
    many: tuple[str, ...] = ()
    switch: bool = False


def option(name: str, cls: type = Outer) -> Option:
    [found] = [option for option in options_of(cls) if option.name == name]
    return found


def test_every_field_of_config_is_an_option_with_help() -> None:
    paths = {option.path for option in options_of(Config)}
    fields = {(f.name,) for f in dataclasses.fields(Config)} - {("parallel",)}
    assert paths == fields | {("parallel", f.name) for f in dataclasses.fields(Parallel)}
    assert all(option.help for option in options_of(Config))


def test_names_flags_and_metavars() -> None:
    shown = {option.name: (option.flag, option.metavar) for option in options_of(Outer)}
    assert shown == {
        "inner_depth": ("--inner-depth", "INTEGER"),
        "inner_bare": ("--inner-bare", "TEXT"),
        "wait_s": ("--wait", "SECONDS"),
        "mode": ("--mode", "INTEGER|auto|off"),
        "name": ("--name", "TEXT"),
        "many": ("--many", "TEXT"),
        "switch": ("--switch", None),
    }


def test_docs_are_those_under_the_fields() -> None:
    assert field_docs(Inner) == {"depth": "How deep.\n\nSecond paragraph.", "bare": ""}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("inner_depth", "-3", -3),
        ("wait_s", "3", 3.0),
        ("wait_s", "1e2", 100.0),
        ("mode", "auto", "auto"),
        ("mode", "4", 4),
        ("name", "", ""),
        ("name", "auto", "auto"),
        ("switch", True, True),
        ("many", ["a=1", "b"], ("a=1", "b")),
    ],
)
def test_values(name: str, text: Any, value: object) -> None:
    parsed = option(name).parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("inner_depth", "1.5", "--inner-depth '1.5': must be a whole number."),
        ("wait_s", "1,5", "--wait '1,5': must be a number."),
        ("mode", "on", "--mode 'on': must be a whole number or 'auto' or 'off'."),
    ],
)
def test_bad_values(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        option(name).parse(text)
    assert str(caught.value) == message


def test_given_values_replace_those_of_the_base_only() -> None:
    options = options_of(Outer)
    typed = {option.name: None for option in options} | {"inner_depth": "4", "wait_s": "1"}
    base = Outer(name="kept", inner=Inner(bare="kept"))
    assert build(base, given(options, typed)) == Outer(name="kept", inner=Inner(bare="kept", depth=4), wait_s=1.0)


def test_the_configuration_checks_what_is_built() -> None:
    options = options_of(Config)
    with pytest.raises(ConfigError, match=r"parallel\.ring=0"):
        build(Config(), given(options, {"ring": "0"}))
    with pytest.raises(ConfigError, match="dtype='int4'"):
        build(Config(), given(options, {"dtype": "int4"}))
    assert build(Config(), given(options, {"ulysses": "auto", "ring": "2"})).parallel == Parallel(ring=2)


def test_two_fields_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Clash:
        """Its nested field and its own field make the same option."""

        inner: Inner = field(default_factory=Inner)
        inner_depth: int = 1

    Clash.__annotations__ = {"inner": Inner, "inner_depth": int}
    with pytest.raises(ValueError, match="inner_depth"):
        options_of(Clash)


def test_parameters_are_optional_texts() -> None:
    parameter = option("mode").parameter()
    assert parameter.default is None
    assert typing.get_args(parameter.annotation)[0] == str | None
