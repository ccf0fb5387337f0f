"""A placement on a pipeline: each weight goes to its home. What is on another device runs there, and what is on the
host or a disk comes to the main device when it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parafuse.engine.offload.component import RootCalls, UnitCalls
from parafuse.engine.offload.pipeline import OffloadedDenoiser, OffloadedOther, Offloading, modules_in
from parafuse.engine.offload.units import blocks_of, groups_of
from parafuse.engine.placement.homes import home_in
from parafuse.engine.targets import DECODERS, DENOISERS
from parafuse.errors import ConfigError
from parafuse.log import note
from parafuse.parallel.homes import MixedHome
from parafuse.parallel.hooks import Forward, override, override_forward
from parafuse.parallel.hops import Hop, Hops
from parafuse.parallel.residence import Group, Residence
from parafuse.placement import CPU, DISK, PlacedWeights

METHODS = ("forward", "encode", "decode")
"""Of components, by which pipelines call them."""


class Placing(Offloading):
    """The placement of one pipeline, or of several that share components."""

    method: PlacedWeights

    def __init__(self, method: PlacedWeights, devices: Callable[[str], torch.device], target: Any):
        """`devices`: of "0" and other numbers, the device of this rank."""
        super().__init__(method, devices("0"), target)
        self.homes, self._devices = dict(method.homes), devices
        self._stay = frozenset()
        self._targets: list[tuple[Any, Any, list[Any]]] = []
        """(user, its pipeline, what that consists of)."""
        self._moved: dict[nn.Module, list[tuple[Tensor, torch.device]]] = {}
        self._marked: dict[int, tuple[Any, bool, Any]] = {}
        """By identity: what has a `hf_device_map`, whether it had one, and which."""

    @classmethod
    def of(cls, method: PlacedWeights, target: Any) -> Placing:
        """With the devices from the current one on, or the CPU."""
        first = torch.cuda.current_device() if method.device == "cuda" else 0

        def device(number: str) -> torch.device:
            return torch.device("cuda", first + int(number)) if method.device == "cuda" else torch.device("cpu")

        return cls(method, device, target)

    # what is where

    def home(self, component: str, path: str = "") -> str:
        """Of a module or weight of a component; what the map does not know of, such as a component that has come
        later, is on the main device."""
        name = component.partition(" ")[0]
        if name not in self.homes and "" not in self.homes:
            return "0"
        return home_in(self.homes, f"{name}.{path}" if path else name) or "0"

    def is_away(self, home: str) -> bool:
        """Whether weights come and go; on the CPU, those of the host stay where they are."""
        return home == DISK or (home == CPU and self.device.type != "cpu")

    def device_of(self, home: str) -> torch.device:
        """Where something with this home computes."""
        return self._devices(home) if home.isdigit() else self.device

    def places(self, name: str, module: nn.Module) -> dict[str, str]:
        """Path of each module of a component that is elsewhere than all around it -> its home."""
        known = f"{name.partition(' ')[0]}."
        found = {path.removeprefix(known): home for path, home in self.homes.items() if path.startswith(known)}
        there = dict(module.named_modules())
        return {path: home for path, home in found.items() if path in there}

    def _is_spread(self, name: str, module: nn.Module) -> bool:
        """Whether anything has to be brought anywhere."""
        homes = {self.home(name), *self.places(name, module).values()}
        return any(self.is_away(home) or self.device_of(home) != self.device for home in homes)

    # putting on

    def denoiser(self, name: str, module: nn.Module) -> OffloadedDenoiser | None:
        self._settle(name, module)
        if not self._is_spread(name, module):
            return None
        return PlacedDenoiser(self, name, module, self._residence(name, module, partial(self.units, name, module)))

    def _other(self, name: str, module: nn.Module) -> OffloadedOther:
        return PlacedOther(self, name, module, self._residence(name, module, partial(self.units, name, module)))

    def units(self, name: str, module: nn.Module) -> list[nn.Module]:
        """Modules that come by themselves when they are called: blocks, and what the map names; of those in each other
        the inner ones."""
        paths = {part: path for path, part in module.named_modules()}
        kind = name.partition(" ")[0]
        blocks = [] if kind in DECODERS else blocks_of(module, is_denoiser=kind in DENOISERS)
        named = [part for path in self.places(name, module) if has_forward(part := module.get_submodule(path))]
        found = [one for one in dict.fromkeys((*blocks, *named)) if self.is_away(self.home(name, paths[one]))]
        return [one for one in found if not any(other in found for other in one.modules() if other is not one)]

    def _wanted(self, target: Any, standing: list[nn.Module]) -> dict[nn.Module, str]:
        found = super()._wanted(target, standing)
        return {module: name for module, name in found.items() if self._is_spread(name, module)}

    def _residence(self, name: str, module: nn.Module, modules: Callable[[], list[nn.Module]]) -> Residence:
        groups = _Groups(self, name, module, modules)
        homes = {where: self.store(where) for where in ((CPU,) if self.method.folder is None else (CPU, DISK))}
        return _PlacedResidence(
            module,
            groups,
            MixedHome(homes, lambda: groups.kinds),
            self.device,
            self.carrier(),
            self.ledger,
            self.turn,
            prefetch=self.method.ahead,
            buffers=lambda: (x for path, x in module.named_buffers() if self.is_away(self.home(name, path))),
        )

    def _settle(self, name: str, module: nn.Module) -> None:
        """Moves what is to stay on a device there."""
        if module in self._moved:
            return
        before = self._moved[module] = list[tuple[Tensor, torch.device]]()
        for path, x in (*module.named_parameters(), *module.named_buffers()):
            home = self.home(name, path)
            if not self.is_away(home) and x.device != self.device_of(home):
                before.append((x, x.device))
                self.send(x, self.device_of(home))

    def send(self, x: Tensor, device: torch.device) -> None:
        """A weight, to stay there. One that wraps others (in 8 bits) stays the object that it is."""
        if type(x) in (Tensor, nn.Parameter):
            x.data = x.data.to(device)
        else:
            torch.utils.swap_tensors(x, nn.Parameter(x.detach().to(device), requires_grad=x.requires_grad))

    def hop(self, device: torch.device) -> Hop:
        return Hop(device)

    def put_on(self, user: Any, target: Any, standing: list[nn.Module]) -> None:
        parts = modules_in(target)
        for name, module in parts:
            self._settle(name, module)
        super().put_on(user, target, standing)
        self._targets = [one for one in self._targets if one[0] is not user]
        self._targets.append((user, target, [target, *(module for _, module in parts)]))
        self._forget_others()
        self._mark(target)

    def leave(self, user: Any) -> None:
        super().leave(user)
        self._targets = [one for one in self._targets if one[0] is not user]
        self._forget_others()

    def _forget_others(self) -> None:
        """What no target has any more is as it was: weights that were moved, and marks."""
        there = [one for _, _, owners in self._targets for one in owners]
        for module in [one for one in self._moved if not any(one is other for other in there)]:
            for x, device in self._moved.pop(module):
                self.send(x, device)
        for key, (owner, had, before) in list(self._marked.items()):
            if not any(owner is other for other in there):
                del self._marked[key]
                vars(owner).pop("hf_device_map", None)
                if had:
                    owner.hf_device_map = before

    # as the ecosystem expects it

    def _mark(self, target: Any) -> None:
        """Writes `hf_device_map` on the components and on the pipeline."""
        whole: dict[str, Any] = {}
        for name, module in modules_in(target):
            inner = {"": self._shown(self.home(name))}
            inner |= {path: self._shown(home) for path, home in self.places(name, module).items()}
            whole |= {f"{name}.{path}" if path else name: home for path, home in inner.items()}
            self._write(module, inner)
        if not isinstance(target, nn.Module):
            self._write(target, whole)

    def _shown(self, home: str) -> int | str:
        if not home.isdigit():
            return home
        device = self._devices(home)
        return device.type if device.index is None else device.index

    def _write(self, owner: Any, homes: dict[str, Any]) -> None:
        state = vars(owner)
        self._marked.setdefault(id(owner), (owner, "hf_device_map" in state, state.get("hf_device_map")))
        owner.hf_device_map = homes

    def on_pipeline(self, pipeline: Any) -> list[Callable[[], None]]:
        undo = super().on_pipeline(pipeline)

        def take_off() -> None:
            while undo:
                undo[-1]()
                undo.pop()

        def reset() -> None:
            user = next(user for user, target, _ in self._targets if target is pipeline)
            if len(self._targets) > 1:
                raise ConfigError(
                    "reset_device_map: another pipeline has the same components, placed; close its engine first."
                )
            take_off()
            user.unplace(lambda: [module.to("cpu") for _, module in modules_in(pipeline)])
            note("the placement was taken off: all weights are in the host's memory; .to(device) moves them")

        if callable(getattr(pipeline, "reset_device_map", None)):
            undo.append(override(pipeline, "reset_device_map", reset))
        return [take_off]

    def lines(self, user: Any) -> list[str]:
        if not any(one is user for one, _, _ in self._targets):
            return []
        homes = sorted(set(self.homes.values()))
        names = ", ".join(f"device {home}" if home.isdigit() else home for home in homes)
        return [f"placement: weights on {names}", *super().lines(user)]


class _PlacedResidence(Residence):
    """What is taken off stays in the host's memory: a device may have no room for it."""

    def settle(self) -> None:
        super().settle()
        self._was = torch.device("cpu")


