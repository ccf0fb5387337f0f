"""Skips the middle of a denoiser's stack where a rule says so. Stands outside of sequence parallel and of compiled
blocks, inside of what shares whole calls: it sees streams as they pass between blocks, split over ranks or whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.cache import SEPARATE, StackCache
from parafuse.engine.caches.caching import Caching
from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.forecast import Residual, local_of, mixed, tells_apart
from parafuse.engine.caches.measure import modulated_input, own_share, relative_changes, relative_sizes
from parafuse.engine.caches.memory import Decision, Kept
from parafuse.engine.caches.rules import Measures, Moment, Rule, Sample, is_bound
from parafuse.engine.caches.streams import Observer, Seen
from parafuse.engine.caches.twin import Twin, values
from parafuse.engine.caches.units import Skeleton, Span
from parafuse.errors import ConfigError, UnsupportedError
from parafuse.log import note
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.comm import all_reduce
from parafuse.parallel.effects import Handed
from parafuse.parallel.hooks import Forward, override_forward
from parafuse.parallel.led import Led
from parafuse.parallel.nest import Flattener, leaves_of
from parafuse.parallel.shard import Sharded

PAST = (
    "goes on with what blocks inside of the part that may be skipped give, not with the last one's results alone; ask "
    "for fewer last_blocks, or run it without a cache."
)


@dataclass(frozen=True)
class Witnessed:
    """How a computed call differs from the branch's step before, by sample: what calibrations are made of."""

    number: int
    """Of the call."""
    moment: Moment
    rows: tuple[int, ...]
    inputs: list[float]
    """Relative changes of the first block's modulated input."""
    residuals: list[float]
    """Relative changes of what the stack adds to the picture's stream."""
    sizes: list[float]
    """Of that, over its size in the step before."""


