"""Sequence parallel on a block stack: tokens are split where a block is entered, and only attention communicates.

What a block's arguments mean is data (`BlockPlan`), found by a *prober* that is passed in; this file knows no model.
An *atom* is the smallest run of tokens that belongs together (a stream, or a part of a joint one), named by a number.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.errors import RankError, UnsupportedError
from parafuse.parallel.attention import Call, SequenceAttention
from parafuse.parallel.comm import all_gather
from parafuse.parallel.hooks import Forward, override_forward
from parafuse.parallel.layout import Layout
from parafuse.parallel.mesh import Mesh
from parafuse.parallel.shard import SequenceGroup, Sharded, gather_all

Atoms = tuple[int, ...]


@dataclass(frozen=True)
class TokenDim:
    """A dim of an argument or result that runs over tokens, and which atoms lie along it, in order."""

    dim: int
    atoms: Atoms


@dataclass(frozen=True)
class Site:
    """One attention call of a block. Keys None: they are on every rank (cross-attention), nothing is exchanged."""

    queries: Atoms | None
    keys: Atoms | None


MAX_PROVEN = 4096
"""Sizes that are kept in mind; more are proven again."""


@dataclass(frozen=True)
class BlockPlan:
    """How one block is split, for one structure of arguments. No sites that exchange: it runs on whole tensors."""

    arguments: dict[int, TokenDim] = field(default_factory=dict[int, TokenDim])
    """Leaf number -> token dim; leaves not named are replicated."""
    sites: tuple[Site, ...] = ()
    results: dict[int, TokenDim] = field(default_factory=dict[int, TokenDim])
    """Leaf number of the result -> token dim."""
    why_not_local: str = ""
    """Set where the block cannot run on a rank's rows as if they were all: it then runs on Sharded tensors, which show
    it the whole shape, as the model's code between the blocks does."""

    @property
    def splits(self) -> bool:
        return any(site.keys is not None for site in self.sites)


class Prober(Protocol):
    """Finds the plan of a block for real arguments; with `plan`, only sees whether that one holds for them too."""

    def __call__(
        self, block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec, plan: BlockPlan | None = None
    ) -> BlockPlan: ...


Lengths = dict[int, tuple[int, ...]]


def bind(plan: BlockPlan, leaves: Sequence[Any]) -> Lengths:
    """Atom -> lengths of its segments, from the arguments at hand; those that arrive split decide first."""
    out: Lengths = {}
    named = [(leaves[i], label) for i, label in plan.arguments.items()]
    named.sort(key=lambda pair: not isinstance(pair[0], Sharded))
    for _ in range(len(named)):
        for leaf, label in named:
            unknown = [atom for atom in label.atoms if atom not in out]
            if len(unknown) != 1:
                continue
            if len(label.atoms) == 1 and isinstance(leaf, Sharded) and leaf.token_dim == label.dim:
                out[unknown[0]] = leaf.tokens.lengths
            else:
                known = sum(sum(out[atom]) for atom in label.atoms if atom in out)
                out[unknown[0]] = (leaf.shape[label.dim] - known,)
    return out


class AttentionMode(TorchFunctionMode):
    """Hands each scaled-dot-product attention of one block call to `attend(site number, q, k, v, call)`."""

    def __init__(self, attend: Callable[[int, Tensor, Tensor, Tensor, Call, dict[str, Any]], Tensor]):
        super().__init__()
        self.attend, self.site = attend, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given: dict[str, Any] = dict(zip(_SDPA_ARGUMENTS, args, strict=False))
        given |= kwargs or {}
        if given.get("dropout_p"):
            raise UnsupportedError("attention with dropout: call eval() on the model first")
        site, self.site = self.site, self.site + 1
        call = Call(given.get("attn_mask"), given.get("scale"), bool(given.get("is_causal")))
        return self.attend(site, given["query"], given["key"], given["value"], call, given)


