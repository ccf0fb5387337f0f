"""What the cache of one denoiser has in common with any other: memory of a request, the step and the branch of a
call, and decisions on record."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.memory import Memory
from parafuse.parallel.batch_cut import rows
from parafuse.parallel.branches import Branches
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.compiled import refuse_compile
from parafuse.parallel.effects import Parts
from parafuse.parallel.hooks import Forward, OnForward, override_forward
from parafuse.parallel.placeholder import settled

MANY = 8
"""Changes of the sample after which it is the sample that tells steps, where the scheduler has not stepped."""
Replay = Callable[[int, int], bool]
"""(number of the call, place of the sample) -> whether it is to be skipped."""


class Caching(ABC):
    """The base of all caches. `install` after what splits calls or compiles blocks, before what shares whole calls."""

    def __init__(self, root: nn.Module, clock: Clock, context: CallContext):
        self.root, self.clock, self.context = root, clock, context
        self.branches: Callable[[], Branches] = lambda: Branches(root)
        """Makes what tells the branches of a request apart."""
        self.memory = Memory(self.branches())
        self.replay: Replay | None = None
        self._in_request = False
        self.is_off = False
        """In this request calls pass as if there were no cache."""
        self._made_of = Parts(root)
        self._undo: list[Callable[[], None]] = []
        self._first = next(iter(list(inspect.signature(type(root).forward).parameters)[1:]), "")
        clock.on_start.append(self.forget)

    def install(self) -> None:
        self._undo.append(override_forward(self.root, self._unless_off))
        if "compile" not in vars(self.root):
            self._undo.append(refuse_compile(self.root))

    def remove(self) -> None:
        """Puts every forward back as it was. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self.memory = Memory(self.branches())
        if self.forget in self.clock.on_start:
            self.clock.on_start.remove(self.forget)

    def _unless_off(self, original: Forward) -> Forward:
        acting = self._root(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if self.is_off else acting(*args, **kwargs)

        return forward

    @contextmanager
    def off(self) -> Iterator[None]:
        """A request inside is computed as without a cache, also in how branches are spread over ranks. Local: every
        rank enters it."""
        context = self.context
        before, (owners, led) = self.is_off, (context.owners, context.led)
        self.is_off, context.owners, context.led = True, None, None
        context.branch = context.place = context.number = 0
        context.leads, context.follows = True, False
        try:
            yield
        finally:
            self.is_off, context.owners, context.led = before, owners, led

    @abstractmethod
    def _root(self, original: Forward) -> Forward:
        """What stands for the denoiser's forward."""

    @contextmanager
    def request(self) -> Iterator[Memory]:
        """Calls inside keep what they keep for themselves; a request inside of another does not touch its."""
        before = (self.memory, self._in_request, self.context.owners)
        self.memory, self._in_request, self.context.owners = Memory(self.branches()), True, {}
        try:
            yield self.memory
        finally:
            self.memory.drop()
            self.memory, self._in_request, self.context.owners = before

    def forget(self) -> None:
        """Drops what is kept, as at the start of a loop over steps. Within a request, decisions stay on record."""
        kept, self.memory = self.memory, Memory(self.branches())
        self.context.owners = None if self.is_off else {}
        if self.context.led is not None:
            self.context.led.forget()
        if self._in_request:
            kept.drop()
            kept.told, kept.numbers = self.memory.told, {}
            self.memory = kept

    def forget_if_changed(self) -> None:
        """Drops what is kept where the module was changed between calls: adapters, attention processors. Every rank
        sees the same, also of calls that it does not make."""
        if self._made_of.have_other_objects():
            self._made_of = Parts(self.root)
            self.renew()

    def accept_changes(self) -> None:
        """What a call has changed itself (tables that it keeps) is no change."""
        if self._made_of.have_other_objects():
            self._made_of = Parts(self.root)

    def renew(self) -> None:
        """Looks anew at a module that was changed."""
        self.memory.drop()

    def rows_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """The samples of a call, as places in the whole batch."""
        if self.context.rows is not None:
            return self.context.rows
        return tuple(range(rows(self.sample_of(args, kwargs)) or 1))

    def sample_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call is to denoise: the first parameter."""
        return args[0] if args else kwargs.get(self._first)


class CallWatch(OnForward):
    """Tells a cache which branch and which step a call is: outermost, where every rank passes with every call."""

    def __init__(self, caching: Caching):
        super().__init__(caching.root)
        self._caching = caching

    def _forward(self, original: Forward) -> Forward:
        caching = self._caching
        clock, context = caching.clock, caching.context

        def forward(*args: Any, **kwargs: Any) -> Any:
            if caching.is_off:
                return original(*args, **kwargs)
            args, kwargs = settled(args), settled(kwargs)
            clock.look()
            caching.forget_if_changed()
            memory = caching.memory
            number = memory.told.of(args, kwargs)
            if not clock.counts:
                clock.step = memory.told.steps
            elif not clock.has_stepped and memory.told.steps >= MANY:
                clock.step = memory.told.steps  # it steps copies of its scheduler
            context.leads = memory.at((clock.loops, clock.step))
            context.branch, context.number = memory.branch(number), len(memory.calls)
            context.place, context.follows = memory.told.places[number], number != memory.told.leading
            memory.calls.append(context.branch)
            try:
                return original(*args, **kwargs)
            finally:
                caching.accept_changes()

        return forward
