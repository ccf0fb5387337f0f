"""A call of a component, followed without values: as one device makes it, and as one rank of a sequence does."""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from parafuse.config import VAE_REPLICATED, Axis, Config, Parallel
from parafuse.engine.apply import apply
from parafuse.engine.memory.by_shape import ByShape
from parafuse.engine.memory.fake_pipeline import fake_mode
from parafuse.engine.memory.kernels import bodies, kernels_of
from parafuse.engine.memory.ledger import ACTIVATIONS, EXCHANGE, Ledger
from parafuse.engine.planning.facts import ATTENTION, DENOISE, Amount, Exchanges, Operator, Part
from parafuse.engine.planning.recorder import Attending, Recorder, Seen
from parafuse.engine.stack import named_blocks
from parafuse.engine.targets import DENOISERS, STACKS
from parafuse.errors import ParafuseError
from parafuse.parallel.absent import beside_others
from parafuse.parallel.block_plan import BlockPlan

Arguments = tuple[Any, Any]


@dataclass
class Calls:
    """Of one component in one phase."""

    number: int = 0
    first: list[Seen] = field(default_factory=list[Seen])
    """What the first call did."""
    total: list[Seen] = field(default_factory=list[Seen])
    peak: float = 0.0
    arguments: Arguments | None = None
    """Of the first call, where it may be made again."""
    rows: int = 1
    result_bytes: float = 0.0


class Follower:
    """Components whose calls are written down."""

    def __init__(self, parts: Mapping[str, nn.Module], device: str):
        """`parts`: by the names that pipelines have for them, with weights that have no memory."""
        self.parts = parts
        self.recorder = Recorder(kernels_of(device), bodies(lambda: self.recorder))
        for part in parts.values():
            self.recorder.know(part)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, operators are written down, with the kind of block in which they run."""
        with ExitStack() as inside:
            inside.enter_context(torch.no_grad())
            inside.enter_context(_quiet_trials())
            for name, part in self.parts.items():
                if name in DENOISERS:
                    inside.enter_context(_told_blocks(part, self.recorder))
            inside.enter_context(Attending(self.recorder))
            inside.enter_context(self.recorder)
            yield

    def part(self, name: str, phase: str, one: Calls, calls: float) -> Part:
        """What is known of a component that a request calls so many times."""
        shared, refused = self._shared(name, one) if phase == DENOISE else (_Shared(), "")
        return Part(
            name=name,
            phase=phase,
            calls=calls,
            rows=one.rows,
            alone=_counted(one.total, one.number),
            shared=shared.operators,
            exchanges=shared.exchanges,
            refused=refused,
            peak=shared.peak,
            peak_alone=one.peak,
            heads=shared.heads,
            tokens=max((seen.tokens for seen in one.first if seen.family == ATTENTION), default=0),
            blocks=dict(Counter(type(block).__name__ for block in named_blocks(self.parts[name]).values())),
        )

    def _shared(self, name: str, one: Calls) -> tuple[_Shared, str]:
        """What a rank of a sequence does in a call, and why it cannot."""
        kind = type(self.parts[name]).__name__
        if name not in STACKS:
            return _Shared(), f"{kind} has no block stack to share"
        if one.arguments is None:
            return _Shared(), f"{name} was not called"
        kept: dict[str, BlockPlan] = {}
        try:
            two, four = (self._as_rank(name, one.arguments, degree, kept) for degree in (2, 4))
        except ParafuseError as error:
            return _Shared(), str(error).partition("\n")[0]
        except Exception as error:  # what a model asks of values, they cannot say
            first = str(error).strip().partition("\n")[0]
            return _Shared(), f"{kind} cannot be followed without values ({type(error).__name__}: {first})"
        return _fitted(two, four, one.first), ""

    def _as_rank(self, name: str, arguments: Arguments, degree: int, kept: dict[str, BlockPlan]) -> _Rank:
        """One call as the first rank of so many makes it. `kept`: how blocks are split. Raises ConfigError
        (UnsupportedError) where it cannot."""
        module, (args, kwargs) = self.parts[name], arguments
        config = Config(parallel=Parallel(ulysses=degree), vae=VAE_REPLICATED)
        with ExitStack() as inside:
            mesh = inside.enter_context(beside_others(Axis.ULYSSES, degree))
            handle = apply(module, config, mesh=mesh)
            inside.callback(lambda: handle.remove(quietly=True))
            for sequence in handle.sequence.values():
                sequence.prober = ByShape(self.recorder.silent, self.recorder.agreeing, kept)
            inside.enter_context(self.inside())
            inside.enter_context(self.recorder.as_kind(ACTIVATIONS))
            module(*args, **kwargs)  # blocks are examined
            before = {key: (count.calls, count.bytes) for key, count in handle.exchanged().items()}
            self.recorder.peaks.clear()
            self.recorder.enter(DENOISE)
            with self.recorder.recorded() as seen:
                module(*args, **kwargs)
            sent: dict[str, tuple[int, int]] = {}
            for key, count in handle.exchanged().items():
                calls, nbytes = before.get(key, (0, 0))
                sent[key] = count.calls - calls, count.bytes - nbytes
            return _Rank(list(seen), sent, activations(self.recorder, DENOISE))


def follow_module(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    device: str = "cpu",
    alone: bool = False,
) -> Part:
    """What one call of a denoiser computes and moves, on one rank and, unless it is to be `alone`, shared. Its
    weights are left alone; nothing is
    computed."""
    mode = fake_mode()
    follower = Follower({STACKS[0]: without_memory(module, mode)}, device)
    one = Calls(number=1, arguments=None if alone else (args, dict(kwargs)), rows=rows_of(args, kwargs))
    with follower.inside(), follower.recorder.as_kind(ACTIVATIONS):
        follower.recorder.enter(DENOISE)
        with follower.recorder.recorded() as seen:
            follower.parts[STACKS[0]](*args, **kwargs)
    one.first, one.total = seen, list(seen)
    one.peak = activations(follower.recorder, DENOISE)
    return follower.part(STACKS[0], DENOISE, one, 1.0)


@contextmanager
def _quiet_trials() -> Iterator[None]:
    """Inside, torch does not log what fails on tensors without values: ways to split a block are tried there."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Samples of a call: of its first argument that is a batch, or a list of them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 1:
            return len(value)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return len(value)
    return 1