_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Bound:
    """One block call, split: local arguments, attention by site, and results that carry their rows."""

    def __init__(self, plan: BlockPlan, leaves: list[Any], ranks: SequenceGroup, slices: dict[Any, Any]):
        self.plan, self.ranks = plan, ranks
        self.lengths = bind(plan, leaves)
        self._slices = slices
        self.local = [self._local(i, leaf) for i, leaf in enumerate(leaves)]

    def _local(self, index: int, leaf: Any) -> Any:
        label = self.plan.arguments.get(index)
        if label is None:
            return leaf.whole() if isinstance(leaf, Sharded) else leaf
        layout = self.layout(label.atoms)
        if isinstance(leaf, Sharded):
            if leaf.token_dim == label.dim and leaf.tokens == layout:
                return leaf.local
            return self.ranks.take(leaf.whole(), label.dim, layout)
        key = (id(leaf), label.dim, layout)
        # Tables are the same for every block: cut once a call, and again where the model has written into one since
        # (tensors of inference mode do not tell). The leaf is kept alive, so that its id is its own.
        version = None if leaf.is_inference() else leaf._version
        if key not in self._slices or version is None or self._slices[key][1] != version:
            self._slices[key] = (leaf, version, self.ranks.take(leaf, label.dim, layout))
        return self._slices[key][2]

    def layout(self, atoms: Atoms) -> Layout:
        return Layout(tuple(n for atom in atoms for n in self.lengths[atom]), self.ranks.degree)

    def site_layouts(self, site: int) -> tuple[Layout | None, Layout | None]:
        """(queries, keys) of an attention call; None for what every rank has whole."""
        if site >= len(self.plan.sites):
            raise UnsupportedError("the block made more attention calls than when it was examined")
        found = self.plan.sites[site]
        return (
            None if found.queries is None else self.layout(found.queries),
            None if found.keys is None else self.layout(found.keys),
        )

    def wrap(self, result: Any) -> Any:
        """The block's result with its token tensors as Sharded."""
        leaves, spec = tree_flatten(result)
        for i, label in self.plan.results.items():
            leaves[i] = Sharded(leaves[i], label.dim, self.layout(label.atoms), self.ranks)
        return tree_unflatten(leaves, spec)


