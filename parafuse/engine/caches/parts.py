"""Reuses what parts of blocks gave in an earlier step. What decides stands outside of sequence parallel and of compiled
blocks; the parts themselves, inside of both, look into a cell: the tensors in it go into a compiled block as arguments
and come out as results, so that blocks of a kind share one graph that computes and one that reuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from parafuse.cache import Cache
from parafuse.engine.caches.anatomy import Part, candidates, parts_of
from parafuse.engine.caches.caching import Caching
from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.forecast import chosen, local_of, with_local
from parafuse.engine.caches.memory import Decision
from parafuse.engine.caches.schedules import Schedule, is_kept, schedule_of
from parafuse.errors import ConfigError, UnsupportedError
from parafuse.parallel.block_plan import BlockPlan, Prober
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.fingerprint import fingerprint, signature
from parafuse.parallel.hooks import Forward, override, override_forward
from parafuse.parallel.reused import Explicit
from parafuse.parallel.shard import Sharded, gather_all


@dataclass(eq=False)
class Cell:
    """What passes between a block's call and its parts while the call runs."""

    is_on: bool = False
    """Off in calls that are made to learn something: parts then do what they always did."""
    reuses: list[bool] = field(default_factory=list[bool])
    """By number of the part."""
    copies: list[bool] = field(default_factory=list[bool])
    """By number: the block writes into what the part gives, so that what is kept must be another tensor."""
    given: list[list[Any]] = field(default_factory=list[list[Any]])
    """By number: results that stand for the part's calls, in order."""
    made: list[list[Any]] = field(default_factory=list[list[Any]])
    """By number: results of the part's calls, in order."""

    def part(self, number: int, original: Forward) -> Forward:
        """What stands for the forward of a part. torch.compile looks into it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.is_on:
                return original(*args, **kwargs)
            if self.reuses[number]:
                result = self.given[number].pop(0)
            else:
                result = original(*args, **kwargs)
                self.made[number].append(result)
            return _copied(result) if self.copies[number] else result

        return forward


@dataclass(eq=False)
class Host:
    """A block that has parts."""

    path: str
    block: nn.Module
    plain: Forward
    """Its forward without what parafuse puts on it."""
    kind: str
    """Equal for blocks that are alike."""
    modules: dict[str, nn.Module]
    """Name -> what may be a part, by number: those that were there when the cache was put on."""
    cell: Cell = field(default_factory=Cell)
    left_out: frozenset[int] = frozenset()
    """Attention calls that the call at hand does not make."""


@dataclass
class Output:
    """What one part gave in one call of its block."""

    results: list[Any]
    """By call of the part: a tensor, or a tuple of tensors and None. Of Sharded tensors, this rank's rows."""

    @property
    def tensors(self) -> list[Tensor]:
        return [local_of(x) for x in tree_leaves(self.results) if isinstance(x, Tensor)]


@dataclass
class KeptBlock:
    """Of one call of one block in a branch's call of the denoiser."""

    sizes: Any
    """Shapes of its arguments, but for their samples."""
    outputs: dict[int, list[Output]] = field(default_factory=dict[int, list[Output]])
    """Number of the part -> its last outputs, the newest first."""


@dataclass
class KeptParts:
    """Of one branch."""

    rows: tuple[int, ...] = ()
    """The samples it has, as places in the whole batch. None of branches that are made from another."""
    blocks: dict[tuple[str, int], KeptBlock] = field(default_factory=dict[tuple[str, int], KeptBlock])
    """(name of the block, which of its calls) -> what is kept of it."""

    @property
    def outputs(self) -> list[Output]:
        return [one for block in self.blocks.values() for outputs in block.outputs.values() for one in outputs]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for one in self.outputs for x in one.tensors)

    def narrow(self, rows: tuple[int, ...]) -> bool:
        """Keeps these samples alone; False where it has not all of them, or cannot tell them apart."""
        if rows == self.rows:
            return True
        of = len(self.rows)
        if not set(rows) <= set(self.rows):
            return False
        places = [self.rows.index(row) for row in rows]
        try:
            fewer = [tree_map_only(Tensor, lambda x: chosen(x, places, of), one.results) for one in self.outputs]
        except UnsupportedError:
            return False
        for one, results in zip(self.outputs, fewer, strict=True):
            one.results = results
        self.rows = rows
        return True


