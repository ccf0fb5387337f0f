"""Weights that come and go, or are on another device, where a request is followed on weights without memory: what
would be moved is counted, and nothing is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parafuse.engine.memory.fake_pipeline import bytes_by_path
from parafuse.engine.memory.ledger import MAIN, Ledger
from parafuse.engine.offload.pipeline import Offloading, modules_in
from parafuse.engine.placement.put_on import Placing
from parafuse.offload import RANKS, Offload
from parafuse.parallel.carry import Carrier, Flight
from parafuse.parallel.homes import Home
from parafuse.parallel.hooks import Forward
from parafuse.parallel.hops import Hop
from parafuse.parallel.image import Image
from parafuse.parallel.residence import Residence
from parafuse.placement import PlacedWeights

CPU = torch.device("cpu")


def counted(method: Offload, target: Any, degree: int) -> Offloading:
    """What offloads or places a target whose weights are without memory. `degree`: ranks that share a sequence."""
    return (
        CountedPlacing.of(method, target)
        if isinstance(method, PlacedWeights)
        else CountedOffload(method, target, degree)
    )


class _Sizes:
    """A home of weights that have none."""

    grain, keeps_all, is_direct = 1, True, True

    def keep(self, images: Sequence[Image]) -> None: ...

    def read(self, number: int, out: Tensor) -> None: ...

    def runs(self, number: int) -> list[Tensor]:
        return []

    def close(self) -> None: ...


class _Landed(Flight):
    def land(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def is_late(self) -> bool:
        return False


class _Nothing(Carrier):
    """Brings nothing: what is on its way is counted by whoever asks for it."""

    def start(self, home: Home, number: int, nbytes: int, *, ahead: bool) -> Flight:
        return _Landed()

    def give_back(self, image: Tensor) -> None: ...


class CountedOffload(Offloading):
    def __init__(self, method: Offload, target: Any, degree: int):
        super().__init__(method, CPU, target)
        self._degree = degree

    def store(self, where: str) -> Home:
        return _Sizes()

    def carrier(self) -> Carrier:
        return _Nothing()

    def keep_here(self, module: nn.Module) -> None: ...

    def elsewhere(self, ledger: Ledger) -> dict[str, int]:
        """Tells the ledger of what comes and goes from here on. Place -> bytes of weights that stay there."""
        self.ledger.watch = ledger.weigh
        nbytes = self.turn.nbytes
        return {self.method.to: nbytes - nbytes // self._degree if self.method.to == RANKS else nbytes}


class CountedPlacing(Placing):
    meter: Ledger | None = None

    @classmethod
    def of(cls, method: PlacedWeights, target: Any) -> CountedPlacing:
        def device(number: str) -> torch.device:
            return torch.device("cuda", int(number)) if method.device == "cuda" else CPU

        return cls(method, device, target)

    def store(self, where: str) -> Home:
        return _Sizes()

    def carrier(self) -> Carrier:
        return _Nothing()

    def _residence(self, name: str, module: nn.Module, modules: Callable[[], list[nn.Module]]) -> Residence:
        found = super()._residence(name, module, modules)
        found.device = CPU  # where weights without memory say that they are
        return found

    def _settle(self, name: str, module: nn.Module) -> None:
        """Nothing is moved."""

    def hop(self, device: torch.device) -> Hop:
        return _CountedHop(self, device)

    def elsewhere(self, ledger: Ledger) -> dict[str, int]:
        """The same, with the other devices of the rank."""
        self.ledger.watch, self.meter = ledger.weigh, ledger
        found: dict[str, int] = {}
        for name, module in modules_in(self._targets[0][1]):
            for path, nbytes in bytes_by_path(module).items():
                home = self.home(name, path)
                place = home if self.is_away(home) else str(self.device_of(home).index or MAIN)
                found[place] = found.get(place, 0) + nbytes
        found.pop(MAIN, None)
        return found


class _CountedHop(Hop):
    """A call on another device: it has what it is given, and what it gives is where it came from."""

    def __init__(self, placing: CountedPlacing, there: torch.device):
        super().__init__(there)
        self._placing = placing

    def around(self, original: Forward) -> Forward:
        def call(*args: Any, **kwargs: Any) -> Any:
            meter = self._placing.meter
            if meter is None:
                return original(*args, **kwargs)
            with meter.on(str(self.there.index or MAIN), _plain((args, kwargs))):
                result = original(*args, **kwargs)
            meter.moved(_plain(result))
            return result

        return call

    def move(self, x: Tensor, device: torch.device) -> Tensor:
        return x


def _plain(tree: Any) -> list[Tensor]:
    """Tensors with storages of their own; of split ones the rank's rows."""
    return [getattr(x, "local", x) for x in tree_leaves(tree) if isinstance(x, Tensor)]