class SequenceParallel:
    """Split tokens in the blocks of one model. `install` on every rank of the sequence group; calls are collective."""

    def __init__(self, root: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, prober: Prober):
        self.root, self.blocks, self.prober = root, list(blocks), prober
        self.attention = SequenceAttention(mesh)
        self.ranks = SequenceGroup(mesh.sequence_degree, mesh.sequence_rank, mesh.sequence)
        self.plans: dict[Any, BlockPlan] = {}
        self._slices: dict[Any, Any] | None = None
        self._proven: dict[Any, BlockPlan] = {}
        """The plan by structure and sizes, where it has been held against the serial run."""
        self._shortest = sys.maxsize
        """Tokens of the shortest stream of this forward that ran on whole shapes."""
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        self._undo.append(override_forward(self.root, self._root_forward))
        for block in self.blocks:
            self._undo.append(
                override_forward(block, lambda original, block=block: self._block_forward(block, original))
            )

    def remove(self) -> None:
        """Puts every forward back as it was. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def _root_forward(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._slices = {}
            self._shortest = sys.maxsize
            try:
                result = gather_all(original(*args, **kwargs))
            finally:
                self._slices = None
            self._refuse_nothing_split()
            return result

        return forward

    def _refuse_nothing_split(self) -> None:
        """Raises UnsupportedError where every block ran whole: several ranks would do the work of one."""
        if not self.plans or self.ranks.work or any(plan.sites for plan in self.plans.values()):
            return
        if self._shortest <= self.ranks.degree:
            return  # a stream of a token for each rank, at most, says nothing of longer calls
        whole = [f"{name} ({count} times)" for name, count in self.ranks.causes.most_common(3)]
        raise UnsupportedError(
            f"{type(self.root).__name__}: none of its blocks can be split over tokens: "
            + (f"they need whole tokens for {', '.join(whole)}" if whole else "they mix none")
            + ". Run it on one rank (or set its attention backend to native, if it is another one)."
        )

    def _block_forward(self, block: nn.Module, original: Forward) -> Forward:
        name = fingerprint(block)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._slices is None:  # called by itself, outside of the model's own forward
                return original(*args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            key = (name, str(spec), tuple(map(signature, leaves)))
            plan = self._plan_for(key, block, original, leaves, spec)
            if plan.why_not_local:
                return self._on_whole_shapes(plan, original, leaves, spec)
            if not plan.splits:
                return original(*gather_all(args), **gather_all(kwargs))
            bound = Bound(plan, leaves, self.ranks, self._slices)
            local_args, local_kwargs = tree_unflatten(bound.local, spec)
            with AttentionMode(self._attend(bound)) as mode:
                result = original(*local_args, **local_kwargs)
            if mode.site != len(plan.sites):
                raise UnsupportedError(
                    f"{type(block).__name__}: made {mode.site} attention calls through torch's "
                    f"scaled_dot_product_attention, {len(plan.sites)} when it was examined; was its processor "
                    "changed? remove() parafuse, then apply it again."
                )
            return bound.wrap(result)

        return forward

    def _plan_for(self, key: Any, block: nn.Module, original: Forward, leaves: list[Any], spec: TreeSpec) -> BlockPlan:
        """The plan for arguments of this structure, held against the serial run at sizes that are new. Collective at
        these: ranks that find different plans would wait for each other."""
        sizes = (key, tuple(map(size_of, leaves)))
        plan = self._proven.get(sizes)
        if plan is not None:
            return plan
        known = self.plans.get(key)
        if known is None or known.splits:
            whole = gather_all(leaves)
            plan = self.prober(block, original, whole, spec, known)
            self._agree(block, plan, whole)
        else:
            plan = known
        self.plans.setdefault(key, plan)
        if len(self._proven) >= MAX_PROVEN:
            self._proven.clear()
        self._proven[sizes] = plan
        return plan

    def _agree(self, block: nn.Module, plan: BlockPlan, leaves: list[Any]) -> None:
        """Raises RankError on all ranks unless they have found the same plan. Collective; waits for the device."""
        if self.ranks.group is None:
            return
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
        facts = repr((plan.arguments, plan.sites, plan.results, bool(plan.why_not_local)))  # the reason has figures
        mine = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7])
        found = all_gather(torch.tensor([mine], device=device), self.ranks.degree, self.ranks.group.group_name)
        if len(set(found.flatten().tolist())) > 1:
            raise RankError(
                f"{type(block).__name__}: the ranks find different ways to split it (are their devices or weights "
                "different?); run it on one rank."
            )

    def _on_whole_shapes(self, plan: BlockPlan, original: Forward, leaves: list[Any], spec: TreeSpec) -> Any:
        """Runs a block on Sharded tensors: whatever it does is right, and what has no rule gathers."""
        split = list(leaves)
        for i, label in plan.arguments.items():
            split[i] = self._sharded(leaves[i], label.dim)
        args, kwargs = tree_unflatten(split, spec)
        try:
            with AttentionMode(self._attend_whole):
                result = original(*args, **kwargs)
        except RuntimeError as error:
            if type(error).__module__ != "torch._dynamo.exc":
                raise
            part = "flex_attention" if "flex_attention" in str(error) else "a part of itself"
            raise UnsupportedError(f"a block that compiles {part} cannot be split over tokens") from error
        out, result_spec = tree_flatten(result)
        for i, label in plan.results.items():
            out[i] = self._sharded(out[i], label.dim)
        return tree_unflatten(out, result_spec)

    def _sharded(self, x: Any, dim: int) -> Any:
        if isinstance(x, Sharded) or not isinstance(x, Tensor):
            return x
        layout = Layout((x.shape[dim],), self.ranks.degree)
        self._shortest = min(self._shortest, x.shape[dim])
        rows = self.ranks.take(x, dim, layout)
        rows = rows.clone() if rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else rows
        return Sharded(rows, dim, layout, self.ranks).as_borrowed(source=x)

    def _attend_whole(self, site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        """Attention of tensors of which some are Sharded."""
        if not any(isinstance(x, Sharded) for x in (q, k, v)):
            return F.scaled_dot_product_attention(**gather_all(given))
        mask = gather_all(call.mask)
        if isinstance(q, Sharded) and q.ndim in (3, 4):
            tokens = q.ndim - 2
            whole_keys = not isinstance(k, Sharded) and not isinstance(v, Sharded)
            if q.token_dim == tokens and whole_keys:
                rows = dict(
                    self._own_rows(q.tokens, Call(mask, call.scale, call.is_causal), given | {"attn_mask": mask})
                )
                rows["query"] = q.local
                return q.like(F.scaled_dot_product_attention(**rows), tokens)
            if isinstance(k, Sharded) and isinstance(v, Sharded) and k.token_dim == v.token_dim:
                v = v.split_as(k.tokens)
                if q.token_dim == k.token_dim == v.token_dim == tokens:
                    check_mask(mask, q.tokens, k.tokens)
                    self.ranks.work["attention"] += 1
                    q4, k4, v4 = (x.local if x.ndim == 4 else x.local.unsqueeze(0) for x in (q, k, v))
                    whole_call = Call(mask, call.scale, call.is_causal)
                    out = self.attention(q4, k4, v4, q.tokens, k.tokens, whole_call)
                    return q.like(out if q.ndim == 4 else out.squeeze(0), tokens)
                if q.token_dim == k.token_dim == v.token_dim < q.ndim - 2 and q.tokens == k.tokens:
                    self.ranks.work["attention"] += 1
                    if mask is not None and mask.ndim >= q.ndim - q.token_dim:
                        dim = mask.ndim - (q.ndim - q.token_dim)
                        mask = self.ranks.take(mask, dim, q.tokens) if mask.shape[dim] != 1 else mask
                    local_given: dict[str, Any] = {
                        "query": q.local,
                        "key": k.local,
                        "value": v.local,
                        "attn_mask": mask,
                    }
                    return q.like(F.scaled_dot_product_attention(**{**given, **local_given}))
        self.ranks.causes["attention of tokens that are split in different ways"] += 1
        return F.scaled_dot_product_attention(**gather_all(given))

    def _attend(self, bound: Bound) -> Any:
        def attend(site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
            queries, keys = bound.site_layouts(site)
            if queries is None or keys is None:
                return F.scaled_dot_product_attention(**self._own_rows(queries, call, given))
            check_mask(call.mask, queries, keys)
            return self.attention(q, k, v, queries, keys, call)

        return attend

    def _own_rows(self, queries: Layout | None, call: Call, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of an attention to keys that every rank has: of a mask over all queries, this rank's rows."""
        mask = call.mask
        if queries is None:
            return given
        if call.is_causal:
            raise UnsupportedError("causal attention from split tokens to tokens that every rank has")
        if mask is not None and mask.ndim > 1 and mask.shape[-2] == queries.total != 1:
            return given | {"attn_mask": self.ranks.take(mask, mask.ndim - 2, queries)}
        return given


