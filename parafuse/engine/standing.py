"""What stands on a component, once for all handles that use it: pipelines share components, and a call that is shared
between ranks must not be shared again. It is taken off when the last handle lets go of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from torch import nn

from parafuse.cache import JOINT, StackCache, TokenMerging
from parafuse.config import VAE_AUTO, VAE_REPLICATED, Axis
from parafuse.engine.caches.caching import Caching, CallWatch
from parafuse.engine.caches.choose import curves_for, rule_of
from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.hosts import hosts_of
from parafuse.engine.caches.other_branches import OtherBranches
from parafuse.engine.caches.parts import PartReuse
from parafuse.engine.caches.skipping import StackSkipping
from parafuse.engine.caches.token_merging import Merging
from parafuse.engine.caches.units import skeleton_of
from parafuse.engine.derive import derive
from parafuse.engine.extras import Extras
from parafuse.engine.members import CASTING, beside_casting
from parafuse.engine.offload.pipeline import OffloadedDenoiser, Offloading, line_of
from parafuse.engine.rewrites.choose import make
from parafuse.engine.rewrites.qkv import FusedProjections
from parafuse.engine.rewrites.rewrite import Rewrite, Site
from parafuse.engine.stack import attending_parts, block_stack, repeated_blocks
from parafuse.engine.targets import DECODE
from parafuse.engine.vae.choice import ByCall, Spread, make_spread
from parafuse.engine.vae.tiled import METHODS
from parafuse.engine.video import SparseVideo
from parafuse.errors import ConfigError
from parafuse.kernels.attention import Choice
from parafuse.parallel.attention_mode import ChoiceHolds, ChosenAttention
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.captured import CapturedCalls, make_capture
from parafuse.parallel.compiled import CompiledUnits, CompiledWhole, Regional, refuse_compile
from parafuse.parallel.data import DataParallel
from parafuse.parallel.encoding import TextEncoder
from parafuse.parallel.guidance import GuidanceParallel, Rounds
from parafuse.parallel.hooks import guard, override
from parafuse.parallel.leading_rows import LeadingRows
from parafuse.parallel.led import Led
from parafuse.parallel.mesh import Mesh, hold, release
from parafuse.parallel.sequence import SequenceParallel
from parafuse.parallel.sparse import SparseAttention
from parafuse.sparse import Sparse

IsInside = Callable[[], bool]


@dataclass(eq=False)
class Standing:
    """What is put on one method of one component."""

    module: nn.Module
    method: str
    mesh: Mesh
    extras: Extras = field(default_factory=Extras)
    """What is asked for beside the layout; of what a module cannot have, nothing."""
    name: str = ""
    """Of the component."""
    skipping: Caching | None = None
    sequence: SequenceParallel | None = None
    data: DataParallel | None = None
    guidance: GuidanceParallel | None = None
    clock: Clock | None = None
    """By which it counts steps, where it does."""
    rewrites: list[Rewrite] = field(default_factory=list[Rewrite])
    choice: Choice | None = None
    """What computes attention in its blocks, where parafuse sees to that."""
    sparse: SparseVideo | None = None
    """What leaves pairs of its video's tokens out."""
    encoder: TextEncoder | None = None
    """What a text encoder gives: sent, and kept."""
    autoencoder: Spread | None = None
    """What shares the calls of an autoencoder between ranks."""
    regional: Regional | None = None
    """Its compiled blocks."""
    offloading: Offloading | None = None
    """Of the pipeline, where weights are offloaded."""
    weights: OffloadedDenoiser | None = None
    """Its own weights, where they are."""
    captured: list[CapturedCalls] = field(default_factory=list[CapturedCalls])
    """What runs as CUDA graphs."""
    users: list[Any] = field(default_factory=list[Any])
    """Handles."""
    _undo: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    _guards: list[tuple[Any, IsInside]] = field(default_factory=list[tuple[Any, IsInside]])

    def install(self, rounds: Rounds, clock: Clock) -> None:
        """Sequence parallel inside of the cache inside of data parallel inside of guidance parallel. All or nothing."""
        try:
            self._install(rounds, clock)
        except BaseException:
            self.take_off()
            raise
        hold(self.mesh)
        self._undo.insert(0, lambda: release(self.mesh))

    def _install(self, rounds: Rounds, clock: Clock) -> None:
        if self.extras.encoding.acts:
            kept = self.extras.encoding.kept
            self.encoder = TextEncoder(self.module, self.mesh, owner=self.extras.owner, kept=kept)
            self._put_on(self.encoder)
        elif self._is_shared_autoencoder:
            self.autoencoder = make_spread(self.extras.vae, self.name, self.module, self.mesh.apart)
            self._put_on(self.autoencoder)
        else:
            self._install_on_denoiser(rounds, clock)
        self._sign()

    @property
    def _is_shared_autoencoder(self) -> bool:
        """An autoencoder, whose calls are not cut by samples."""
        by_samples = self.mesh.degree(Axis.DATA) > 1 and self.extras.vae in (VAE_AUTO, VAE_REPLICATED)
        return self.method == DECODE and not by_samples

    def agree(self, together: Callable[[], bool]) -> None:
        """`together`: whether all ranks make the call that is made now."""
        if isinstance(self.autoencoder, ByCall):
            self.autoencoder.together = together

    def _install_on_denoiser(self, rounds: Rounds, clock: Clock) -> None:
        degree, is_forward, cache = self.mesh.degree, self.method == "forward", self.extras.cache
        context = CallContext(owners={} if cache else None)
        if isinstance(cache, StackCache) and cache.branches == JOINT:
            context.led = Led(self.mesh.group_name(Axis.CFG))
        self._rewrite(clock, context)
        self._refuse_casting()
        self._offload(context)
        parts = self._parts(clock, context)
        self._share_tokens(parts, clock, context)
        self._cache(parts, clock, context)
        self.clock = self.skipping.clock if self.skipping else self.clock
        if cache is None and self.extras.cuda_graphs:
            self._capture([self.module])
        self._put_on_units()
        for one in reversed(self.rewrites):  # those that come first see a call first
            for each in one.at_boundary():
                self._put_on(each)
        self._put_on(self.weights.calls if self.weights else None)
        if _makes_branches(parts):
            self._put_on(LeadingRows(self.module, context, self.mesh))
        if degree(Axis.DATA) > 1:
            self.data = DataParallel(self.module, self.mesh, self.method, context=context)
            self._put_on(self.data)
        if degree(Axis.CFG) > 1 and is_forward:
            self.guidance = GuidanceParallel(self.module, self.mesh, rounds, context=context)
            self._put_on(self.guidance)
        self._watch(parts)

    def _capture(self, modules: list[nn.Module]) -> None:
        """Inside of what decides and of what shares calls, so that nothing in a graph waits for the host or for another
        rank: the whole denoiser, or with a cache each of the units that it may skip."""
        capture = make_capture(self._device())
        self.captured = [CapturedCalls(module, capture) for module in modules]
        for one in self.captured:
            self._put_on(one)

    def _device(self) -> str:
        first = next(chain(self.module.parameters(), self.module.buffers()), None)
        return "cpu" if first is None else first.device.type

    def _watch(self, parts: PartReuse | None) -> None:
        """What every rank passes with every call."""
        if parts is not None and _makes_branches(parts):
            self._put_on(OtherBranches(parts))
        if self.skipping is not None:
            self._put_on(CallWatch(self.skipping))
        for one in self.rewrites:
            self._put_on(one.outermost())

    def _rewrite(self, clock: Clock, context: CallContext) -> None:
        """What stands inside of the model, below all else."""
        if self.extras.chosen is not None and self.method == "forward":
            self.clock = clock
            self.rewrites = make(self.extras.chosen, Site(self.module, self.mesh, clock, context, self.name))
        for one in self.rewrites:
            self._put_on(one)

    def _refuse_casting(self) -> None:
        """diffusers' layer-wise casting, which its user may call later, says where it cannot be."""
        extras, module = self.extras, self.module
        packed = "8 bits" if extras.quantizes else ""
        why = beside_casting(compile=extras.compile, rewrites=extras.rewrites, packed=packed)
        if why is None or self.method != "forward" or not callable(getattr(module, CASTING, None)):
            return

        def refused(*_: Any, **__: Any) -> None:
            raise ConfigError(f"{CASTING}: {why}.")

        self._undo.append(override(module, CASTING, refused))

    def _offload(self, context: CallContext) -> None:
        """Sends the weights home, once what changes layers is on. Single layers are met inside of all else."""
        if self.offloading is None or self.method != "forward":
            return
        self.weights = weights = self.offloading.denoiser(self.name, self.module)
        if weights is None:
            return
        weights.offloading = self.offloading
        context.present = weights.residence.present
        self._put_on(weights)
        self._put_on(weights.summons)
        if weights.method.is_fine:
            self._put_on(weights.units)
        for one in self.rewrites:
            if isinstance(one, FusedProjections):
                one.is_offloaded, one.at_home = True, weights.residence.at_home

    def _put_on_units(self) -> None:
        """The cache, and what lets blocks come for their calls: inside of a cache that leaves blocks out, so that none
        comes for nothing, and outside of one that looks into them."""
        weights = self.weights
        units = weights.units if weights is not None and not weights.method.is_fine else None
        if weights is not None and weights.method.is_fine:
            self._undo += [refuse_compile(block, BY_LAYERS) for block in weights.blocks]
        if not isinstance(self.skipping, StackSkipping):
            self._put_on(self.skipping)
        self._put_on(units)
        if isinstance(self.skipping, StackSkipping):
            self._put_on(self.skipping)
            if weights is not None:
                weights.residence.will_run = self.skipping.will_run

    def _share_tokens(self, parts: PartReuse | None, clock: Clock, context: CallContext) -> None:
        is_met = self.mesh.sequence_degree > 1 or self.extras.sparse is not None
        if self.method == "forward" and (is_met or self.extras.attention.acts):
            self.choice = Choice.named(self.extras.attention, self.name)
        if self.method == "forward" and is_met:
            prober = parts.without(derive) if parts else derive
            blocks = block_stack(self.module)
            self.sequence = SequenceParallel(self.module, blocks, self.mesh, prober, parts, self.choice)
        elif self.method == "forward" and self.extras.cache is None and not self.extras.compile:
            met = [part for one in self.rewrites for part in one.met_parts()]
            self._put_on(CompiledUnits(met) if met else CompiledWhole(self.module))
            if met:
                self._undo.append(refuse_compile(self.module))
        self._put_on(self.sequence)
        if self.extras.compile:
            self._compile(parts)
        if self.extras.sparse is not None and self.sequence is not None:
            self._leave_pairs_out(self.extras.sparse, self.sequence, clock, context)
        if self.choice is not None and self.sequence is None:
            self._put_on(ChosenAttention(attending_parts(self.module), self.choice))
        if self.choice is not None and self.choice.acts:
            self._put_on(ChoiceHolds(self.module, self.choice))

    def _leave_pairs_out(self, method: Sparse, sequence: SequenceParallel, clock: Clock, context: CallContext) -> None:
        """Sparse attention, which `choice` carries to the operators."""
        group = "" if self.mesh.sequence is None else self.mesh.sequence.group_name
        attention = SparseAttention(method, group, self.mesh.degree(Axis.ULYSSES))
        sequence.attention.choice.sparse = attention
        self.clock, self.sparse = clock, SparseVideo(sequence, attention, clock, context)
        self._put_on(self.sparse)

    def _cache(self, parts: PartReuse | None, clock: Clock, context: CallContext) -> None:
        """Makes what skips or reuses work, and puts on what is to stand inside of it."""
        cache = self.extras.cache
        if parts is not None:
            self._let_compile(list(parts.hosts))
            self.skipping = parts
        elif isinstance(cache, TokenMerging):
            self.skipping = Merging(self.module, cache, clock=clock, context=context)
            self._let_compile([site.block for site in self.skipping.sites])
        elif isinstance(cache, StackCache):
            skeleton = skeleton_of(self.module)
            self._let_compile(skeleton.units)
            if self.extras.cuda_graphs:
                self._capture(skeleton.units)
            rule = rule_of(cache, curves_for(cache, self.name, self.module))
            self.skipping = StackSkipping(
                self.module, skeleton, cache, rule, clock=clock, context=context, group=self.mesh.sequence
            )

    def _let_compile(self, units: list[nn.Module]) -> None:
        """By hand, where nothing else sees to that."""
        if self.sequence is None and not self.extras.compile:
            self._put_on(CompiledUnits(units))

    def _compile(self, parts: PartReuse | None) -> None:
        """What a cache puts on blocks stands outside; what it puts on their parts is compiled with them."""
        if self.sequence is not None:
            blocks, compiled = self.sequence.blocks, self.sequence.compiled
        else:
            units = CompiledUnits(repeated_blocks(self.module), parts.variant if parts else lambda _: None)
            self._put_on(units)
            blocks, compiled = units.units, units.compiled
        options = {name: value for one in self.rewrites for name, value in one.compile_options().items()}
        self.regional = Regional(self.module, blocks, compiled, options)
        self._put_on(self.regional)

    def _parts(self, clock: Clock, context: CallContext) -> PartReuse | None:
        """What reuses parts of blocks; made before anything stands on these."""
        if self.extras.cache is None or isinstance(self.extras.cache, (StackCache, TokenMerging)):
            return None
        return PartReuse(self.module, hosts_of(self.module), self.extras.cache, clock=clock, context=context)

    def _put_on(self, one: Any) -> None:
        if one is not None:
            self._undo.append(one.remove)
            one.install()

    def _sign(self) -> None:
        """Makes it found by `standing_on`."""
        for method in self._methods:
            vars(self.module)[method].standing = self

    @property
    def _methods(self) -> list[str]:
        """On which it stands."""
        both = METHODS if self.autoencoder is not None else (self.method,)
        return [method for method in both if method in vars(self.module)]

    def guard(self, user: Any, is_inside: IsInside) -> None:
        """Refuses calls while all users that have such a condition are outside of it: the other ranks would not take
        part."""
        if not self._guards:
            if isinstance(self.autoencoder, ByCall):
                return  # a call that other ranks do not make is not shared
            self._undo += [guard(self.module, method, self._is_inside) for method in self._methods]
            self._sign()
        self._guards.append((user, is_inside))

    def _is_inside(self) -> bool:
        return not self._guards or any(is_inside() for _, is_inside in self._guards)

    def leave(self, user: Any) -> None:
        """Takes it off where nobody else uses it. Raises RuntimeError where another library stands on it."""
        if all(one is user for one in self.users):
            self.take_off()
        self.users[:] = [one for one in self.users if one is not user]
        self._guards[:] = [one for one in self._guards if one[0] is not user]

    def take_off(self) -> None:
        """In reverse order. Local; goes on where it was left."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def begin(self) -> None:
        """At the start of a request: counts anew."""
        if self.choice is not None:
            self.choice.begin()
        if self.sparse is not None:
            self.sparse.begin()
        if self.encoder is not None:
            self.encoder.begin()
        for one in self.rewrites:
            one.begin()

    def settle(self) -> None:
        """At the end of a request: raises where something did not hold."""
        if self.sparse is not None:
            self.sparse.settle()
        for one in self.rewrites:
            one.settle()

    def lines(self, name: str) -> list[str]:
        """One line for each thing that stands, for receipts."""
        degree, found = self.mesh.degree, list[str]()
        if self.encoder is not None:
            return [self.encoder.line(name)]
        if self.autoencoder is not None:
            return self.autoencoder.lines()
        if self.sequence and self.mesh.sequence_degree > 1:
            axes = " x ".join(f"{a} {degree(a)}" for a in (Axis.RING, Axis.ULYSSES) if degree(a) > 1)
            found.append(f"sequence parallel ({axes}) on {name}: {len(self.sequence.blocks)} blocks")
        if self.data:
            found.append(f"data parallel (data {degree(Axis.DATA)}) on {name}")
        if self.guidance:
            found.append(f"guidance parallel (cfg {degree(Axis.CFG)}) on {name}")
        found += [
            f"{line} on {name}" for line in replace(self.extras, compile=False, offload=None, vae=VAE_AUTO).lines()
        ]
        chosen = self.choice if self.choice is not None and self.choice.acts else None
        found += [] if chosen is None else [f"attention on {name}: {line}" for line in chosen.lines()]
        if self.sparse:
            found.append(f"sparse attention on {name}: {self.sparse.attention.line()}")
        if self.regional:
            kinds = ", ".join(f"{number} {kind}" for kind, number in self.regional.compiled.num_compiled.items())
            found.append(f"compiled blocks on {name}: {kinds}")
        found += [line.replace(":", f" on {name}:", 1) for one in self.rewrites for line in one.lines()]
        found += [line_of(self.weights)] if self.weights else []
        return found


BY_LAYERS = (
    "its layers are offloaded one by one, and no compiled block can wait for them; use offload='group' (by blocks)."
)


def _makes_branches(parts: PartReuse | None) -> bool:
    return parts is not None and parts.schedule.every_branch > 1


def standing_on(module: nn.Module, method: str) -> Standing | None:
    """What parafuse has put on a component, where it has."""
    return getattr(getattr(module, method, None), "standing", None)
