"""`apply`: what a config asks for, put on a model the user already has, and taken off again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import nn

from parafuse.cache import Cache
from parafuse.config import Axis, Config, Parallel
from parafuse.engine.caches.caching import Caching
from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.memory import Memory
from parafuse.engine.devices import remove_offload
from parafuse.engine.extras import Extras
from parafuse.engine.following import Component, follow
from parafuse.engine.host_times import host_times
from parafuse.engine.offload.pipeline import WEIGHTS, Offloading, device_for, offloading, shared_offloading
from parafuse.engine.placement.settle import placed_on
from parafuse.engine.plan_store import key_for
from parafuse.engine.quantize.put_on import Quantized, asked_of, checked, existing, quantize
from parafuse.engine.quantize.report import lines
from parafuse.engine.rewrites.choose import STEPWISE
from parafuse.engine.standing import Standing, standing_on
from parafuse.engine.suitability import asked_for, check_component, check_target, extras_for, whole
from parafuse.engine.targets import DECODE, DENOISERS, Wanted, denoisers, device_of, wanted_of, weighty
from parafuse.engine.vae.choice import DECODING, Spread, never
from parafuse.engine.video import SparseVideo
from parafuse.errors import ConfigError
from parafuse.kernels.attention import Choice
from parafuse.log import note
from parafuse.parallel.block_plan import BlockPlan
from parafuse.parallel.comm import Count, counters, since
from parafuse.parallel.compiled import Regional
from parafuse.parallel.data import DataParallel
from parafuse.parallel.encoding import TextEncoder
from parafuse.parallel.guidance import GuidanceParallel, Rounds
from parafuse.parallel.mesh import Mesh, hold, make_mesh, release
from parafuse.parallel.sequence import SequenceParallel
from parafuse.parallel.world import ensure_world
from parafuse.quantization import Quantize


@dataclass
class Handle:
    """What was applied. `remove()` puts the model back bit for bit; also a context manager."""

    applied: list[str] = field(default_factory=list[str])
    """One line per thing that was applied, for receipts; empty when nothing was."""
    mesh: Mesh | None = None
    guidance: dict[str, GuidanceParallel] = field(default_factory=dict[str, GuidanceParallel])
    """Component -> its guidance branches."""
    data: dict[str, DataParallel] = field(default_factory=dict[str, DataParallel])
    """Component -> its batch over replicas."""
    sequence: dict[str, SequenceParallel] = field(default_factory=dict[str, SequenceParallel])
    """Component -> its split block stack."""
    extras: Extras = field(default_factory=Extras)
    """What is put on the denoisers beside the layout; a cache on those that can have it."""
    skipping: dict[str, Caching] = field(default_factory=dict[str, Caching])
    """Component -> its cache."""
    quantize: Quantize | None = None
    """What the denoisers, and text encoders if it says so, are quantized with."""
    quantized: dict[str, Quantized] = field(default_factory=dict[str, Quantized])
    """Component -> what was done to its layers."""
    compiled: dict[str, Regional] = field(default_factory=dict[str, Regional])
    """Component -> its compiled blocks."""
    offloading: Offloading | None = None
    """Where weights are while they are not used."""
    _replaced: list[Quantized] = field(default_factory=list[Quantized])
    """Of components that are others by now."""
    rounds: Rounds = field(default_factory=Rounds)
    clock: Clock = field(default_factory=Clock)
    """The step that a call belongs to, for caches."""
    target: Any = None
    _on: list[tuple[str, Standing]] = field(default_factory=list[tuple[str, Standing]])
    """By name: what it uses. Other handles may use it as well."""
    _stuck: list[Standing] = field(default_factory=list[Standing])
    """On components that were replaced while another library stood on them."""
    skips_cache: bool = False
    """Requests that begin now are computed as without the cache. The same on every rank."""
    _is_inside: Callable[[], bool] | None = None
    _together: Callable[[], bool] = never
    """Whether all ranks make the call that is made now."""
    _undo: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    _is_off: bool = False
    _before: dict[str, Count] = field(default_factory=dict[str, Count])
    """What had gone over the groups before: torch gives two meshes of the same ranks the same groups."""

    def __post_init__(self) -> None:
        self._count_from_here()

    def use(self, offloading: Offloading | None) -> None:
        """What moves its weights. What was sent before is not told."""
        self.offloading = offloading
        self._count_from_here()

    def _count_from_here(self) -> None:
        self._before = {name: replace(count) for name, count in self._counts().items()}

    def remove(self, *, quietly: bool = False) -> None:
        """Takes everything off, in reverse order, but for what another handle uses. Local; a second call does
        nothing. `quietly`: without a word on weights that stay quantized, or cut between ranks."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        cut = [] if quietly else self._cut()
        self._let_go()
        if cut:
            note(
                f"{', '.join(cut)}: stays without weights, of which this rank has a part (offload: keep_originals=true "
                "keeps all); load the model again for these."
            )
        self._put_weights_back(quietly=quietly)
        self._tell()
        self.clock.drop(self.target)
        if self.mesh is not None and not self._is_off:
            release(self.mesh)
        self._is_off = True

    def _cut(self) -> list[str]:
        """Components whose weights this rank cannot put back by itself."""
        weights = [one.weights for _, one in self._on if one.users == [self]]
        weights += self.offloading.others(self) if self.offloading is not None else []
        return [one.name for one in weights if one is not None and not one.residence.home.keeps_all]

    def _let_go(self) -> None:
        if self.offloading is not None:
            self.offloading.leave(self)  # what it has on components stands outside of all else
        while self._on or self._stuck:
            (self._stuck or [one for _, one in self._on])[-1].leave(self)
            (self._stuck or self._on).pop()

    def unplace(self, then: Callable[[], None]) -> None:
        """Takes off where weights are, does `then`, and puts on all else again. Local."""
        self._let_go()
        self.offloading, self.extras = None, replace(self.extras, offload=None)
        then()
        if self.mesh is not None:
            self.put_on(self._wanted(self.target, self.mesh))

    def quantize_weights(self, target: Any, arriving: Sequence[Component] = ()) -> None:
        """Quantizes what is to be and is not yet, and sees what is already. Local. Raises ConfigError before anything
        is changed."""
        parts, encoders = weighty(target, arriving)
        done = existing([*parts, *encoders])
        if self.quantize is not None:
            asked = asked_of(parts, encoders, self.quantize, required=False)
            found = quantize(asked, self.quantize, device=self.offloading.device if self.offloading else None)
            done |= {one.choice.component: one for one in found}
        self.keep_quantized(done.values())

    def keep_quantized(self, done: Iterable[Quantized]) -> None:
        """What was done, for receipts and `remove`. The first word on a component counts, as long as that stays."""
        for one in done:
            name = one.choice.component
            known = self.quantized.get(name)
            if known is None or known.model is not one.model:
                self._replaced += [known] if known is not None else []
                self.quantized[name] = one
        self._tell()

    def _put_weights_back(self, *, quietly: bool) -> None:
        both = [*self._replaced, *self.quantized.values()]
        left = [one.choice.component for one in both if one.choice.layers and one.undo is None]
        for one in both:
            if one.undo is not None:
                one.undo()
        self._replaced.clear()
        if left and not quietly:
            note(
                f"{', '.join(left)}: stays quantized: the original weights are not kept (keep_originals=true keeps "
                "them); load the model again for these."
            )
        self.quantized.clear()

    def put_on(self, wanted: list[Wanted]) -> None:
        """Puts on what is wanted and not on yet, and lets go of what is wanted no more. Local."""
        mesh = self.mesh
        if mesh is None:
            return
        kept: list[tuple[str, Standing]] = []
        extras = extras_for(self.extras, wanted, self.target, mesh.num_ranks)
        for name, module, method in wanted:
            one = standing_on(module, method)
            if one is None:
                one = Standing(module, method, mesh, extras[module, method], name=name, offloading=self.offloading)
                one.install(self.rounds, self.clock)
            if not any(one is other for _, other in self._on):
                self._on.append((name, one))
                one.users.append(self)
                one.agree(self._together)
                if self._is_inside:
                    one.guard(self, self._is_inside)
            if not any(one is other for _, other in kept):
                kept.append((name, one))
        for _, one in self._on:
            if not any(one is other for _, other in kept):
                try:
                    one.leave(self)
                except RuntimeError:  # another library stands on it: kept for remove()
                    self._stuck.append(one)
        self._on[:] = kept
        if self.offloading is not None:
            self.offloading.put_on(self, self.target, whole(wanted))
            for one in self.encoders().values():
                self.offloading.only_for(one)
        self._tell()

    def follow(self, target: Any) -> None:
        """Puts it on what a modular pipeline or a manager gets later, and takes it off what leaves."""
        self._undo += follow(target, lambda arriving: self.renew(target, arriving))

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Inside, offloaded weights are in the host's memory, to be read and written by hand; elsewhere what stands for
        them is no number, and refuses to be written. Local."""
        with self.offloading.turn.at_home() if self.offloading else nullcontext():
            yield

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, weights are as a pipeline loads them: rewrites that change them are off. Local."""
        changes = any(one.rewrites for _, one in self._on)
        with self.offloading.turn.at_home(changes=changes) if self.offloading else nullcontext(), ExitStack() as off:
            for _, one in self._on:
                for rewrite in one.rewrites:
                    off.enter_context(rewrite.set_aside())
            yield

    def _tell(self) -> None:
        """What stands on what, by name."""
        self.sequence = {name: one.sequence for name, one in self._on if one.sequence}
        self.data = {name: one.data for name, one in self._on if one.data}
        self.guidance = {name: one.guidance for name, one in self._on if one.guidance}
        self.skipping = {name: one.skipping for name, one in self._on if one.skipping}
        self.compiled = {name: one.regional for name, one in self._on if one.regional}
        self.applied[:] = [
            *lines(self.quantized.values()),
            *(line for name, one in self._on for line in one.lines(name)),
            *(self.offloading.lines(self) if self.offloading else ()),
        ]

    @property
    def is_off(self) -> bool:
        """Whether it was taken off."""
        return self._is_off

    def stands_on(self, target: Any) -> bool:
        """Whether all that it would be put on now, it is on: not so where a component was replaced. What was taken off
        stays off."""
        if self._is_off or any(
            getattr(target, name, one.model) is not one.model for name, one in self.quantized.items()
        ):
            return self._is_off
        wanted = [] if self.mesh is None else self._wanted(target, self.mesh)
        if self.offloading is not None and not self.offloading.covers(self, target, whole(wanted)):
            return False
        return [(module, method) for _, module, method in wanted] == [(one.module, one.method) for _, one in self._on]

    def _wanted(self, target: Any, mesh: Mesh) -> list[Wanted]:
        return wanted_of(target, mesh.degree, self.extras.encoding, self.extras.vae)

    def renew(self, target: Any, arriving: Sequence[Component] = ()) -> None:
        """Puts it on what the target has now or is about to get, and takes it off what that has no more. Local. Raises
        ConfigError before anything is changed."""
        mesh = self.mesh
        device = self.offloading.device.type if self.offloading else None
        checked(self.quantize, *weighty(target, arriving), mesh.num_ranks if mesh else 1, device)
        if mesh is None:
            self.quantize_weights(target, arriving)
            return
        wanted = [*self._wanted(target, mesh), *self._wanted(SimpleNamespace(**dict(arriving)), mesh)]
        extras = extras_for(self.extras, wanted, self.target, mesh.num_ranks)
        for each in wanted:
            check_component(*each, {axis: mesh.degree(axis) for axis in Axis}, extras[each[1:]])
        staying = [id(module) for _, module, _ in wanted]
        for module in self.own_modules():
            if id(module) not in staying:
                remove_offload(module)  # it stands on what parafuse has put on
        self.quantize_weights(target, arriving)
        self.put_on(wanted)

    def choices(self) -> dict[str, Choice]:
        """Component -> what computed its attention, where parafuse sees to that."""
        return {name: one.choice for name, one in self._on if one.choice is not None}

    def encoders(self) -> dict[str, TextEncoder]:
        """Component -> what sends and keeps what it gives."""
        return {name: one.encoder for name, one in self._on if one.encoder}

    def owners(self) -> dict[str, int]:
        """Text encoder -> the rank that has it alone."""
        return {name: one.owner for name, one in self.encoders().items() if one.owner is not None}

    def sparse(self) -> dict[str, SparseVideo]:
        """Component -> what leaves pairs of its video's tokens out."""
        return {name: one.sparse for name, one in self._on if one.sparse is not None}

    def go_by_steps(self) -> None:
        """Counts the target's steps, where a cache or a rewrite needs them."""
        steps = self.cache is not None or self.extras.sparse is not None
        if steps or any(name in self.extras.rewrites for name in STEPWISE):
            self.clock.add(self.target)

    @property
    def cache(self) -> Cache | None:
        return self.extras.cache

    def own_modules(self) -> list[nn.Module]:
        """Components that no other handle uses."""
        return [one.module for _, one in self._on if all(user is self for user in one.users)]

    def guard(self, is_inside: Callable[[], bool]) -> None:
        """Refuses calls of what it stands on while `is_inside` says no: the other ranks would not take part."""
        self._is_inside = is_inside
        for _, one in self._on:
            one.guard(self, is_inside)

    def agree(self, together: Callable[[], bool]) -> None:
        """Tells when all ranks are known to make the calls that this one makes: then autoencoders may be shared."""
        self._together = together
        for _, one in self._on:
            one.agree(together)

    @property
    def cuts_decodes(self) -> bool:
        """Whether samples of an autoencoder are cut between replicas."""
        return any(one.data is not None and one.method == DECODE for _, one in self._on)

    def autoencoders(self) -> dict[str, Spread]:
        """Component -> what shares its calls."""
        return {name: one.autoencoder for name, one in self._on if one.autoencoder is not None}

    def block_plans(self) -> dict[str, tuple[str, BlockPlan]]:
        """Key of the store -> class of a block and how it is split, of all that have run."""
        found: dict[str, tuple[str, BlockPlan]] = {}
        for one in self.sequence.values():
            for (kind, hooks, spec, signatures), plan in one.plans.items():
                if not hooks:  # what stands on a block for a while only has no place in the store
                    found[key_for(kind, spec, signatures)] = (kind.partition("(")[0], plan)
        return found

    def exchanged(self) -> dict[str, Count]:
        """Calls and bytes that this rank has sent since `apply`, per axis and kind, as `ulysses.all_to_all`."""
        return since(self._counts(), self._before)

    def _counts(self) -> dict[str, Count]:
        if self.mesh is None:
            return {}
        groups = {str(axis): group for axis, group in self.mesh.groups.items()}
        if self.mesh.sequence is not None and self.mesh.sequence not in groups.values():
            groups["sequence"] = self.mesh.sequence
        if self.mesh.world is not None and self.mesh.world not in groups.values():
            groups["all"] = self.mesh.world
        if self.mesh.apart is not None:
            groups[DECODING] = self.mesh.apart
        if self.offloading is not None and self.offloading.ranks is not None:
            groups[WEIGHTS] = self.offloading.ranks
        return {f"{axis}.{kind}": c for axis, group in groups.items() for kind, c in counters(group).kinds.items()}

    @contextmanager
    def request(self) -> Iterator[dict[str, Memory]]:
        """What caches keep is kept for the calls inside alone, and gone after; gives what each component's cache does.

        A pipeline's own loop over steps starts anew by itself; a model that is called by hand is told so by this.
        Requests may be inside of each other. Local."""
        with ExitStack() as open_ones:
            memories: dict[str, Memory] = {}
            for name, one in self.skipping.items():
                if self.skips_cache:
                    open_ones.enter_context(one.off())
                else:
                    memories[name] = open_ones.enter_context(one.request())
            open_ones.enter_context(self.clock.anew(self.target))
            if self.offloading is not None:
                open_ones.enter_context(self.offloading.request())
            for _, one in self._on:
                one.begin()
            yield memories
            for _, one in self._on:
                one.settle()
        self._tell()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply(target: Any, config: Config | None = None, *, mesh: Mesh | None = None) -> Handle:
    """Makes a pipeline or a transformer run on all ranks. Every rank must call it, with the same config.

    `target` is changed in place (its instances, never their classes) and must have the same weights on every rank. Uses
    the default process group, or makes it from the launcher's environment. On one rank nothing is wrapped that is not
    asked for, or that `parafuse tune attention` has found here. Raises
    ConfigError before anything is changed or exchanged. Calls of the model are collective from then on."""
    config = config or Config()
    for field_name in ("dtype", "device", "allow_pickle"):
        value = getattr(config, field_name)
        if value != getattr(Config(), field_name):
            raise ConfigError(f"{field_name}={value!r}: apply takes the model as it is; set it when loading the model.")
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if mesh is None:
        config = _with_layout(config, target, world_size)
    degrees = config.parallel.degrees(world_size) if mesh is None else {}  # a mesh has its own
    ranks = world_size if mesh is None else mesh.num_ranks
    device = placed_on(config) or device_for(config.offload, device_of(target))
    extras = Extras.of(config, device)
    method = checked(config.quantize, *weighty(target), ranks, device if extras.offload else None)
    if max(world_size, ranks) == 1 and not extras:
        return _without_mesh(target, method)
    if mesh is not None:
        degrees = {axis: mesh.degree(axis) for axis in Axis}
    wanted = asked_for(target, degrees, extras.encoding, extras.vae)
    check_target(target, extras, device, degrees)
    each_has = extras_for(extras, wanted, target, ranks)
    found = [check_component(*each, degrees, each_has[each[1:]]) for each in wanted]
    shared = [one for one in found if one is not None]
    known_offload = shared_offloading(extras, target)
    if shared:
        if mesh is not None:
            release(mesh)
        mesh = shared[0].mesh
        hold(mesh)
    elif mesh is None:
        if world_size > 1:
            ensure_world(device, config.timeout_s)
        mesh = make_mesh(degrees, device, config.timeout_s)
        if mesh.sequence_degree > 1 and config.parallel.ulysses == "auto":
            note(f"ulysses {degrees[Axis.ULYSSES]}: all ranks that no other axis uses")
    handle = Handle(mesh=mesh, extras=extras, quantize=method, target=target)
    handle.use(known_offload or offloading(extras, target, mesh, config.timeout_s))
    known = next((one.guidance for one in shared if one.guidance), None)
    handle.rounds = known.rounds if known else handle.rounds
    handle.clock = next((one.clock for one in shared if one.clock), handle.clock)
    handle.go_by_steps()
    try:
        handle.quantize_weights(target)
        handle.put_on(wanted)
        handle.follow(target)
        handle._undo += handle.offloading.on_pipeline(target) if handle.offloading else []
        times = ExitStack()
        times.enter_context(host_times(target))
        handle._undo.append(times.close)
    except BaseException:
        handle.remove()
        raise
    return handle


