"""Which form an autoencoder's decode and encode take on several ranks: replicated, tiled, sharded, or by each call.

`auto` changes no picture: it spreads diffusers' tiles where tiling is on already, and divides what is undivided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from parafuse.config import VAE_AUTO, VAE_SHARDED, VAE_TILED
from parafuse.engine.vae.tiled import METHODS, TiledAutoencoder
from parafuse.errors import ConfigError, UnsupportedError
from parafuse.log import note
from parafuse.parallel.hooks import Forward, override
from parafuse.parallel.placeholder import settled

SMALLEST = {"decode": 64 * 64, "encode": 512 * 512}
"""Positions of latents, or pixels, of one sample, from which on `auto` shares a call between two ranks: a 512 x 512
picture of most autoencoders. Below, the exchanges of a divided decode cost more than they save. What P ranks save is
1 - 1/P of the work, so that more ranks share smaller calls. A shared call never takes more memory than a whole one."""


DECODING = "vae"
"""What goes between ranks for autoencoders, among what is exchanged."""


class Spread(Protocol):
    """What stands on an autoencoder."""

    def install(self) -> None: ...
    def remove(self) -> None: ...
    def lines(self) -> list[str]: ...


def make_spread(form: str, name: str, module: nn.Module, ranks: ProcessGroup | None) -> Spread | None:
    """What stands on the autoencoder for a form. `ranks`: None: there is one rank, where only tiles change anything."""
    if form == VAE_TILED:
        return TiledAutoencoder(name, module, ranks)
    if ranks is None:
        return None
    if form == VAE_SHARDED:
        return _sharded(name, module, ranks)
    return ByCall(name, module, ranks) if form == VAE_AUTO else None


def _sharded(name: str, module: nn.Module, ranks: ProcessGroup) -> Spread:
    from parafuse.engine.vae.sharded import ShardedAutoencoder

    return ShardedAutoencoder(name, module, ranks)


def never() -> bool:
    """Where nobody can say that all ranks make a call."""
    return False


class ByCall:
    """`auto`: a call that is large enough is shared, where all ranks are known to make it (in an engine's requests); in
    every other case each rank makes it whole."""

    def __init__(self, name: str, module: nn.Module, ranks: ProcessGroup):
        self.name, self.module, self._ranks, self._num_ranks = name, module, ranks, ranks.size()
        self.together: Callable[[], bool] = never
        """Whether all ranks make the call that is made now."""
        self._forms: dict[str, Spread] = {}
        self._refused: dict[str, str] = {}
        """Form -> why it cannot be had."""
        self._inside = False
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        for method in METHODS:
            if callable(getattr(self.module, method, None)):
                self._undo.append(override(self.module, method, self._by_call(method, getattr(self.module, method))))

    def remove(self) -> None:
        """Puts back what stood there. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def lines(self) -> list[str]:
        """For receipts; nothing until a call was shared."""
        refused = [f"{self.name}: not {form} ({why})" for form, why in self._refused.items()]
        return [line for one in self._forms.values() for line in one.lines()] + refused

    def _by_call(self, method: str, original: Forward) -> Forward:
        def chosen(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = settled(args), settled(kwargs)
            form = VAE_TILED if getattr(self.module, "use_tiling", False) else VAE_SHARDED
            saved = _positions(args, kwargs) * (1 - 1 / self._num_ranks)
            is_small = saved < SMALLEST[method] / 2
            if self._inside or is_small or not self.together() or form in self._refused:
                return original(*args, **kwargs)
            try:
                return self._in_form(form, method, args, kwargs)
            except (UnsupportedError, ConfigError) as error:  # the same on all ranks, at the same operator
                self._refused[form] = str(error)
                self._forms.pop(form, None)
                note(f"{self.name}: every rank makes all of {method}, as {form} cannot be had: {error}")
                return original(*args, **kwargs)

        return chosen

    def _in_form(self, form: str, method: str, args: Any, kwargs: Any) -> Any:
        if form not in self._forms:
            one = make_spread(form, self.name, self.module, self._ranks)
            if one is None:
                raise UnsupportedError(f"there is no form {form}")
            self._forms[form] = one
        self._inside = True
        self._forms[form].install()
        try:
            return getattr(self.module, method)(*args, **kwargs)
        finally:
            self._forms[form].remove()
            self._inside = False


def _positions(args: Any, kwargs: Any) -> int:
    """Of the first tensor, in one sample."""
    first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 2), None)
    return 0 if first is None else first[0, 0].numel()