class _Groups:
    """Of a component: what comes together, without what stays on a device; and where each is at home."""

    def __init__(self, placing: Placing, name: str, module: nn.Module, modules: Callable[[], list[nn.Module]]):
        self._placing, self._name, self._module, self._modules = placing, name, module, modules
        self.kinds: list[str] = []

    def __call__(self) -> list[Group]:
        homes: dict[int, set[str]] = {}
        for path, x in self._module.named_parameters(remove_duplicate=False):
            homes.setdefault(id(x), set()).add(self._placing.home(self._name, path))
        goes = {key for key, own in homes.items() if all(map(self._placing.is_away, own))}
        found = groups_of(self._module, self._modules())
        for group in found:
            group.weights = [x for x in group.weights if id(x) in goes]
        found = [group for group in found if group.weights]
        self.kinds = [min(min(homes[id(x)]) for x in group.weights) for group in found]
        return found


def has_forward(module: nn.Module) -> bool:
    """Whether it is called, as a list of modules is not."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _hops(placing: Placing, name: str, module: nn.Module) -> dict[nn.Module, Hop]:
    """The modules of a component that run elsewhere than what calls them."""
    main = placing.device_of(placing.home(name))
    parts = dict(module.named_modules())
    found: dict[nn.Module, Hop] = {}
    for path, home in placing.places(name, module).items():
        around = placing.device_of(placing.home(name, path.rpartition(".")[0]))
        if has_forward(parts[path]) and placing.device_of(home) != around:
            found[parts[path]] = placing.hop(placing.device_of(home))
    return {module: placing.hop(main), **found} if main != placing.device or found else {}


class _Bringing:
    """Parts that are called by themselves get what they are given where they are: pre-hooks, for all modules with
    weights that are in no block."""

    def __init__(self, placing: Placing, name: str, module: nn.Module, quiet: Iterable[nn.Module]):
        self._placing, self._name, self._module = placing, name, module
        self._quiet = {part for one in quiet for part in one.modules()}
        self._handles: list[Any] = []

    def install(self) -> None:
        for path, part in self._module.named_modules():
            device = self._placing.device_of(self._placing.home(self._name, path))
            if part._parameters and part not in self._quiet and device != self._placing.device:
                self._handles.append(part.register_forward_pre_hook(self._placing.hop(device).bring, with_kwargs=True))

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


class _Units:
    """Of a denoiser: units that come, and outside of that, modules that run on another device."""

    def __init__(self, residence: Residence, hops: dict[nn.Module, Hop]):
        self._coming, self._hops = UnitCalls(residence), hops
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        self._coming.install()
        for module, hop in self._hops.items():
            self._undo.append(override_forward(module, hop.around))
            vars(module)["forward"].parafuse_weights = True

    def remove(self) -> None:
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self._coming.remove()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Inside, these modules are as their classes have them, with nothing around but this."""
        with self._coming.bare():
            before = {module: vars(module).get("forward") for module in self._hops}
            for module, hop in self._hops.items():
                vars(module)["forward"] = hop.around(before[module] or type(module).forward.__get__(module))
            try:
                yield
            finally:
                for module, forward in before.items():
                    vars(module).pop("forward")
                    if forward is not None:
                        vars(module)["forward"] = forward