def _with_layout(config: Config, target: Any, world_size: int) -> Config:
    """The same with a layout that was chosen for a pipeline; of a module alone nothing tells what it will be given."""
    is_pipeline = not isinstance(target, nn.Module) and hasattr(target, "components") and callable(target)
    if not is_pipeline or world_size == 1:
        return config
    stands = [standing_on(module, "forward") for _, module in denoisers(target, DENOISERS, required=False)]
    there = next((one.mesh for one in stands if one is not None), None)
    if there is not None:  # of a pipeline that shares its components with this one
        shared = Parallel(**{str(axis): there.degree(axis) for axis in Axis})
        return replace(config, parallel=shared) if config.parallel.is_chosen else config
    from parafuse.engine.planning.choose import choose_together
    from parafuse.engine.source import source_of

    module = next((one for _, one in denoisers(target, DENOISERS, required=False)), None)
    first = next(module.parameters(), None) if module is not None else None
    dtype = str(first.dtype).removeprefix("torch.") if first is not None else "float32"
    computes_in = device_of(target), dtype
    chosen = choose_together(config, source_of(target), world_size, computes_in, pipeline=target, alone=False)
    if chosen.why:
        note(f"{world_size} ranks: {chosen.layout} ({chosen.why})")
    return chosen.config


def _without_mesh(target: Any, method: Quantize | None) -> Handle:
    """On one rank, where nothing stands on the model."""
    handle = Handle(quantize=method, target=target)
    handle.quantize_weights(target)
    if method is not None:
        handle.follow(target)
    return handle
