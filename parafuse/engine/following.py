"""Components that a target gets after parafuse was applied: put on before they arrive, taken off when they leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from parafuse.parallel.hooks import override

Component = tuple[str, Any]


def is_manager(target: Any) -> bool:
    """Whether it is diffusers' ComponentsManager, or something like it."""
    return hasattr(target, "remove_from_collection") and isinstance(getattr(target, "components", None), dict)


def managed(manager: Any) -> list[Component]:
    """(name, component) of a manager, in the order in which they came; of equal names the later ones are numbered."""
    found: list[Component] = []
    for identity, component in manager.components.items():
        name = identity.rpartition("_")[0]
        number = 1 + sum(other.partition(" ")[0] == name for other, _ in found)
        if not any(component is other for _, other in found):
            found.append((name if number == 1 else f"{name} {number}", component))
    return found


def follow(target: Any, renew: Callable[[list[Component]], None]) -> list[Callable[[], None]]:
    """Calls `renew(arriving)` before a modular pipeline or a manager gets components, and `renew([])` when its
    components are others. Changes the instance; the returned functions undo that."""
    if is_manager(target):
        add, remove = target.add, target.remove

        def add_and_put_on(name: str, component: Any, collection: str | None = None) -> Any:
            renew([(name, component)])
            try:
                return add(name, component, collection)
            finally:
                renew([])

        def remove_and_take_off(component_id: Any = None) -> None:
            remove(component_id)
            renew([])

        return [override(target, "add", add_and_put_on), override(target, "remove", remove_and_take_off)]
    if not hasattr(target, "register_components"):
        return []
    register = target.register_components

    def register_and_put_on(**components: Any) -> None:
        renew([(name, component) for name, component in components.items() if isinstance(component, nn.Module)])
        try:
            register(**components)
        finally:
            renew([])

    return [override(target, "register_components", register_and_put_on)]
