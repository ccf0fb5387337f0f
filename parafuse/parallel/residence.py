"""Weights of one component that live elsewhere, and come to the device where they are used.

A unit comes as a whole: when it is entered, and goes when it is left, or stays (what the component needs all the time)
until another component's turn. While one unit computes the next ones come; which these are is learned from the calls
before, and a wrong guess costs a wait, never a wrong value. Local, unless the home is other ranks' memory
(`ranks_home.py`): then all that lets units come, or reads them at home, is collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from parafuse.parallel.carry import Carrier, Flight, Ledger
from parafuse.parallel.homes import Home
from parafuse.parallel.image import Image, Slot, carriers

WillRun = Callable[[nn.Module, bool], bool | None]
"""(module of a unit, whether in the next call) -> whether it will run; None: that is not decided yet."""


@dataclass(eq=False)
class Group:
    """Weights that are to come together."""

    weights: list[Tensor]
    module: nn.Module | None = None
    """Whose call they are for; None: they stay as long as the component has its turn."""


@dataclass(eq=False)
class Unit:
    """A group with its image."""

    group: Group
    number: int
    image: Image
    users: int = 0
    data: Tensor | None = None
    """Its image on the device, while it is there."""

    @property
    def stays(self) -> bool:
        return self.group.module is None


class Turn:
    """The components of one pipeline, of which one at a time is on the device. Those that are not `in_order` come when
    they are called and stay beside the others, as a ControlNet does beside its UNet."""

    def __init__(self) -> None:
        self._members: dict[Residence, None] = {}

    def join(self, one: Residence) -> None:
        self._members[one] = None

    def leave(self, one: Residence) -> None:
        self._members.pop(one, None)

    @property
    def nbytes(self) -> int:
        """Of all that comes and goes, of all of them."""
        return sum(unit.image.nbytes for one in self._members for unit in one.units)

    def take(self, one: Residence) -> None:
        """Sends the others away, but for those that are in a call."""
        if one.in_order:
            for other in self._members:
                if other is not one and other.in_order:
                    other.send_away()

    def send_away(self) -> None:
        """All of them: the end of a request."""
        for one in self._members:
            one.send_away()

    @contextmanager
    def at_home(self, *, changes: bool = True) -> Iterator[None]:
        """All weights of all of them (`Residence.at_home`)."""
        with ExitStack() as stack:
            for one in self._members:
                stack.enter_context(one.at_home(changes=changes))
            yield


@dataclass(eq=False)
class Residence:
    """Where the weights of one component are. `settle` first of all."""

    root: nn.Module
    groups: Callable[[], list[Group]]
    """What comes together, of the component as it is then: adapters may have come."""
    home: Home
    device: torch.device
    carrier: Carrier
    ledger: Ledger
    turn: Turn
    prefetch: int = 0
    in_order: bool = True
    buffers: Callable[[], Iterable[Tensor]] | None = None
    """Those that are to be on the device; None: all of the component."""
    will_run: WillRun = lambda module, in_next: True
    """Set by what may leave units out: these are not fetched ahead for nothing."""
    awake: Callable[[], bool] = lambda: True
    """Set by what may leave whole calls out: then nothing comes for them."""
    on_renewed: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    """Called when the units are others."""
    units: list[Unit] = field(default_factory=list[Unit])
    _of: dict[nn.Module, Unit] = field(default_factory=dict[nn.Module, Unit])
    _slots: dict[int, tuple[Unit, list[Slot]]] = field(default_factory=dict[int, tuple[Unit, list[Slot]]])
    """By a weight's identity."""
    _flights: dict[Unit, Flight] = field(default_factory=dict[Unit, Flight])
    _summoned: list[Unit] = field(default_factory=list[Unit])
    _next: dict[Unit, Unit] = field(default_factory=dict[Unit, Unit])
    _followed: set[Unit] = field(default_factory=set[Unit])
    """After which another one has come in the same call."""
    _first: Unit | None = None
    """Of the call at hand."""
    _last: Unit | None = None
    _depth: int = 0
    _at_home: bool = False
    _lent: dict[int, int] = field(default_factory=dict[int, int])
    """By a tensor's identity: how often it is lent by itself."""
    _lent_bytes: dict[int, int] = field(default_factory=dict[int, int])
    _made_of: list[tuple[dict[str, Any], tuple[Any, ...]]] = field(default_factory=list[tuple[dict[str, Any], Any]])
    _was: torch.device | None = None
    """Where the weights were before."""

    # putting on and taking off

    def settle(self) -> None:
        """Moves all weights to their home. All or nothing."""
        self._was = next((x.device for weight in self.root.parameters() for x in carriers(weight)), self.device)
        try:
            self._derive()
        except BaseException:
            self.close()
            raise
        self.turn.join(self)

    def close(self) -> None:
        """Puts all weights back where they were, and lets the home go; what it does not have by itself stays away.
        Local."""
        self.send_away(even_busy=True)
        self.carrier.settle()
        self.turn.leave(self)
        for unit in self.units if self.home.keeps_all else ():
            runs = [run.clone() for run in self.home.runs(unit.number)]
            unit.image.put([run.to(self._was or self.device) for run in runs])
        self.units = []
        self._forget()
        for x in self._own_buffers():
            if self._was is not None and x.device != self._was:
                x.data = x.data.to(self._was)
        self.home.close()
        self.carrier.close()

    def _derive(self) -> None:
        """The units of what the component is made of now. Weights must be in memory."""
        units = [
            Unit(group, number, Image(group.weights, self.device, self.home.grain))
            for number, group in enumerate(group for group in self.groups() if group.weights)
        ]
        self.home.keep([unit.image for unit in units])
        self._forget()
        self.units = units
        self._of = {unit.group.module: unit for unit in units if unit.group.module is not None}
        for unit in units:
            slots = {id(slot.tensor): slot for slot in unit.image.slots}
            for weight in unit.group.weights:
                self._slots[id(weight)] = (unit, [slots[id(x)] for x in carriers(weight) if id(x) in slots])
        streamed = [unit for unit in units if not unit.stays]
        self._next = dict(zip(streamed, (*streamed[1:], *streamed[:1]), strict=True))
        for x in self._own_buffers():
            if x.device != self.device:
                x.data = x.data.to(self.device)
        self._made_of = [(part._modules, tuple(part._modules.values())) for part in self.root.modules()]
        for renew in self.on_renewed:
            renew()

    @property
    def modules(self) -> list[nn.Module]:
        """Whose calls units come for."""
        return list(self._of)

    def _own_buffers(self) -> Iterable[Tensor]:
        return self.root.buffers() if self.buffers is None else self.buffers()

    def _forget(self) -> None:
        self._of, self._slots, self._next, self._first, self._last = {}, {}, {}, None, None
        self._summoned, self._followed = [], set()

    def _is_another(self) -> bool:
        """Whether modules were replaced, as adapters do."""
        return any(len(now) != len(then) or not all(map(is_, now.values(), then)) for now, then in self._made_of)

    # calls

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of the component: what it needs all the time is there."""
        self.begin_call()
        try:
            yield
        finally:
            self.end_call()

    def begin_call(self) -> None:
        if not self.awake():
            return
        if not self._depth and not self._at_home:
            self.turn.take(self)
            if self.units and self._is_another():
                with self.at_home():
                    pass  # looks anew
            self._first = self._last = None
        self._bring_what_stays()
        self._depth += 1

    def end_call(self) -> None:
        self._depth = max(0, self._depth - 1)
        if not self._depth and self._last is not None and self._first is not None and self._last not in self._followed:
            self._next[self._last] = self._first

    def _bring_what_stays(self) -> None:
        for unit in self.units if not self._at_home else ():
            if not unit.stays:
                break  # those that stay come first
            self._bring(unit)

    def summon(self, module: nn.Module | None = None) -> None:
        """A part is called by itself, maybe outside of a call of the component: what it needs is there from now on.
        `module`: of the unit that it belongs to; None: to what stays."""
        if self._at_home:
            return
        unit = self._of.get(module) if module is not None else None
        if not self._depth:
            self.turn.take(self)
            self._bring_what_stays()
        if unit is not None and unit.data is None:
            self._bring(unit)
            self._summoned.append(unit)

    def enter(self, module: nn.Module) -> None:
        """The unit of a module is there until `leave`, and the next ones are on their way."""
        unit = self._of.get(module)
        if unit is None or self._at_home:
            return
        while self._summoned:
            other = self._summoned.pop()
            if not other.users and other is not unit:
                self._release(other)
        self._bring(unit)
        unit.users += 1
        try:
            self._learn(unit)
            self._look_ahead(unit)
        except BaseException:  # no memory for what comes ahead, say: then nobody calls `leave`
            self.leave(module)
            raise

    def leave(self, module: nn.Module) -> None:
        unit = self._of.get(module)
        if unit is None or not unit.users:
            return
        unit.users -= 1
        if not unit.users:
            self._release(unit)

    @contextmanager
    def unit(self, module: nn.Module) -> Iterator[None]:
        """Around a call of a unit's module."""
        self.enter(module)
        try:
            yield
        finally:
            self.leave(module)

    def _learn(self, unit: Unit) -> None:
        if self._first is None:
            self._first = unit
        last = self._last
        if last is not None and last is not unit:
            known = self._next[last].group.module if last in self._followed else None
            if known is None or self.will_run(known, False) is not False:  # else it was left out in this call alone
                self._next[last] = unit
            self._followed.add(last)
        self._last = unit

    def _look_ahead(self, unit: Unit) -> None:
        """Starts what comes next, as far as that is sure, and gives up what was started and does not."""
        coming: list[Unit] = []
        at, in_next = unit, False
        for _ in range(len(self._next)):
            if len(coming) >= self.prefetch or at not in self._next:
                break
            at = self._next[at]
            in_next = in_next or at is self._first
            runs = self.will_run(at.group.module, in_next) if at.group.module is not None else None
            if runs is None or at is unit:
                break
            if runs and at.data is None:
                coming.append(at)
        for other in [one for one in self._flights if one not in coming]:
            self._give_up(other)
        for one in coming:
            if one not in self._flights:
                self._flights[one] = self._start(one, ahead=True)

    # moving

    def _start(self, unit: Unit, *, ahead: bool) -> Flight:
        with _plainly():
            flight = self.carrier.start(self.home, unit.number, unit.image.nbytes, ahead=ahead)
        self.ledger.came(unit.image.nbytes)
        return flight

    def _bring(self, unit: Unit) -> None:
        if unit.data is not None:
            return
        begun = time.perf_counter()
        flight = self._flights.pop(unit, None)
        if flight is None or flight.is_late():
            self.ledger.waits += 1
        flight = flight or self._start(unit, ahead=False)
        try:
            with _plainly():
                unit.data = flight.land()
                unit.image.put(unit.image.split(unit.data))
        except BaseException:
            if unit.data is not None:
                unit.image.put_away()
                unit.data = None
            self.ledger.went(unit.image.nbytes)
            raise
        finally:
            self.ledger.waited_s += time.perf_counter() - begun

    def _release(self, unit: Unit) -> None:
        if unit.data is None:
            return
        with _plainly():
            lent = [slot for slot in unit.image.slots if id(slot.tensor) in self._lent]
            kept = [(slot, slot.tensor.data.clone()) for slot in lent]
            unit.image.put_away()
            for slot, data in kept:
                self._show(slot, data)
            self.carrier.give_back(unit.data)
        unit.data = None
        self.ledger.went(unit.image.nbytes)

    def _give_up(self, unit: Unit) -> None:
        flight = self._flights.pop(unit)
        self.ledger.wasted += 1
        self.ledger.went(unit.image.nbytes)
        with _plainly():
            self.carrier.give_back(flight.land())

    def send_away(self, *, even_busy: bool = False) -> None:
        """All that is not in a call goes home."""
        if (self._depth or self._at_home) and not even_busy:
            return
        while self._flights:
            self._give_up(next(iter(self._flights)))
        for unit in self.units:
            if even_busy or not unit.users:
                unit.users = 0
                self._release(unit)
        self._summoned.clear()
        self.carrier.clear()

    # all at once, or one by one

    @contextmanager
    def present(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, the weights of these modules are there: whole units where all of one is asked for, else one by
        one."""
        weights = {id(x) for module in modules for x in module.parameters()} if not self._at_home else set[int]()
        found = [self._slots[key] for key in weights if key in self._slots]
        whole = {unit for unit, _ in found if all(id(x) in weights for x in unit.group.weights)}
        with ExitStack() as stack:
            for unit in whole:
                self._bring(unit)
                unit.users += 1
                stack.callback(self._unhold, unit)
            for unit, slots in found:
                if unit not in whole:
                    self._lend(unit, slots)
                    stack.callback(self._take_back, unit, slots)
            yield

    def _unhold(self, unit: Unit) -> None:
        unit.users = max(0, unit.users - 1)
        if not unit.users and not unit.stays:
            self._release(unit)

    def _lend(self, unit: Unit, slots: Sequence[Slot]) -> None:
        runs = self.home.runs(unit.number) if unit.data is None else []
        for slot in slots:
            key = id(slot.tensor)
            self._lent[key] = self._lent.get(key, 0) + 1
            if unit.data is None and self._lent[key] == 1:
                with _plainly():
                    self._show(slot, slot.view(runs[slot.run]).to(self.device, copy=True))

    def _show(self, slot: Slot, data: Tensor) -> None:
        if id(slot.tensor) not in self._lent_bytes:
            self._lent_bytes[id(slot.tensor)] = data.nbytes
            self.ledger.came(data.nbytes)
        slot.tensor.data = data

    def _take_back(self, unit: Unit, slots: Sequence[Slot]) -> None:
        for slot in slots:
            key = id(slot.tensor)
            self._lent[key] -= 1
            if not self._lent[key]:
                del self._lent[key]
                self.ledger.went(self._lent_bytes.pop(key, 0))
                if unit.data is None:
                    slot.tensor.data = slot.away

    @contextmanager
    def at_home(self, *, changes: bool = True) -> Iterator[None]:
        """Inside, all weights are in the host's memory with their values, each with a storage of its own: to be saved
        or, with `changes`, changed. What they are afterwards is what comes from then on."""
        if self._at_home or not self.units:
            yield
            return
        if self._depth:
            raise RuntimeError("weights cannot go home in the middle of a call")
        self.send_away(even_busy=True)  # a unit that an error has left there would keep data that is not its own
        self.carrier.settle()
        self._at_home = True
        for unit in self.units:
            unit.image.put(self.home.runs(unit.number))
        try:
            yield
        finally:
            self._at_home = False
            if changes:
                self._renew()
            else:
                for unit in self.units:
                    unit.image.put_away()

    def _renew(self) -> None:
        """After a change. Where the new weights cannot be kept, they stay in the host's memory, and the error says
        why."""
        before = self.units
        try:
            self._derive()
        except BaseException:
            if self.units is not before:  # they were kept, and what came after that has failed
                for unit in self.units:
                    unit.image.put(self.home.runs(unit.number))
            self.units = []
            self._forget()
            raise


@contextmanager
def _plainly() -> Iterator[None]:
    """Inside, torch does what it is told: nothing that follows or replaces operators sees it."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield
