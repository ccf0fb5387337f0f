"""The tiles of an autoencoder's own tiled decode and encode, spread over ranks: bitwise what one rank gives.

The autoencoder's own code cuts, crops and blends. It runs twice: once as a rehearsal (parallel/rehearsal.py), which
finds what each part (decoder, encoder, convolutions beside them) would be given, and once with the results of all ranks
at hand. Between both each rank computes its tiles, and one exchange brings all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from parafuse.errors import ConfigError, UnsupportedError
from parafuse.log import note
from parafuse.parallel.bundle import exchange
from parafuse.parallel.effects import Parts
from parafuse.parallel.encoding import spread
from parafuse.parallel.hooks import Forward, override
from parafuse.parallel.part_calls import EVERYWHERE, Call, Finder, KeepsMore, Known, Met, NeededEarly, Player, compute
from parafuse.parallel.part_state import Place, Snapshot
from parafuse.parallel.placeholder import settled
from parafuse.parallel.rehearsal import Rehearsal, tensors_in

METHODS = ("decode", "encode")
"""By which pipelines call autoencoders."""


def has_tiling(module: Any) -> bool:
    """Whether the autoencoder's class has tiles; all of diffusers' have the switch, some without anything behind it."""
    return hasattr(module, "use_tiling") and callable(getattr(module, "enable_tiling", None))


def refuse_without_tiling(name: str, module: Any) -> None:
    if not has_tiling(module):
        raise ConfigError(
            f"vae='tiled': {name} is {type(module).__name__}, which has no tiling; use vae='sharded' (undivided, on "
            "all ranks) or vae='replicated'."
        )


class TiledAutoencoder:
    """What stands on `decode` and `encode`. Calls are collective on `ranks`, all with the same arguments; every rank
    gets the whole result."""

    def __init__(self, name: str, module: nn.Module, ranks: ProcessGroup | None = None):
        """`ranks`: who shares the work; None: there is one rank, where tiling is switched on and nothing else changes.
        Raises ConfigError for a class without tiling."""
        refuse_without_tiling(name, module)
        self.name, self.module = name, module
        self.seen: Counter[str] = Counter()
        """Calls that were spread, and those of one tile; tiles, and those computed here."""
        self._group = "" if ranks is None else ranks.group_name
        self._num_ranks, self._rank = (1, 0) if ranks is None else (ranks.size(), dist.get_rank(ranks))
        self._undo: list[Callable[[], None]] = []
        self._said = False
        self._keep: dict[str, list[Place]] = {}
        """What parts keep from call to call, as far as it is known."""
        self._known: Known = {}
        self._parts = Parts(module)

    def install(self) -> None:
        """Switches tiling on, where it is off."""
        module: Any = self.module
        if not module.use_tiling:
            module.use_tiling = True
            self._undo.append(lambda: setattr(module, "use_tiling", False))
        for method in METHODS if self._num_ranks > 1 else ():
            if callable(getattr(module, method, None)):
                self._undo.append(override(module, method, self._spread(method, getattr(module, method))))

    def remove(self) -> None:
        """Puts back what stood there. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def lines(self) -> list[str]:
        """For receipts."""
        words = [f"{self.seen['spread']} calls spread over {self._num_ranks} ranks"] if self.seen["spread"] else []
        words += [f"{self.seen['tiles here']} of {self.seen['tiles']} tiles here"] if self.seen["tiles"] else []
        words += [f"{self.seen['one tile']} calls of one tile on every rank"] if self.seen["one tile"] else []
        return [f"{self.name}: tiled" + (f", {', '.join(words)}" if words else "")]

    def _spread(self, method: str, original: Forward) -> Forward:
        def shared(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = settled(args), settled(kwargs)
            given = tensors_in((args, kwargs))
            if torch.is_grad_enabled() and any(x.requires_grad for x in given):
                raise UnsupportedError(
                    f"{self.name}.{method}: tiles of other ranks come without gradients; call it under "
                    "torch.no_grad(), or use vae='replicated'."
                )
            if not self.module.use_tiling:  # switched off since, by the user
                self.seen["one tile"] += 1
                return original(*args, **kwargs)
            with torch.no_grad():
                return self._run(original, args, kwargs, given[0].device if given else torch.device("cpu"))

        return shared

    def _run(self, original: Forward, args: Any, kwargs: Any, device: torch.device) -> Any:
        if self._parts.have_other_objects():
            self._known, self._parts = {}, Parts(self.module)
        noise, before = _Noise(args, kwargs, device), Snapshot(self.module)
        calls, used, num_groups = self._rehearse(original, args, kwargs, noise)
        if num_groups < 2:
            self._say_one_tile()
        if num_groups < 2 and not any(call.kept for call in calls):
            return original(*args, **kwargs)
        owners = spread(_sizes(calls, num_groups), self._num_ranks)
        values = self._exchanged(calls, owners, used, device)
        if num_groups > 1:
            self.seen.update({"spread": 1, "tiles": num_groups, "tiles here": owners.count(self._rank)})
        try:
            with Met(self.module, self._keep, Player(calls, values)):
                return original(*args, **kwargs)
        finally:
            before.restore_without_values()

    def _rehearse(self, original: Forward, args: Any, kwargs: Any, noise: _Noise) -> tuple[list[Call], set[int], int]:
        """The calls of parts, which results are needed by `id`, and the number of groups. Leaves noise and module as
        they were."""
        early: set[int] = set()
        while True:
            mode, before = Rehearsal(), Snapshot(self.module)
            finder = Finder(mode, early, self._known)
            try:
                with Met(self.module, self._keep, finder), mode:
                    original(*args, **kwargs)
                return finder.calls, mode.used, finder.groups()
            except NeededEarly as found:
                early |= found.calls
            except KeepsMore as found:
                self._keep.setdefault(found.name, []).extend(found.places)
            except UnsupportedError as error:
                raise UnsupportedError(
                    f"vae='tiled': {self.name} ({type(self.module).__name__}) cannot be spread over ranks: {error}; "
                    "use vae='sharded' or vae='replicated'."
                ) from error
            finally:
                before.restore()
                noise.restore(mode.has_drawn)

    def _exchanged(
        self, calls: list[Call], owners: list[int], used: set[int], device: torch.device
    ) -> dict[int, Tensor]:
        """The values of all results that are needed, by `id` of what stands in for them. Collective."""
        per_rank: list[list[Tensor]] = [[] for _ in range(self._num_ranks)]
        for call in calls:
            if call.group != EVERYWHERE:
                per_rank[owners[call.group]] += [x for x in call.results() if id(x) in used]
        mine: list[Tensor] = []
        failed: Exception | None = None
        try:
            own = compute(call for call in calls if call.group != EVERYWHERE and owners[call.group] == self._rank)
            mine = [own[id(x)] for x in per_rank[self._rank]]
        except Exception as error:  # the others wait in the exchange: they hear of it there
            failed = error
        arrived = exchange(mine, per_rank, device, self._group, failed)
        pairs = zip(per_rank, arrived, strict=True)
        return {id(like): x for likes, found in pairs for like, x in zip(likes, found, strict=True)}

    def _say_one_tile(self) -> None:
        self.seen["one tile"] += 1
        if not self._said:
            self._said = True
            note(f"{self.name}: of one tile, so that every rank computes all of it; vae='sharded' would divide it.")


class _Noise:
    """Generators that a call may draw from, as they were before it."""

    def __init__(self, args: Any, kwargs: Any, device: torch.device):
        own = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Generator)]
        own.append(torch.default_generator)
        if device.type == "cuda":
            own.append(torch.cuda.default_generators[device.index or 0])
        self._states = [(one, one.get_state()) for one in own]

    def restore(self, has_drawn: bool) -> None:
        """Only where the call has drawn: others may draw from the process's generators meanwhile."""
        for one, state in self._states if has_drawn else ():
            one.set_state(state)


def _sizes(calls: list[Call], num_groups: int) -> list[int]:
    found = [0] * num_groups
    for call in calls:
        if call.group != EVERYWHERE:
            found[call.group] += call.size
    return found
