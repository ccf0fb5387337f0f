"""Replacing methods on one instance, and putting them back exactly as they were. Classes are never touched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from parafuse.errors import ConfigError

Forward = Callable[..., Any]
_WHY_DISABLED = "parafuse runs this module on several ranks: compile its blocks, by compile() on each, after apply"


def is_overridden(module: nn.Module) -> bool:
    """Whether a replacement stands on this instance."""
    return getattr(module.forward, "parafuse", False)


def override_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> Callable[[], None]:
    """Sets `module.forward = make(original)` on the instance; the returned function undoes it.

    torch.compile does not look into what stands there; what it compiles by itself stays compiled."""
    replacement: Any = torch.compiler.disable(make(module.forward), reason=_WHY_DISABLED)
    replacement.parafuse = True
    return override(module, "forward", replacement)


class OnForward(ABC):
    """What stands for the forward of one module."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._undo: Callable[[], None] | None = None

    def install(self) -> None:
        self._undo = override_forward(self.module, self._forward)

    def remove(self) -> None:
        """Puts back what stood there. No communication."""
        if self._undo:
            self._undo()
            self._undo = None

    @abstractmethod
    def _forward(self, original: Forward) -> Forward:
        """What stands there, over what stood there before."""


def override(module: Any, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Sets a method on the instance (of a module, or a scheduler); the returned function undoes it.

    Undoing puts back what stood there before (nothing, or another library's instance attribute), unless someone has
    replaced it since: then it stays, and a RuntimeError says so."""
    had, original = name in module.__dict__, getattr(module, name)
    setattr(module, name, replacement)

    def undo() -> None:
        if module.__dict__.get(name) is not replacement:
            raise RuntimeError(
                f"{type(module).__name__}.{name} was replaced after parafuse was applied; take that off first "
                "(remove_all_hooks(), or a manager's disable_auto_cpu_offload()), then remove parafuse."
            )
        if had:
            setattr(module, name, original)
        else:
            del module.__dict__[name]

    return undo


def guard(module: nn.Module, name: str, is_inside: Callable[[], bool]) -> Callable[[], None]:
    """Makes a method refuse calls while `is_inside` says no; the returned function undoes it."""
    original = getattr(module, name)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not is_inside():
            raise ConfigError(
                f"{type(module).__name__}.{name}: was called on one rank alone, past the engine, whose other ranks "
                "would not take part. Call the engine (engine(...), or a component of it, as engine.transformer(...))."
            )
        return original(*args, **kwargs)

    replacement: Any = torch.compiler.disable(guarded, reason=_WHY_DISABLED)
    replacement.parafuse = True
    return override(module, name, replacement)
