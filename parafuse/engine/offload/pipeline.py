"""Offload of a pipeline: its components take turns on the device, and go home when a request ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from parafuse.engine.extras import Extras
from parafuse.engine.following import is_manager, managed
from parafuse.engine.members import OFFLOADS, beside_offload
from parafuse.engine.offload.component import OffloadedComponent, RootCalls, Summons, UnitCalls
from parafuse.engine.offload.units import blocks_of, groups_of, modules_of
from parafuse.engine.state import components_of
from parafuse.engine.targets import AUTOENCODERS, DECODERS, DENOISERS
from parafuse.errors import ConfigError
from parafuse.offload import AUTO, CPU, RANKS, Offload, offload_of
from parafuse.parallel.carry import Carrier, Ledger, carrier_for
from parafuse.parallel.encoding import TextEncoder
from parafuse.parallel.homes import DiskHome, Home, HostHome
from parafuse.parallel.hooks import override
from parafuse.parallel.mesh import Mesh, beside
from parafuse.parallel.packed import has_values
from parafuse.parallel.ranks_home import RanksHome
from parafuse.parallel.residence import Residence, Turn
from parafuse.placement import PlacedWeights

READS = ("save_pretrained", "push_to_hub", "save_lora_weights")
CHANGES = (
    "load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora", "delete_adapters", "load_ip_adapter",
    "unload_ip_adapter", "load_textual_inversion", "unload_textual_inversion", "fuse_qkv_projections",
    "unfuse_qkv_projections",
)  # fmt: skip
"""Methods of pipelines that look into components, or change what is in them."""


def device_for(asked: Offload | str | None, found: str) -> str:
    """cuda or cpu: what computes, where the weights are on `found` now."""
    method = offload_of(asked)
    if method is None or method.device == AUTO:
        return "cuda" if method is not None and torch.cuda.is_available() else found
    return method.device


WEIGHTS = "weights"
"""The name of what is sent of weights that are cut between ranks."""


class OffloadedDenoiser(OffloadedComponent):
    """A denoiser, whose parts are put on by what stands on it (`Standing`), each in its place."""

    def __init__(self, name: str, module: nn.Module, method: Offload, residence: Residence):
        super().__init__(name, module, method, residence)
        self.units = UnitCalls(residence)
        self.calls = RootCalls(residence, checks=method.is_fine)
        self.blocks = blocks_of(module, is_denoiser=True)
        self.summons = Summons(residence, enters=False, quiet=self.blocks)

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Around calls of the model as its classes have it."""
        with self.units.bare():
            yield


class OffloadedOther(OffloadedComponent):
    """A component that parafuse puts nothing else on: text encoder, VAE, ControlNet."""

    def __init__(self, name: str, module: nn.Module, method: Offload, residence: Residence):
        super().__init__(name, module, method, residence)
        self._summons = Summons(residence, enters=True)
        self.users: list[Any] = []

    def install(self) -> None:
        super().install()
        self._summons.install()
        self._undo.append(self._summons.remove)


