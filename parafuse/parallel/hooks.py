"""Replacing `forward` on one instance, and putting it back exactly as it was. Classes are never touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def is_overridden(module: nn.Module) -> bool:
    """Whether a replacement stands on this instance."""
    return getattr(module.forward, "parafuse", False)


def override_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> Callable[[], None]:
    """Sets `module.forward = make(original)` on the instance; the returned function undoes it.

    Undoing puts back what stood there before (nothing, or another library's instance attribute), unless someone has
    replaced it since: then it stays, and a RuntimeError says so."""
    had, original = "forward" in module.__dict__, module.forward
    replacement = make(original)
    replacement.parafuse = True  # pyright: ignore[reportFunctionMemberAccess]
    module.forward = replacement

    def undo() -> None:
        if module.__dict__.get("forward") is not replacement:
            raise RuntimeError(
                f"{type(module).__name__}.forward was replaced after parafuse was applied; take that off first "
                "(for example remove_all_hooks()), then remove parafuse."
            )
        if had:
            module.forward = original
        else:
            del module.__dict__["forward"]

    return undo
