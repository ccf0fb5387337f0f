"""Where weights are while they are not used: frozen, torch-free. Exact: the same weights compute the same.

Each method has a level: what comes to the device together, and leaves it together.
"""

# Users pass what they like, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from parafuse.errors import ConfigError
from parafuse.spelled import Spelled, chosen

CPU, DISK, RANKS, AUTO = "cpu", "disk", "ranks", "auto"
BLOCK, LEAF = "block", "leaf"
ENDING = ".weights"
"""Of the files that hold weights on a disk."""
CHANGED = f".changed{ENDING}"
"""Of those, in a folder of the user's, that hold what weights became after they were loaded, and go after use."""
PAGE = 4096
"""Bytes: what comes together begins at a multiple of it in a file."""


@dataclass(frozen=True)
class Offload(Spelled):
    """What all of them have in common."""

    what: ClassVar[str] = "offload"

    to: str = dataclasses.field(default=CPU, kw_only=True)
    """Where weights are meanwhile: cpu (the host's memory, pinned), disk, or ranks (of those that share a sequence
    each keeps a part on its device, and they come from all of them). Autoencoders stay whole then."""
    folder: str | None = dataclasses.field(default=None, kw_only=True)
    """For disk: where the files are, and stay for the next start. none: a folder of the user's in the system's
    temporary one, and no file in it outlives its use."""
    keep_originals: bool = dataclasses.field(default=False, kw_only=True)
    """For ranks: keeps the whole weights where they were loaded too, so that they are put back when it is taken off."""
    device: str = dataclasses.field(default=AUTO, kw_only=True)
    """What computes: cuda or cpu. auto: the device of the engine; with `apply` a GPU where there is one."""

    def __post_init__(self) -> None:
        self._check_word("to", (CPU, DISK, RANKS))
        self._check_switch("keep_originals")
        if self.keep_originals and self.to != RANKS:
            raise ConfigError(
                f"{self._named('keep_originals')}: is for weights that are cut between ranks, since others are "
                "put back always; give to=ranks too, or leave it out."
            )
        self._check_word("device", (AUTO, "cuda", "cpu"))
        if isinstance(self.folder, os.PathLike):
            object.__setattr__(self, "folder", os.fspath(self.folder))
        if self.folder is None:
            return
        if not isinstance(self.folder, str) or not self.folder or "," in self.folder:
            raise ConfigError(f"{self._named('folder')}: must be a path without commas.")
        if self.to != DISK:
            raise ConfigError(f"{self._named('folder')}: is for weights on a disk; give to=disk too, or leave it out.")

    @property
    def said(self) -> str:
        """In messages."""
        return f"offload={self.brief}"

    @property
    def is_fine(self) -> bool:
        """Whether single layers come and go, also inside of a block."""
        return False

    @property
    def ahead(self) -> int:
        """How many units come while one computes."""
        return 0

    def check_between(self, sequence_degree: int) -> None:
        """Raises ConfigError where the weights cannot be cut between so many ranks."""
        if self.to == RANKS and sequence_degree == 1:
            raise ConfigError(
                f"offload={self.brief}: to=ranks cuts weights between the ranks that share a sequence, which make the "
                "same calls, and here none do; give parallel.ulysses or parallel.ring of at least 2, or use to=cpu."
            )

    def check_on(self, device: str) -> None:
        """Raises ConfigError where it would do nothing on a device."""
        if device == "cpu" and self.to == CPU:
            raise ConfigError(
                f"offload={self.brief}: the device is the CPU, whose memory the weights are in already; use to=disk, "
                "or leave offload out."
            )


@dataclass(frozen=True)
class ModelOffload(Offload):
    """One component at a time: it comes when it is called, and leaves when the next one does or the request ends."""

    method: ClassVar[str] = "model"


@dataclass(frozen=True)
class GroupOffload(Offload):
    """Blocks (or leaves) come one after another, the next ones while one computes."""

    method: ClassVar[str] = "group"

    level: str = BLOCK
    """block: the repeated blocks of denoisers and text encoders. leaf: every layer."""
    prefetch: int = dataclasses.field(default=1, kw_only=True)
    """How many come while one computes: so many, and one, are on the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_word("level", (BLOCK, LEAF))
        self._check("prefetch", least=0)

    @property
    def is_fine(self) -> bool:
        return self.level == LEAF

    @property
    def ahead(self) -> int:
        return self.prefetch


@dataclass(frozen=True)
class SequentialOffload(Offload):
    """Every layer by itself, when it is called: least memory, and every copy is waited for."""

    method: ClassVar[str] = "sequential"

    @property
    def is_fine(self) -> bool:
        return True


METHODS: dict[str, type[Offload]] = {one.method: one for one in (ModelOffload, GroupOffload, SequentialOffload)}
ALLOWED = "a text such as 'model' or 'group:level=leaf', a method of parafuse.offload, or None"


def offload_of(value: Any) -> Offload | None:
    """The offload that a text names, or the value itself. Raises ConfigError with what is allowed."""
    return None if value is None else chosen("offload", value, METHODS, ALLOWED)


def settled_on(method: Offload | None, device: str) -> Offload | None:
    """The same with the device of a plan. Raises ConfigError where another one is asked for, or where it would do
    nothing there."""
    if method is None:
        return None
    if method.device not in (AUTO, device):
        raise ConfigError(
            f"offload={method.brief}: device={method.device}: the plan is for {device!r}; give Config(device=...) the "
            "same, or leave it out of offload."
        )
    method.check_on(device)
    return dataclasses.replace(method, device=device)
