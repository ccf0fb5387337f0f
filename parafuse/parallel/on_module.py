"""What stands on a method of one module and learns how its calls are shared: put on, taken off, told of changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import nn

from parafuse.parallel.effects import Parts


class OnModule(ABC):
    """Counts what its calls did, and forgets what it learned when the module is another."""

    WORDS: ClassVar[Mapping[str, str]]
    """Kind of call -> how a report says how many there were."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.seen: Counter[str] = Counter()
        """Calls by kind."""
        self._parts = Parts(module)
        self._undo: Callable[[], None] | None = None

    def remove(self) -> None:
        """Puts the method back as it was. No communication."""
        if self._undo:
            self._undo()
            self._undo = None

    def has_changed(self) -> bool:
        """Whether the module is no longer what it was; some milliseconds for a large one."""
        return self._parts.have_changed()

    def forget_if(self, changed: bool) -> None:
        """Learns the module anew where it was changed."""
        if changed:
            self._parts = Parts(self.module)
            self._forget()

    @abstractmethod
    def _forget(self) -> None:
        """Drops all that was learned."""

    def report(self, before: Counter[str] | None = None) -> str:
        """One line on the calls since `before`; empty without any."""
        seen = self.seen - (before or Counter())
        return ", ".join(text.format(seen[name]) for name, text in self.WORDS.items() if seen[name])