class PartReuse(Caching):
    """The cache of one denoiser that reuses parts of its blocks. Makes no exchange of its own, but for the first call
    of a block of each kind, whose arguments are gathered."""

    def __init__(
        self, root: nn.Module, blocks: dict[str, nn.Module], cache: Cache, *, clock: Clock, context: CallContext
    ):
        super().__init__(root, clock, context)
        self.cache, self.schedule = cache, schedule_of(cache)
        self.hosts = {
            block: Host(path, block, block.forward, fingerprint(block), candidates(block))
            for path, block in blocks.items()
        }
        self._parts: dict[Any, tuple[Part, ...]] = {}
        """By kind of block and structure of its arguments."""
        self._call: _Call | None = None

    def install(self) -> None:
        super().install()
        for host in self.hosts.values():
            for number, part in enumerate(host.modules.values()):
                replacement: Any = host.cell.part(number, part.forward)
                replacement.parafuse_part = True
                self._undo.append(override(part, "forward", replacement))
            self._undo.append(override_forward(host.block, lambda original, host=host: self._block(host, original)))

    def without(self, prober: Prober) -> Prober:
        """The prober of blocks with parts that do what they always did."""

        def quiet(
            block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec, plan: BlockPlan | None = None
        ) -> BlockPlan:
            with self._off(self.hosts.get(block)):
                return prober(block, forward, leaves, spec, plan)

        return quiet

    def left_out(self, block: nn.Module) -> frozenset[int]:
        """The attention calls that a block does not make in the call at hand."""
        return self.hosts[block].left_out if block in self.hosts else frozenset()

    def variant(self, block: nn.Module) -> Any:
        """What its parts do in the call at hand."""
        cell = self.hosts[block].cell if block in self.hosts else None
        return (tuple(cell.reuses), tuple(cell.copies)) if cell is not None and cell.is_on else None

    def explicit(self, block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec) -> Explicit:
        """The same call with what passes through the cell as arguments and results."""
        cell = self.hosts[block].cell if block in self.hosts else Cell()
        if not cell.is_on:
            return Explicit(forward, leaves, spec, lambda result: result)

        def run(*args: Any, kept: tuple[Any, ...], **kwargs: Any) -> Any:
            cell.given, cell.made = [list(results) for results in kept[0]], [[] for _ in kept[0]]
            return forward(*args, **kwargs), cell.made

        def finish(found: Any) -> Any:
            result, cell.made = found
            return result

        args, kwargs = tree_unflatten(leaves, spec)
        passed = {"kept": (cell.given, cell.reuses, cell.copies)}  # flags too, as a record holds for these alone
        return Explicit(run, *tree_flatten((args, kwargs | passed)), finish)

    def parts(self, host: Host, args: Any, kwargs: Any) -> tuple[Part, ...]:
        """Those of a block with such arguments. Collective where streams are split and the block is of a new kind."""
        leaves, spec = tree_flatten((args, kwargs))
        key = (host.kind, str(spec), tuple(map(signature, leaves)))
        if key not in self._parts:
            self._parts[key] = parts_of(host, gather_all(leaves), spec)
        return self._parts[key]

    @contextmanager
    def _off(self, host: Host | None) -> Iterator[None]:
        cell = host.cell if host else Cell()
        before, cell.is_on = cell.is_on, False
        try:
            yield
        finally:
            cell.is_on = before

    def _root(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.context.is_trial or self._call is not None:
                return original(*args, **kwargs)
            call = self._call = _Call(self, self.rows_of(args, kwargs))
            try:
                result = original(*args, **kwargs)
                call.commit()
            except BaseException:
                self.memory.branches.pop(call.branch, None)  # it has this step's of some blocks only
                raise
            finally:
                self._call = None
            return result

        return forward

    def renew(self) -> None:
        """Attention processors or adapters were changed, and with them the parts' attention."""
        super().renew()
        for host in self.hosts.values():
            host.kind = fingerprint(host.block)

    def _block(self, host: Host, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._call is None or self.context.is_trial:
                return original(*args, **kwargs)
            return self._call.block(host, original, args, kwargs)

        return forward


class _Call:
    """One call of the denoiser."""

    def __init__(self, owner: PartReuse, rows: tuple[int, ...]):
        self.owner, self.rows = owner, rows
        self.schedule: Schedule = owner.schedule
        self.step, self.total = owner.clock.step, owner.clock.total
        self.branch, self.number = owner.context.branch, owner.context.number
        leading = owner.context.leading
        self.leading = rows if leading is None else tuple(row for row in rows if row in leading)
        """Samples of which parts are kept."""
        self.decided = (self.leading or rows) if owner.context.leads_only else rows
        self.may_reuse = self.leading == rows and (leading is None or owner.context.leads_only)
        kept: KeptParts = owner.memory.branches.get(self.branch) or KeptParts(self.leading)
        self.kept = kept if kept.narrow(self.leading) else KeptParts(self.leading)
        owner.memory.branches[self.branch] = self.kept
        self.calls: Counter[str] = Counter()
        self.has_reused = self.has_parts = False

    def block(self, host: Host, original: Forward, args: Any, kwargs: Any) -> Any:
        """A block's call, in which parts are computed or stand for what they gave before."""
        parts = [part for part in self.owner.parts(host, args, kwargs) if part.kind in self.schedule.kinds]
        if not parts:
            return original(*args, **kwargs)
        self.has_parts = True
        key, sizes = (host.path, self.calls[host.path]), _sizes((args, kwargs))
        self.calls[host.path] += 1
        kept = self.kept.blocks.get(key)
        if kept is None or kept.sizes != sizes:
            kept = self.kept.blocks[key] = KeptBlock(sizes)
        cell = host.cell
        cell.reuses, cell.copies = [False] * len(host.modules), [False] * len(host.modules)
        cell.given, cell.made = ([[] for _ in range(len(host.modules))] for _ in range(2))
        for part in parts:
            cell.copies[part.number] = part.is_written
            outputs = kept.outputs.get(part.number)
            if outputs and self.may_reuse and self.schedule.reuses(part.kind, self.step, self.total):
                cell.reuses[part.number] = True
                cell.given[part.number] = self._forecast(outputs)
                self.has_reused = True
        host.left_out = frozenset(site for part in parts if cell.reuses[part.number] for site in part.sites)
        cell.is_on = True
        try:
            result = original(*args, **kwargs)
            self._keep(kept, parts, cell)
        finally:
            cell.is_on, host.left_out = False, frozenset()
            cell.given, cell.made = [], []
        return result

    def _keep(self, kept: KeptBlock, parts: list[Part], cell: Cell) -> None:
        for part in parts:
            if cell.reuses[part.number]:
                continue
            is_used = self.leading and is_kept(self.schedule, part.kind, self.step, self.total)
            if cell.made[part.number] and is_used:
                new = Output(tree_map(self._own, cell.made[part.number]))
                kept.outputs[part.number] = [new, *kept.outputs.get(part.number, [])][: self.schedule.depth]
            else:
                kept.outputs.pop(part.number, None)

    def _own(self, x: Any) -> Any:
        """What is kept of a result: the samples that are, and of a Sharded tensor this rank's rows, without what they
        were copied from."""
        if not isinstance(x, Tensor):
            return x
        if self.leading != self.rows:
            x = chosen(x, [self.rows.index(row) for row in self.leading], len(self.rows))
        return x.like(x.local) if isinstance(x, Sharded) else x

    def _forecast(self, outputs: list[Output]) -> list[Any]:
        """The last output, or what lies beyond the last two."""
        slope = self.schedule.slope(self.step, self.total)
        if len(outputs) < 2 or not slope:
            return list(outputs[0].results)

        def beyond(last: Any, before: Any) -> Any:
            if not isinstance(last, Tensor):
                return last
            return with_local(last, local_of(last) + (local_of(last) - local_of(before)) * slope)

        return tree_map(beyond, outputs[0].results, outputs[1].results)

    def commit(self) -> None:
        """Puts on record what was decided; after the call ended well."""
        if self.schedule.kinds and not self.has_parts:
            raise UnsupportedError(
                f"{type(self.owner.root).__name__}: cache {self.owner.cache.method}: none of its blocks has "
                f"{' or '.join(sorted(self.schedule.kinds))} of its own to reuse; run it without this cache."
            )
        memory, replay = self.owner.memory, self.owner.replay
        if replay is not None and any(replay(self.number, row) != self.has_reused for row in self.decided):
            raise ConfigError(
                f"plan.replay: call {self.number + 1} is decided otherwise by the schedule of cache {self.owner.cache}."
            )
        memory.steps[self.number] = self.step
        memory.decisions[self.number] = {row: Decision(self.has_reused) for row in self.decided}
        memory.most_bytes = max(memory.most_bytes, memory.nbytes)


def _copied(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.clone()
    return tuple([x if x is None else x.clone() for x in result])


def _sizes(tree: Any) -> Any:
    return tuple((tuple(x.shape[1:]), x.dtype) for x in tree_leaves(tree) if isinstance(x, Tensor))