def without_memory(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose parameters have sizes and no memory, and on which nothing stands: no hooks, no compiled or replaced
    methods, which would run the module itself."""
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    memo: dict[int, Any] = {}
    for x in module.parameters():
        if not isinstance(x, FakeTensor):
            with mode:
                memo[id(x)] = nn.Parameter(torch.empty(x.shape, dtype=x.dtype), requires_grad=False)
    for x in module.buffers():
        memo[id(x)] = x.detach().cpu().clone()
    for part in module.modules():
        stands = [value for name, value in vars(part).items() if name.startswith(HOOKS)]
        memo |= {id(value): type(value)() if isinstance(value, dict) else None for value in stands if value is not None}
    found = copy.deepcopy(module, memo).eval()
    for part in found.modules():
        for name, value in list(vars(part).items()):
            is_method = callable(value) and not isinstance(value, nn.Module) and hasattr(type(part), name)
            if is_method or name in OTHERS_HOOKS:
                del vars(part)[name]
    return found


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook", "_diffusers_hook")
OTHERS_HOOKS = ("_hf_hook", "_diffusers_hook", "_old_forward")
"""Attributes of accelerate and diffusers."""


@dataclass
class _Rank:
    """One call on one rank."""

    seen: list[Seen]
    sent: dict[str, tuple[int, int]]
    """Axis and kind -> calls and bytes."""
    peak: float

    def of(self, *kinds: str) -> tuple[float, float]:
        found = [counts for name, counts in self.sent.items() if name.rpartition(".")[2] in kinds]
        return float(sum(calls for calls, _ in found)), float(sum(number for _, number in found))


@dataclass
class _Shared:
    operators: tuple[Operator, ...] = ()
    exchanges: Exchanges = field(default_factory=Exchanges)
    peak: Amount = field(default_factory=Amount)
    heads: tuple[int, ...] = ()


def _fitted(two: _Rank, four: _Rank, alone: list[Seen]) -> _Shared:
    """What holds for any degree. `alone`: the same call on one rank."""
    calls, at_4 = four.of("all_to_all")
    gathers, gathered = four.of("all_gather", "all_reduce")
    # each attention that exchanges makes two calls; of what it sends with Ulysses, keys and values go round with ring
    attentions = [one for one in four.seen if one.family == ATTENTION]
    before = [one for one in alone if one.family == ATTENTION]
    if len(before) != len(attentions):
        before = attentions
    exchanging = [pair for pair in zip(before, attentions, strict=True) if pair[1].exchanges]
    exchanges = Exchanges(
        attention_calls=float(len(exchanging)),
        ulysses_calls=calls,
        ulysses_bytes=at_4 * 16 / 3,
        ring_bytes=sum(one.keys for one, _ in exchanging),
        gather_calls=gathers,
        gather_bytes=gathered * 4 / 3,
    )
    heads = tuple(sorted({one.heads for one, _ in exchanging}))
    return _Shared(_operators(two.seen, four.seen), exchanges, Amount.of(two.peak, four.peak), heads)


def _operators(two: list[Seen], four: list[Seen]) -> tuple[Operator, ...]:
    if [one.family for one in two] == [one.family for one in four]:
        pairs = list(zip(two, four, strict=True))
    else:  # ranks that hold filler alone, or whole shapes, do a little more or less: in each place, kind by kind
        pairs = list(_by_place(two, four))
    found: Counter[Operator] = Counter()
    for at_2, at_4 in pairs:
        flops, moved = Amount.of(at_2.flops, at_4.flops), Amount.of(at_2.bytes, at_4.bytes)
        found[_operator(at_4, flops, moved)] += 1
    return tuple(replace(one, count=float(number)) for one, number in found.items())


def _by_place(two: list[Seen], four: list[Seen]) -> Iterator[tuple[Seen, Seen]]:
    """Operators of one kind in one place, in their order; what only one of both has goes with the same alone."""

    def sorted_out(seen: list[Seen]) -> dict[tuple[str, str, int], list[Seen]]:
        out: dict[tuple[str, str, int], list[Seen]] = {}
        for one in seen:
            out.setdefault((one.where, one.family, one.columns), []).append(one)
        return out

    first, second = sorted_out(two), sorted_out(four)
    for key in dict.fromkeys((*first, *second)):
        for at_2, at_4 in itertools.zip_longest(first.get(key, []), second.get(key, [])):
            yield at_2 or at_4, at_4 or at_2


def _operator(one: Seen, flops: Amount, moved: Amount) -> Operator:
    return Operator(
        where=one.where,
        family=one.family,
        dtype=one.dtype,
        count=1.0,
        flops=flops,
        bytes=moved,
        weights=one.weights,
        columns=one.columns,
    )


def _counted(seen: list[Seen], calls: int) -> tuple[Operator, ...]:
    """Of one call, on average."""
    found = Counter(_operator(one, Amount(one.flops), Amount(one.bytes)) for one in seen)
    return tuple(replace(one, count=number / calls) for one, number in found.items())


def activations(ledger: Ledger, phase: str) -> float:
    """The most that was computed or exchanged at a time."""
    peak = ledger.peaks.get(phase)
    return 0.0 if peak is None else float(peak.by_kind[ACTIVATIONS] + peak.by_kind[EXCHANGE] + peak.workspace)


@contextmanager
def _told_blocks(part: nn.Module, recorder: Recorder) -> Iterator[None]:
    """The recorder knows in which kind of block an operator runs."""
    hooks: list[Any] = []
    for block in named_blocks(part).values():
        name = type(block).__name__

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            recorder.where = name

        def leave(*_: Any) -> None:
            recorder.where = ""

        hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