def check_mask(mask: Tensor | None, queries: Layout, keys: Layout) -> None:
    """A mask must be over the whole sequence; one that the block cut or made from local lengths is refused."""
    if mask is None:
        return
    rows = mask.shape[-2] if mask.ndim > 1 else 1
    if mask.shape[-1] not in (1, keys.total) or rows not in (1, queries.total):
        raise UnsupportedError(
            f"attention mask of shape {tuple(mask.shape)} for {queries.total} queries and {keys.total} keys: "
            "the block makes its mask from the tokens it is given, so it cannot be split"
        )


def size_of(leaf: Any) -> Any:
    """What of an argument may change from call to call and could mislead a plan: sizes, and whole numbers."""
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, int) else None


def signature(leaf: Any) -> Any:
    """What of an argument decides how a block is split: its structure, never its lengths."""
    if isinstance(leaf, Tensor):
        return (leaf.dtype, tuple(min(size, 2) for size in leaf.shape))
    return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf).__name__


def fingerprint(block: nn.Module) -> str:
    """Equal for blocks that differ in weights only: class, submodules with their shapes, and all other attributes."""
    facts = [
        (name, key, _fact(value))
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if key not in _MODULE_STATE and not isinstance(value, (Tensor, nn.Module))
    ]
    return f"{type(block).__module__}.{block!r}{facts}"


_MODULE_STATE = {*vars(nn.Module()), "forward"}


def _fact(value: Any, depth: int = 2) -> Any:
    """A value for comparison: plain ones as they are, objects (attention processors, say) by type and attributes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_fact(item, depth) for item in value]
    if isinstance(value, dict):
        return [(str(key), _fact(item, depth)) for key, item in value.items()]
    name = getattr(value, "__qualname__", None)
    if name is not None:  # a function or a class
        return f"{getattr(value, '__module__', '')}.{name}"
    kept = _fact(vars(value), depth - 1) if depth and hasattr(value, "__dict__") else None
    return (f"{type(value).__module__}.{type(value).__qualname__}", kept)
