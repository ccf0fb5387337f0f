"""Where a model hands the mask of its text to its parts, and how a part is called without one: masks that leave every
token are not needed, and without them flash attention can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from parafuse.engine.rewrites.flow import UNKNOWN, Flow, Sources

Place = int | str
"""Of an argument: its number, or its name."""
Sites = dict[nn.Module, tuple[Place, ...]]


class Gate:
    """A hook before the forward of one part, which takes arguments away while it is told so."""

    def __init__(self) -> None:
        self._of_the_call: tuple[Place, ...] = ()  # parallel/held.py: OF_THE_CALL

    def close(self, places: tuple[Place, ...]) -> None:
        self._of_the_call = places

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = self._of_the_call
        if not places:
            return None
        new = tuple(None if i in places else x for i, x in enumerate(args))
        return new, {name: None if name in places else x for name, x in kwargs.items()}


class Gates:
    """One for each part that a model calls itself: what stands on it, and the items of its lists."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.parts = list(dict.fromkeys(_parts(module)))
        self._gates: dict[nn.Module, Gate] = {}
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        for part in self.parts:
            self._gates[part] = Gate()
            self._undo.append(part.register_forward_pre_hook(self._gates[part], with_kwargs=True).remove)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._gates.clear()

    @contextmanager
    def closed(self, sites: Sites) -> Iterator[None]:
        """Inside, these parts are called without these arguments."""
        for part, places in sites.items():
            self._gates[part].close(places)
        try:
            yield
        finally:
            for part in sites:
                self._gates[part].close(())

    def find(self, run: Callable[[], Any], leaves: list[Any], masks: Sources) -> Sites:
        """What parts are given that comes from these masks alone, and that masks nothing. Only the model's own code
        between its parts is followed; what a part gives back is taken to come from everything."""
        flow, seen = Flow(leaves, unseen=UNKNOWN), list[tuple[nn.Module, Place, Tensor]]()
        flow.mark([*self.module.parameters(), *self.module.buffers()], ())
        depth = 0

        def enter(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal depth
            depth += 1
            if depth == 1:
                flow.__exit__(None, None, None)
                for place, x in [*enumerate(args), *kwargs.items()]:
                    sources = flow.sources_of(x) if isinstance(x, Tensor) else UNKNOWN
                    if sources and sources <= masks:
                        seen.append((part, place, x))

        def leave(part: nn.Module, args: Any, out: Any) -> None:
            nonlocal depth
            if depth == 1:
                flow.mark(out, UNKNOWN)
                flow.__enter__()
            depth -= 1

        hooks = [part.register_forward_pre_hook(enter, with_kwargs=True) for part in self.parts]
        hooks += [part.register_forward_hook(leave, always_call=True) for part in self.parts]
        try:
            with flow:
                run()
        finally:
            for hook in hooks:
                hook.remove()
        found: Sites = {}
        blank = {(part, place): _masks_nothing(x) for part, place, x in seen}
        for part, place, x in seen:
            if blank[part, place] and _masks_nothing(x) and place not in found.get(part, ()):
                found[part] = (*found.get(part, ()), place)
        return found


def _masks_nothing(x: Tensor) -> bool:
    """Whether it lets all through: true or one everywhere, or zero everywhere where it is added. Waits for the
    device."""
    if not x.numel():
        return False
    return bool((x == 1).all()) or (x.is_floating_point() and bool((x == 0).all()))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).forward is nn.Module.forward:  # a list or a dict of modules
            yield from _parts(child)
        else:
            yield child
