"""What all rewrites have in common: where one stands, how it is put on and taken off, and what it says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from parafuse.engine.caches.clock import Clock
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.hooks import Forward, OnForward
from parafuse.parallel.mesh import Mesh


@dataclass
class Site:
    """One denoiser and what is known of its calls."""

    module: nn.Module
    mesh: Mesh
    clock: Clock = field(default_factory=Clock)
    context: CallContext = field(default_factory=CallContext)
    name: str = "denoiser"
    """Of the component."""
    is_choice: bool = False
    """Nobody asked for it by name: it is used where it pays alone."""


class Rewrite(ABC):
    """`install` first of all that stands on a denoiser, and take off last."""

    def __init__(self, site: Site):
        self.site, self.module = site, site.module

    def install(self) -> None:  # noqa: B027 - most have nothing inside of the model
        """Puts on what stands inside of the model. Local."""

    @abstractmethod
    def remove(self) -> None:
        """Takes it off, bit for bit. Local."""

    def at_boundary(self) -> list[OnForward]:
        """What meets whole calls of the denoiser, the inner one first: outside of what splits tokens, compiles or
        caches, inside of what shares calls between ranks."""
        return []

    def met_parts(self) -> list[nn.Module]:
        """Parts of the model whose calls it meets: these are compiled one by one, not the model as a whole."""
        return []

    def compile_options(self) -> dict[str, Any]:
        """Of Inductor, for every compiled block."""
        return {}

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, weights are as the model was loaded with them: to be saved."""
        yield

    def outermost(self) -> OnForward | None:
        """What meets every call, also those that another rank makes."""
        return None

    @abstractmethod
    def lines(self) -> list[str]:
        """What it did in the request, for receipts."""

    def begin(self) -> None:  # noqa: B027 - most count nothing
        """A request begins: what the last one did is told."""

    def settle(self) -> None:  # noqa: B027 - most have nothing left to check
        """At the end of a request: raises where something did not hold. May wait for the device."""


class Boundary(OnForward):
    """Hands each call of a denoiser to `call(what stood there, args, kwargs)`."""

    def __init__(self, module: nn.Module, call: Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]):
        super().__init__(module)
        self._call = call

    def _forward(self, original: Forward) -> Forward:
        return lambda *args, **kwargs: self._call(original, args, kwargs)


@contextmanager
def bare(module: nn.Module) -> Iterator[Any]:
    """Inside, the model is as its classes have it, on this rank alone: nothing of parafuse stands on forwards, nothing
    is compiled. Gives its forward. For calls that are made to learn something; without any exchange. Weights that are
    offloaded come for its calls."""
    weights: Any = getattr(getattr(module.forward, "standing", None), "weights", None)
    hidden: list[tuple[dict[str, Any], str, Any]] = []
    for part in module.modules():
        state = vars(part)
        if getattr(state.get("forward"), "parafuse", False):
            hidden.append((state, "forward", state.pop("forward")))
        if state.get("_compiled_call_impl") is not None:
            hidden.append((state, "_compiled_call_impl", state["_compiled_call_impl"]))
            state["_compiled_call_impl"] = None
    try:
        with weights.bare() if weights is not None else nullcontext():
            yield module.forward
    finally:
        for state, name, value in hidden:
            state[name] = value
