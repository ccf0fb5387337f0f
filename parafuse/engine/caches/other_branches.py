"""Makes the other branches of guidance from the leading one, where the schedule says so. Stands outside of all that
shares calls between ranks, where every rank passes with every call and has its whole result."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from parafuse.cache import FasterCache
from parafuse.engine.caches.guided import Part, apart, together, weighed
from parafuse.engine.caches.memory import Decision
from parafuse.engine.caches.parts import PartReuse
from parafuse.errors import ConfigError
from parafuse.log import note
from parafuse.parallel.hooks import Forward, OnForward
from parafuse.parallel.placeholder import Placeholder, settled


class OtherBranches(OnForward):
    """On one denoiser. Branches are calls on the same latents, or batches on top of each other in one call."""

    def __init__(self, caching: PartReuse):
        super().__init__(caching.root)
        self._caching = caching
        self._weight = caching.cache.frequency_weight if isinstance(caching.cache, FasterCache) else 0.0
        self._channels = _channels_of(caching.root)
        self._has_said = False

    def _forward(self, original: Forward) -> Forward:
        context = self._caching.context

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._caching.is_off:
                return original(*args, **kwargs)
            try:
                return self._call(original, args, kwargs)
            except BaseException:
                self._caching.memory.drop()
                raise
            finally:
                context.leading, context.is_whole = None, True

        return forward

    def _call(self, original: Forward, args: Any, kwargs: Any) -> Any:
        caching, context, clock = self._caching, self._caching.context, self._caching.clock
        guided = caching.memory.guided
        batch = len(caching.rows_of(args, kwargs))
        each = self._samples(batch)
        stacks = batch // each if each and batch % each == 0 else 1
        sizes = _sizes(caching.sample_of(args, kwargs))
        parts: list[Part] = [(context.branch, place, sizes) for place in range(stacks)]
        wants = caching.schedule.leads_only(clock.step, clock.total)
        if context.follows:
            return self._other(parts, wants, original, args, kwargs)
        leading, others = parts[-1], parts[:-1]
        guided.begin(clock.step, keeps=wants)
        context.is_whole = each is None or not wants or not guided.knows(leading, others)
        context.leading = () if each is None else tuple(range(batch - batch // stacks, batch))
        result = original(*args, **kwargs)
        if stacks == 1:
            guided.leading = (leading, _own(result)) if each is not None else None
            return result
        results = apart(settled(result), batch, stacks)
        if context.is_whole:
            for other, its in zip(others, results, strict=False):
                guided.learn(clock.step, leading, results[-1], other, its)
            self._count_bytes()
            return result
        made = [guided.made(leading, results[-1], other, self._weigh) for other in others]
        self._record(range(batch - batch // stacks))
        return together([*made, results[-1]], batch // stacks)

    def _samples(self, batch: int) -> int | None:
        """Samples of each branch in a batch; None: not told yet."""
        clock = self._caching.clock
        if clock.counts and clock.samples is None and clock.step == 0:
            return None
        if clock.counts and (clock.samples is None or batch % clock.samples) and not self._has_said:
            self._has_said = True
            note(
                f"{type(self._caching.root).__name__}: what its scheduler steps does not tell how many branches of "
                f"guidance a batch of {batch} has; all of them are computed"
            )
        return clock.samples if clock.counts and clock.samples is not None else batch

    def _other(self, parts: list[Part], wants: bool, original: Forward, args: Any, kwargs: Any) -> Any:
        """A call after the leading one of its step."""
        guided, context = self._caching.memory.guided, self._caching.context
        if guided.leading is not None and len(parts) == 1 and wants and guided.knows(guided.leading[0], parts):
            leading, its = guided.leading[0], settled(guided.leading[1])
            guided.leading = (leading, its)
            self._record(range(len(self._caching.rows_of(args, kwargs))))
            return guided.made(leading, its, parts[0], self._weigh)
        context.leading, context.is_whole = (), False
        result = original(*args, **kwargs)
        if guided.leading is not None and len(parts) == 1 and guided.is_last(parts[0], _own(result)):
            leading, its = guided.leading[0], settled(guided.leading[1])
            for other, found in guided.waiting:
                guided.learn(self._caching.clock.step, leading, its, other, settled(found))
            guided.waiting.clear()
            self._count_bytes()
        return result

    def _weigh(self, difference: Tensor) -> Tensor:
        clock = self._caching.clock
        passed = clock.step / clock.total if clock.total else None
        return weighed(difference, self._weight, passed, self._channels)

    def _record(self, made: range) -> None:
        """Samples that were made from others."""
        memory, replay, number = self._caching.memory, self._caching.replay, self._caching.context.number
        if replay is not None and not all(replay(number, row) for row in made):
            raise ConfigError(
                f"plan.replay: call {number + 1} is decided otherwise by the schedule of cache {self._caching.cache}."
            )
        memory.steps[number] = self._caching.clock.step
        memory.decisions.setdefault(number, {}).update({row: Decision(True) for row in made})
        memory.decisions[number] = dict(sorted(memory.decisions[number].items()))

    def _count_bytes(self) -> None:
        memory = self._caching.memory
        memory.most_bytes = max(memory.most_bytes, memory.nbytes)


def _own(result: Any) -> Any:
    """A result that nobody else writes into; of placeholders as they are."""
    return tree_map_only(Tensor, lambda x: x if isinstance(x, Placeholder) else x.clone(), result)


def _sizes(sample: Any) -> Hashable:
    """Of each sample."""
    return tuple(x.shape[1:] if x is sample else x.shape for x in tree_leaves(sample) if isinstance(x, Tensor))


def _channels_of(module: nn.Module) -> tuple[int, ...]:
    """How many channels the results of a denoiser may have, as its configuration tells."""
    config: Any = getattr(module, "config", {})
    names = ("out_channels", "in_channels", "out_visual_dim", "in_visual_dim")
    return tuple(config[name] for name in names if isinstance(config.get(name), int))