class StackSkipping(Caching):
    """The cache of one denoiser. Calls are collective on `group`, the ranks that share its tokens, and on no more."""

    def __init__(
        self, root: nn.Module, skeleton: Skeleton, cache: StackCache, rule: Rule, *, clock: Clock,
        context: CallContext, group: ProcessGroup | None,
    ):  # fmt: skip
        super().__init__(root, clock, context)
        self.skeleton, self.cache, self.rule, self.group = skeleton, cache, rule, group
        self.observer, self.flatten = Observer(), Flattener()
        self._containing = {part: unit for unit in skeleton.units for part in unit.modules()}
        self._said: set[str] = set()
        self.witness: Callable[[Witnessed], None] | None = None
        """Is told of computed calls, where the rule measures the modulated input."""
        self._call: _Call | None = None

    def install(self) -> None:
        super().install()
        for unit in self.skeleton.units:
            self._undo.append(override_forward(unit, lambda original, unit=unit: self._unit(unit, original)))

    def will_run(self, module: nn.Module, in_next: bool) -> bool | None:
        """Whether a unit, or a part of one, runs yet in the call at hand (or in the next); None: it is not decided."""
        call = self._call
        span = call.kept.span if call is not None else None
        if call is None or span is None or call.is_first or call.is_lost:
            return True
        middle = [one.unit for one in call.kept.seen[span.start : span.end]]
        if not any(self._containing.get(module) is unit for unit in middle):
            return True
        return None if in_next or call.skipped is None else not all(call.skipped)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            note(text)

    def _root(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.context.is_trial or self._call is not None:
                return original(*args, **kwargs)
            call, handed = _Call(self, self.rows_of(args, kwargs)), Handed((args, kwargs))
            self._call = call
            try:
                result = original(*args, **kwargs)
            except BaseException:
                self.memory.branches.clear()
                raise
            finally:
                self._call = None
            if any(isinstance(x, Twin) for x in leaves_of(result)):
                raise UnsupportedError(f"{type(self.root).__name__}: {PAST}")
            if handed.have_changed():
                self._say_once(f"{type(self.root).__name__}: calls that write into what they are given are computed")
                call.learned.clear()  # left out, it would not write
                call.kept.residuals.clear()
            call.commit()
            return result

        return forward

    def _unit(self, unit: nn.Module, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._call is None or self.context.is_trial:
                return original(*args, **kwargs)
            return self._call.unit(unit, original, args, kwargs)

        return forward


class _Call:
    """One call of the denoiser."""

    def __init__(self, owner: StackSkipping, rows: tuple[int, ...]):
        self.owner, self.cache = owner, owner.cache
        context = owner.context
        self.asked = rows
        self.moment = Moment(owner.clock.step, owner.clock.total, context.place)
        self.branch, self.number = context.branch, context.number
        self.kept: Kept = owner.memory.branches.get(self.branch) or Kept()
        if self.kept.rows and not self.kept.narrow(rows):
            self.kept = Kept()
        self.rows = rows[:1] if self.kept.as_one else rows
        """Those that are decided about: the first one for all, where streams do not tell samples apart."""
        self.is_first = not self.kept.seen
        """Nothing is known of the order of units yet; nothing of this call is kept for later ones but that."""
        self.seen: list[Seen] = []
        self.came: dict[int, Tensor] = {}
        """Place -> the stream that entered there, in a first call."""
        self.place = 0
        self.only_watches = owner.rule.threshold == 0 and owner.witness is None and owner.replay is None
        """Nothing is ever skipped, so that nothing is kept for it: once it is decided, units just run."""
        self.is_lost = False
        """Other units run than in the branch's last computed call."""
        self.skipped: list[bool] | None = None
        """By sample, once it is decided."""
        self.levels: list[float | None] = [None] * len(self.rows)
        """By sample, what was held against the threshold."""
        self.weighed: list[Sample] = self.kept.samples
        self.measured: Tensor | None = None
        """(samples, n) this rank's share of it."""
        self.entered: Tensor | None = None
        self.padding: Tensor | None = None
        """Which tokens of each sample are its own, where that is told."""
        self.learned: dict[int, Tensor] = {}
        self.untold: set[int] = set()
        """Places at which a first call's stream did not tell its samples apart."""

    def unit(self, unit: nn.Module, original: Forward, args: Any, kwargs: Any) -> Any:
        """A unit's call: run, run beside its base, or left out."""
        place, self.place = self.place, self.place + 1
        if self.only_watches and self.skipped is not None:
            return original(*args, **kwargs)
        leaves, spec = self.owner.flatten((args, kwargs))
        if place == 0:
            self._begin(leaves)
        if self.is_first:
            return self._run(unit, original, leaves, spec, place)
        span = self.kept.span
        if self.is_lost or span is None or place >= len(self.kept.seen) or self.kept.seen[place].unit is not unit:
            return self._lose_way(unit, original, leaves, spec, place)
        if place == span.first and self.kept.entered and not self._is_reached(leaves, place):
            later = [start for start in self.kept.entered if start > place]
            span = self.kept.span = self._span_from(later[0], self.kept.seen) if later else span
        if place == span.first:
            self._enter(leaves, place)
        if place == span.start and self.skipped is None:
            if self.owner.rule.measures is Measures.INPUT:
                self._measure_input(unit, leaves, spec, place)
            self._decide()
        if place < span.start or place >= span.end:
            self._refuse_past(leaves)
            result = self._run(unit, original, leaves, spec, place)
            if span.first <= place == span.start - 1:  # else what ran prepares the streams
                self._leave_first(result, place)
                self._decide()
            return result
        if self.only_watches:
            return original(*args, **kwargs)
        leaves_out = all(self.skipped or [False])
        return self._left_out(leaves, place) if leaves_out else self._beside(unit, original, leaves, spec, place)

    def _refuse_past(self, leaves: list[Any]) -> None:
        if any(isinstance(x, Twin) for x in leaves):
            raise UnsupportedError(f"{type(self.owner.root).__name__}: {PAST}")

    def commit(self) -> None:
        """Keeps what the call has learned; after it ended well."""
        kept, led = self.kept, self.owner.context.led
        if led is not None and self.owner.context.leads and self.skipped is None:
            self._as_led(led)  # other ranks may wait to hear of it
        skipped = self.skipped or [False] * len(self.rows)
        if self.is_first:
            starts = self.owner.skeleton.starts(self.seen)
            span = self._span_from(starts[0], self.seen)
            kept = Kept(rows=self.asked, sizes=self.sizes, seen=self.seen, span=span)
            kept.as_one = any(span.first <= place < span.end for place in self.untold)
            kept.samples = [Sample() for _ in (self.asked[:1] if kept.as_one else self.asked)]
            is_open = len(starts) > 1 and all(place in self.came for place in starts)
            kept.entered = {place: self.came[place] for place in starts} if is_open else {}
        elif self.is_lost or self.place != len(kept.seen):
            kept.seen, kept.span = [], None  # other units than before: learned anew at the next call
        else:
            kept.entered = {}
            self._keep(kept, skipped)
        memory = self.owner.memory
        memory.branches[self.branch] = kept
        memory.steps[self.number] = self.moment.step
        decided = [Decision(mine, level) for mine, level in zip(skipped, self.levels, strict=True)]
        if len(decided) < len(self.asked):
            decided *= len(self.asked)
        memory.decisions[self.number] = dict(zip(self.asked, decided, strict=True))
        memory.most_bytes = max(memory.most_bytes, memory.nbytes)

    def _keep(self, kept: Kept, skipped: list[bool]) -> None:
        computed = [not x for x in skipped]
        if self.owner.witness is not None and all(computed):
            self._tell(self.owner.witness)
        for leaf, learned in self.learned.items():
            residual = kept.residuals.setdefault(leaf, Residual(self.cache.order))
            residual.learn(learned, self.moment.step, computed)
        if self.measured is not None:
            new, old = self.measured, kept.reference
            moves = [True] * len(computed) if self.owner.rule.measures is Measures.INPUT else computed
            kept.reference = new if old is None else mixed(new, old, moves)
        kept.samples = [
            replace(sample, skips=sample.skips + 1) if mine else Sample()
            for sample, mine in zip(self.weighed, skipped, strict=True)
        ]

    # units

    def _run(self, unit: nn.Module, original: Forward, leaves: list[Any], spec: TreeSpec, place: int) -> Any:
        """A unit that always runs."""
        leaves = values(leaves)
        args, kwargs = tree_unflatten(leaves, spec)
        result = original(*args, **kwargs)
        if self.is_first:
            self.seen.append(self.owner.observer.see(unit, original, leaves, spec, result))
            stream = values(self.seen[-1].main_argument(leaves))
            if isinstance(stream, Tensor) and not tells_apart(stream, len(self.asked)):
                self.untold.add(place)
            source = self.seen[-1].sources.get(self.seen[-1].main)
            if source is not None and unit in self.owner.skeleton.openers:
                self.came[place] = values(leaves[source])
        return result

    def _beside(self, unit: nn.Module, original: Forward, leaves: list[Any], spec: TreeSpec, place: int) -> Any:
        """A unit of the part that may be skipped, in a call that computes it."""
        args, kwargs = tree_unflatten(values(leaves), spec)
        out, result_spec = self.owner.flatten(original(*args, **kwargs))
        seen = self.kept.seen[place]
        for i, source in seen.sources.items():
            base = leaves[source] if source is not None else seen.blanks[i].zeros()
            out[i] = Twin(out[i], base.base if isinstance(base, Twin) else base)
        if self._is_last(place):
            out = [self._finished(i, x) for i, x in enumerate(out)]
        return tree_unflatten(out, result_spec)

    def _left_out(self, leaves: list[Any], place: int) -> Any:
        """What stands for the result of a unit that is skipped."""
        seen = self.kept.seen[place]
        out: list[Any] = [None] * (len(seen.sources) + len(seen.others))
        for i, source in seen.sources.items():
            base = values(leaves[source]) if source is not None else seen.blanks[i].zeros()
            is_last = self._is_last(place)
            out[i] = base + self.kept.residuals[i].at(self.moment.step) if is_last else Twin.lent(base)
        for i, x in seen.others.items():
            out[i] = x
        return tree_unflatten(out, seen.spec)

    def _is_last(self, place: int) -> bool:
        return self.kept.span is not None and place == self.kept.span.end - 1

    def _finished(self, leaf: int, x: Any) -> Any:
        """A result of the last unit: kept as a residual; of samples that skip, their forecast."""
        if not isinstance(x, Twin):
            return x
        residual = x.value - x.base
        self.learned[leaf] = residual
        if not any(self.skipped or ()):
            return x.value
        forecast = x.base + self.kept.residuals[leaf].at(self.moment.step)
        return mixed(x.value, _as(forecast, x.value), [not skips for skips in self.skipped or []])

    # decisions

    def _span_from(self, first: int, seen: list[Seen]) -> Span:
        return self.owner.skeleton.span(seen, first, self.cache.leading, self.cache.last_blocks)

    def _is_reached(self, leaves: list[Any], place: int) -> bool:
        """Whether the sample has come into the stream here, so that it is another than in the call before. Collective
        on the ranks that share it."""
        source = self.kept.seen[place].sources[self.kept.seen[place].main]
        before = local_of(self.kept.entered[place])
        now = local_of(values(leaves[source])) if source is not None else before
        differs = torch.tensor([float(now.shape != before.shape or not torch.equal(now, before))], device=self.device)
        if self.owner.group is not None:
            differs = all_reduce(differs, self.owner.group.group_name)
        return bool(differs.item())

    def _enter(self, leaves: list[Any], place: int) -> None:
        self.entered = self.kept.seen[place].main_argument(leaves)
        self.padding = next((x for x in values(leaves) if _is_mask_of(x, self.entered)), None)

    def _leave_first(self, result: Any, place: int) -> None:
        """Measures the first blocks' residual."""
        if self.owner.rule.measures is not Measures.RESIDUAL:
            return
        stream = tree_flatten(result)[0][self.kept.seen[place].main]
        if self.entered is not None and self.entered.shape == stream.shape:
            stream = stream - self.entered
        self.measured = self._own_share(stream)

    def _measure_input(self, block: nn.Module, leaves: list[Any], spec: TreeSpec, place: int) -> None:
        """Measures what the first block makes of its stream."""
        seen = self.kept.seen[place]
        stream = seen.main_argument(leaves)
        if stream is None:
            raise UnsupportedError(f"{type(block).__name__}: goes on from none of its arguments; use interval.")
        with self.owner.context.present([block]):
            found = modulated_input(block, leaves, spec, stream, seen.stream_numbers)
        self.measured = self._own_share(found)

    def _own_share(self, stream: Tensor) -> Tensor:
        """What this rank is to count of a stream; nothing of what fills up samples to the length of the longest one,
        which depends on the others in the batch."""
        if self.padding is not None and stream.shape[:2] == self.padding.shape[:1] + self.padding.shape[-1:]:
            stream = stream * self.padding.reshape(*stream.shape[:2], 1)
        return own_share(stream, len(self.rows), self.owner.group)

    def _decide(self) -> None:
        """Which samples skip: from sums over each sample's own tokens, on all ranks that share them and no others."""
        kept, rule, owner = self.kept, self.owner.rule, self.owner
        measures = rule.measures is not Measures.NOTHING
        can_skip = (bool(kept.residuals) or self.only_watches) and (not measures or kept.reference is not None)
        bound = [not can_skip or is_bound(self.cache, self.moment, sample) for sample in kept.samples]
        changes = self._changes() if measures and not all(bound) else [0.0] * len(self.rows)
        self.weighed = [
            rule.weigh(self.moment, change, sample) for change, sample in zip(changes, kept.samples, strict=True)
        ]
        self.levels = [
            None if held or rule.threshold is None else sample.level
            for held, sample in zip(bound, self.weighed, strict=True)
        ]
        self.skipped = [
            not held and rule.may_skip(self.moment, sample) for held, sample in zip(bound, self.weighed, strict=True)
        ]
        if owner.context.led is not None:
            self.skipped = [can_skip and skips for skips in self._as_led(owner.context.led)]
        if owner.replay is not None:
            for i, row in enumerate(self.rows):
                self.skipped[i] = owner.replay(self.number, row)
            if any(self.skipped) and not kept.residuals:
                raise ConfigError(f"plan.replay: skips call {self.number + 1}, before anything is kept to reuse.")

    def _as_led(self, led: Led) -> list[bool]:
        """By sample: what the first branch of this step decides for it."""
        context = self.owner.context
        batch = context.batch or len(self.asked)
        each = self.owner.clock.samples or batch
        if batch % each:
            raise UnsupportedError(
                f"a batch of {batch} has no whole number of branches for {each} samples, so they cannot be told apart; "
                f"use branches={SEPARATE!r}."
            )
        if context.leads:
            mine = dict(zip(self.rows, self.skipped or [False] * len(self.rows), strict=True))
            first = {row: skips for row, skips in mine.items() if row < each}
            led.tell(sorted(self._of_all(first, each).items()))
        return [led.skips(row % each) for row in self.rows]

    def _of_all(self, mine: dict[int, bool], number: int) -> dict[int, bool]:
        """Decisions for `number` samples, of this rank and of those that make other parts of this call."""
        said = torch.tensor([[mine.get(row, False), row in mine] for row in range(number)], dtype=torch.float32)
        for group in self.owner.context.groups:
            said = all_reduce(said.to(self.device), group)
        return {row: skips > 0 for row, (skips, _) in enumerate(said.tolist())}

    def _changes(self) -> list[float]:
        if self.measured is None or self.kept.reference is None:
            raise RuntimeError("nothing was measured")
        self.owner.memory.waits += 1
        return relative_changes(self.measured, self.kept.reference, self.owner.group)

    def _tell(self, witness: Callable[[Witnessed], None]) -> None:
        """Tells how this call differs from the step before."""
        kept, of, group = self.kept, len(self.rows), self.owner.group
        leaf = kept.seen[kept.span.end - 1].main if kept.span is not None else -1
        if self.measured is None or kept.reference is None or leaf not in kept.residuals or leaf not in self.learned:
            return
        new, old = self.learned[leaf], kept.residuals[leaf].terms[0]
        shares = (own_share(new, of, group), own_share(old, of, group))
        inputs = relative_changes(self.measured, kept.reference, group)
        residuals, sizes = relative_changes(*shares, group), relative_sizes(new, old, of, group)
        witness(Witnessed(self.number, self.moment, self.rows, inputs, residuals, sizes))

    # changes of course

    def _begin(self, leaves: list[Any]) -> None:
        self.device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        self.sizes = _sizes(values(leaves))
        if not self.is_first and self.sizes != self.kept.sizes:
            self.kept, self.is_first = Kept(), True

    def _lose_way(self, unit: nn.Module, original: Forward, leaves: list[Any], spec: TreeSpec, place: int) -> Any:
        """Other units than in the branch's last computed call."""
        if any(self.skipped or ()):
            raise UnsupportedError(
                f"{type(self.owner.root).__name__}: runs other blocks than in the step before, while they are being "
                "skipped; run it without a cache."
            )
        self.learned, self.measured = {}, None
        args, kwargs = tree_unflatten(values(leaves), spec)
        self.is_lost = True
        return original(*args, **kwargs)


def _is_mask_of(x: Any, stream: Tensor | None) -> bool:
    """Whether it tells for each token of a stream (B, S, D) whether it is one, or filler up to the longest sample's."""
    if not isinstance(x, Tensor) or x.dtype != torch.bool or x.ndim < 2 or stream is None or stream.ndim != 3:
        return False
    return x.numel() == stream.shape[0] * stream.shape[1] and (x.shape[0], x.shape[-1]) == tuple(stream.shape[:2])


def _sizes(leaves: list[Any]) -> Any:
    return tuple((tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else None for x in leaves)


def _as(x: Tensor, like: Tensor) -> Tensor:
    """`x` split as `like` is."""
    if isinstance(like, Sharded) and not isinstance(x, Sharded):
        return like.like(like.ranks.take(x, like.token_dim, like.tokens))
    return x
