"""Replacing methods on one instance, and putting them back exactly as they were. Classes are never touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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


def override(module: nn.Module, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Sets a method on the instance; the returned function undoes it.

    Undoing puts back what stood there before (nothing, or another library's instance attribute), unless someone has
    replaced it since: then it stays, and a RuntimeError says so."""
    had, original = name in module.__dict__, getattr(module, name)
    setattr(module, name, replacement)

    def undo() -> None:
        if module.__dict__.get(name) is not replacement:
            raise RuntimeError(
                f"{type(module).__name__}.{name} was replaced after parafuse was applied; take that off first "
                "(for example remove_all_hooks()), then remove parafuse."
            )
        if had:
            setattr(module, name, original)
        else:
            del module.__dict__[name]

    return undo
