"""Command-line options derived from dataclasses: one per field, its docstring the help. Nothing is typed twice."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast

import typer

from parafuse.errors import ConfigError
from parafuse.launch.losses import said

UNITS = {"_s": "seconds", "_bytes": "bytes", "_tokens": "tokens"}
FLAT_GROUPS = ("parallel",)
"""Nested dataclasses whose fields become options without the group's name before them: `--ulysses`."""
NAMES = {int: "whole number", float: "number", str: "text"}
Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a dataclass, as an option."""

    path: tuple[str, ...]
    """Field names from the outer dataclass to this one."""
    kind: Any
    """The field's type hint."""
    default: Any
    help: str
    panel: str | None = None
    """Heading in the help under which it stands."""

    @property
    def name(self) -> str:
        """Python name of the parameter."""
        shown = self.path[1:] if self.path[0] in FLAT_GROUPS else self.path
        return "_".join(shown)

    @property
    def unit(self) -> str | None:
        return next((unit for suffix, unit in UNITS.items() if self.name.endswith(suffix)), None)

    @property
    def flag(self) -> str:
        """`timeout_s` -> `--timeout`: the unit is in the help."""
        name = self.name
        for suffix in UNITS:
            name = name.removesuffix(suffix)
        return "--" + name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def is_many(self) -> bool:
        """A tuple: the option may be given several times."""
        return typing.get_origin(self.kind) is tuple

    @property
    def scalars(self) -> list[Any]:
        """The types it accepts, in the order in which they are tried."""
        kinds = typing.get_args(self.kind) if _is_union(self.kind) else (self.kind,)
        return [kind for kind in (int, float, str) if kind in kinds]

    @property
    def words(self) -> list[str]:
        """The words it accepts besides, such as "auto"."""
        kinds = typing.get_args(self.kind) if _is_union(self.kind) else (self.kind,)
        return [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]

    @property
    def metavar(self) -> str | None:
        if self.is_switch:
            return None
        if self.is_many:
            return "KEY=VALUE" if self.name == "set" else "TEXT"
        shown = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
        return "|".join([self.unit.upper() if self.unit else shown[kind] for kind in self.scalars[:1]] + self.words)

    def parse(self, value: Any) -> Any:
        """The field's value from what was typed. Raises ConfigError naming the option, the value and what it may be."""
        if self.is_switch or not isinstance(value, str):
            return tuple(value) if self.is_many else value
        if value in self.words:
            return value
        for kind in self.scalars:
            try:
                return kind(value)
            except ValueError:
                continue
        allowed = [f"a {NAMES[kind]}" for kind in self.scalars] + [repr(word) for word in self.words]
        raise ConfigError(f"{self.flag} {value!r}: must be {' or '.join(allowed)}.")

    def parameter(self) -> inspect.Parameter:
        """As typer wants it. Values arrive as text: `parse` has the better messages. None: not given."""
        kind: Any = list[str] if self.is_many else bool if self.is_switch else str
        shown = f"{self.default:g}" if isinstance(self.default, float) else self.default
        text = self.help if shown in (None, False, (), "") else f"{self.help} (Default: {shown})"
        info = typer.Option(self.flag, help=text, metavar=self.metavar, show_default=False, rich_help_panel=self.panel)
        annotation = Annotated[kind | None, info]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, UnionType)


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited ones too, '' where there is none."""
    inherited = [base for base in cls.__mro__[:0:-1] if dataclasses.is_dataclass(base)]
    docs = {name: text for base in inherited for name, text in field_docs(base).items()}
    definition = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0])
    body = definition.body
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            docs[node.target.id] = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[node.target.id] = inspect.cleandoc(str(below.value.value))
    return docs


def options_of(cls: type, *, panel: str | None = None) -> list[Option]:
    """One option per field of the dataclass `cls`, nested dataclasses included. Names must be unique."""
    options = list(_walk(cls, (), panel))
    names = [option.name for option in options]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two fields of {cls.__name__} make the option {name!r}")
    return options


def _walk(cls: type, path: tuple[str, ...], panel: str | None) -> Iterator[Option]:
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _walk(cast(type, kind), (*path, field.name), panel)
            continue
        if _is_union(kind):
            some = tuple(part for part in typing.get_args(kind) if part is not NoneType)
            kind = some[0] if len(some) == 1 else kind
        text = " ".join(part for part in (docs[field.name], said(field)) if part)
        yield Option(path=(*path, field.name), kind=kind, default=field.default, help=text, panel=panel)


def with_options(*options: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the `**options` parameter of a command becomes these options, as typer sees it."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [option.parameter() for option in options]

        @functools.wraps(command)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return command(*args, **kwargs)

        wrapper.__signature__ = signature.replace(parameters=[*own, *added])  # pyright: ignore[reportAttributeAccessIssue]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        del wrapper.__wrapped__  # its signature would be taken for the wrapper's
        return wrapper

    return decorate


def given(options: list[Option], typed: dict[str, Any]) -> list[tuple[Option, Any]]:
    """(option, parsed value) of the options that the user gave."""
    return [(option, option.parse(typed[option.name])) for option in options if typed.get(option.name) is not None]


def build(base: Built, chosen: list[tuple[Option, Any]]) -> Built:
    """`base`, a dataclass instance, with the chosen values in place of its own; both levels validate themselves."""
    outer: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for option, value in chosen:
        *group, name = option.path
        (groups.setdefault(group[0], {}) if group else outer)[name] = value
    for group, values in groups.items():
        outer[group] = dataclasses.replace(getattr(base, group), **values)
    return dataclasses.replace(base, **outer)  # pyright: ignore[reportArgumentType]