class Offloading:
    """The offload of one pipeline, or of several that share components."""

    def __init__(self, method: Offload, device: torch.device, target: Any, ranks: ProcessGroup | None = None):
        """`ranks`: between which weights are cut."""
        self.method, self.device, self.ranks = method, device, ranks
        self.ledger, self.turn = Ledger(), Turn()
        self._order = _order_of(target)
        self._stay = frozenset[str](getattr(target, "_exclude_from_cpu_offload", None) or ())
        if method.to == RANKS:
            self._stay |= frozenset(AUTOENCODERS)  # of which ranks make other calls than one another
        self._others: dict[nn.Module, OffloadedOther] = {}

    def denoiser(self, name: str, module: nn.Module) -> OffloadedDenoiser | None:
        """Of a component on which something else stands; None where its weights stay."""
        modules = partial(modules_of, module, self.method, is_denoiser=True, is_decoder=False)
        return OffloadedDenoiser(name, module, self.method, self._residence(name, module, modules))

    def _other(self, name: str, module: nn.Module) -> OffloadedOther:
        kind = dict(is_denoiser=name in DENOISERS, is_decoder=name in DECODERS)
        modules = partial(modules_of, module, self.method, **kind)
        return OffloadedOther(name, module, self.method, self._residence(name, module, modules))

    def store(self, where: str) -> Home:
        """A new home on the host, on a disk, or between ranks."""
        if self.ranks is not None:
            return RanksHome(self.ranks, self.device, keep_originals=self.method.keep_originals)
        return HostHome(pinned=self.device.type == "cuda") if where == CPU else DiskHome(self.method.folder)

    def carrier(self) -> Carrier:
        """What brings the weights of one component."""
        return carrier_for(self.device)

    def _residence(self, name: str, module: nn.Module, modules: Callable[[], list[nn.Module]]) -> Residence:
        method = self.method
        return Residence(
            module,
            lambda: groups_of(module, modules()),
            self.store(method.to),
            self.device,
            self.carrier(),
            self.ledger,
            self.turn,
            prefetch=method.ahead,
            in_order=not self._order or name.partition(" ")[0] in self._order,
        )

    def keep_here(self, module: nn.Module) -> None:
        """Of a component whose weights stay."""
        module.to(self.device)

    def _wanted(self, target: Any, standing: list[nn.Module]) -> dict[nn.Module, str]:
        """What is offloaded of a target, beside what somebody else sees to."""
        return {
            module: name
            for name, module in modules_in(target)
            if name not in self._stay
            and not any(module is one for one in standing)
            and any(True for _ in module.parameters())
        }

    def put_on(self, user: Any, target: Any, standing: list[nn.Module]) -> None:
        """Offloads the components of a target that nothing else stands on, and lets go of those that it has no more.
        Local. `standing`: those that somebody else sees to."""
        for name, module in modules_in(target):
            if name in self._stay:
                self.keep_here(module)
        wanted = self._wanted(target, standing)
        for module in [one for one, other in self._others.items() if user in other.users and one not in wanted]:
            self._let_go(user, module)
        for module, name in wanted.items():
            if module not in self._others:
                other = self._other(name, module)
                other.offloading = self
                try:
                    other.install()
                except BaseException:
                    other.remove()
                    raise
                self._others[module] = other
            if user not in self._others[module].users:
                self._others[module].users.append(user)

    def only_for(self, encoder: TextEncoder) -> None:
        """Lets weights of a text encoder come where and when it computes: not for what another rank sends, or what was
        kept."""
        other = self._others.get(encoder.module)
        if other is None:  # its weights stay where they are
            return
        residence = other.residence
        if encoder.forget not in residence.on_renewed:
            residence.on_renewed.append(encoder.forget)
        residence.awake, encoder.around = lambda: encoder.inside, residence.call

    def covers(self, user: Any, target: Any, standing: list[nn.Module]) -> bool:
        """Whether it is on all that `put_on` would put it on."""
        there = self._wanted(target, standing)
        return there.keys() == {one for one, other in self._others.items() if user in other.users}

    def others(self, user: Any) -> list[OffloadedOther]:
        """What nobody else uses."""
        return [other for other in self._others.values() if other.users == [user]]

    def leave(self, user: Any) -> None:
        """Puts back what nobody else uses."""
        for module in [one for one, other in self._others.items() if user in other.users]:
            self._let_go(user, module)

    def _let_go(self, user: Any, module: nn.Module) -> None:
        other = self._others[module]
        if other.users == [user]:
            other.remove()
            del self._others[module]
        other.users.remove(user)

    def on_pipeline(self, pipeline: Any) -> list[Callable[[], None]]:
        """Meets the methods of a pipeline that read or change weights, and the end of its calls; the returned functions
        undo that."""
        if isinstance(pipeline, nn.Module) or is_manager(pipeline):
            return []
        there = [name for name in (*READS, *CHANGES, *OFFLOADS) if callable(getattr(pipeline, name, None))]
        undo = [override(pipeline, name, self._instead(name, getattr(pipeline, name))) for name in there]
        if callable(getattr(pipeline, "maybe_free_model_hooks", None)):
            undo.append(override(pipeline, "maybe_free_model_hooks", self._freed(pipeline.maybe_free_model_hooks)))
        return undo

    def _instead(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for a method of the pipeline."""

        def at_home(*args: Any, **kwargs: Any) -> Any:
            with self.turn.at_home(changes=name in CHANGES):
                return original(*args, **kwargs)

        def refused(*_: Any, **__: Any) -> None:
            raise ConfigError(f"{name}: {beside_offload(name, self.method)}.")

        return refused if name in OFFLOADS else at_home

    def _freed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def freed() -> Any:
            result = original()
            self.turn.send_away()
            return result

        return freed

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts anew; at its end all weights are home."""
        self.ledger.begin()
        try:
            yield
        finally:
            self.turn.send_away()

    def lines(self, user: Any) -> list[str]:
        """For receipts: the components that nothing else stands on."""
        return [line_of(other) for other in self._others.values() if user in other.users]


def offloading(extras: Extras, target: Any, mesh: Mesh | None, timeout_s: float) -> Offloading | None:
    """What offloads a target, where that is asked for. Collective on the ranks that share a sequence where their memory
    is to be the home."""
    if extras.offload is None:
        return None
    if not all(has_values(x) for _, module in modules_in(target) for x in module.parameters()):
        from parafuse.engine.memory.away import counted

        return counted(extras.offload, target, mesh.sequence_degree if mesh is not None else 1)
    if isinstance(extras.offload, PlacedWeights):
        from parafuse.engine.placement.put_on import Placing

        return Placing.of(extras.offload, target)
    on_gpu = extras.offload.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    ranks = beside(mesh, timeout_s) if extras.offload.to == RANKS and mesh is not None else None
    return Offloading(extras.offload, device, target, ranks)


def offload_on(target: Any) -> list[Offloading]:
    """What offloads components of a target already, for another pipeline that has them too."""
    found = [getattr(vars(module).get("to"), "parafuse_offloading", None) for _, module in modules_in(target)]
    return list({id(one): one for one in found if one is not None}.values())


def shared_offloading(extras: Extras, target: Any) -> Offloading | None:
    """What stands already, to be used by this target too; None where there is none, or none is asked for. Raises
    ConfigError where that offloads in another way."""
    there = offload_on(target)
    if not there or extras.offload is None:
        return None
    if len(there) > 1 or there[0].method != extras.offload:
        said = " and ".join(sorted({repr(one.method.brief) for one in there}))
        raise ConfigError(
            f"offload={extras.offload.brief!r}: components of this pipeline belong to others too, which have {said} on "
            "them" + (", each for itself" if len(there) > 1 else "") + "; give all the same, or take those off first "
            "(remove(), or close() of an engine)."
        )
    return there[0]


def line_of(one: OffloadedComponent) -> str:
    units = one.residence.units
    total, streamed = sum(unit.image.nbytes for unit in units), sum(not unit.stays for unit in units)
    how = f"{streamed} units one by one" if streamed else "as a whole"
    home = one.residence.home
    part = f", {home.nbytes / 1e6:.1f} MB of it here" if isinstance(home, RanksHome) else ""
    return f"offload {one.method.brief} on {one.name}: {total / 1e6:.1f} MB{part}, {how}"


def modules_in(target: Any) -> list[tuple[str, nn.Module]]:
    """(name, component) of a pipeline or a manager, or the module itself."""
    if isinstance(target, nn.Module):
        return [(type(target).__name__, target)]
    found = managed(target) if is_manager(target) else list(components_of(target).items())
    return [(name, part) for name, part in found if isinstance(part, nn.Module)]


def _order_of(target: Any) -> frozenset[str]:
    """The components that take turns, as the pipeline says; those that it does not name are called beside them."""
    said: Any = getattr(target, "model_cpu_offload_seq", None)
    return frozenset(said.split("->")) if isinstance(said, str) else frozenset()