class _HoppingRoot(RootCalls):
    def __init__(self, residence: Residence, hop: Hop | None):
        super().__init__(residence, checks=False)
        self._hop = hop

    def _forward(self, original: Forward) -> Forward:
        inside = super()._forward(original)
        return self._hop.around(inside) if self._hop is not None else inside


class PlacedDenoiser(OffloadedDenoiser):
    """A denoiser, whose parts are put on by what stands on it."""

    def __init__(self, placing: Placing, name: str, module: nn.Module, residence: Residence):
        super().__init__(name, module, placing.method, residence)
        hops = _hops(placing, name, module)
        self.calls = _HoppingRoot(residence, hops.pop(module, None))
        self.units: Any = _Units(residence, hops)
        self._bringing = _Bringing(placing, name, module, self.blocks)

    def install(self) -> None:
        super().install()
        self._undo.append(self._bringing.remove)
        self._bringing.install()


class PlacedOther(OffloadedOther):
    """A component that nothing else is put on: text encoder, VAE, ControlNet."""

    def __init__(self, placing: Placing, name: str, module: nn.Module, residence: Residence):
        super().__init__(name, module, placing.method, residence)
        self._on = [Hops(part, METHODS if part is module else ("forward",), hop)
                    for part, hop in _hops(placing, name, module).items()]  # fmt: skip
        self._on += [_Bringing(placing, name, module, ())]

    def install(self) -> None:
        super().install()
        for one in self._on:
            self._undo.append(one.remove)
            one.install()
