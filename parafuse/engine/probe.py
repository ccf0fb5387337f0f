"""Finds out how a block can be split, by looking at what it does. No model is known here; shapes alone prove nothing.

The block runs on its real arguments with attention replaced by constants. One index of one argument is changed at a
time, and what changes at the attention sites and in the results is looked at: a dim is a token dim because changing
index i changes exactly row i + offset of the queries, keys or results, and nothing else. The same test refuses blocks
that mix tokens outside of attention. Last, the block is run once per simulated rank and compared with the serial run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from parafuse.engine.alignment import Alignment, Atoms, Interval, Node, Place
from parafuse.errors import UnsupportedError
from parafuse.kernels.attention import Call
from parafuse.parallel.attention_mode import AttentionMode
from parafuse.parallel.block_plan import KEPT, BlockPlan, Bound, Site, TokenDim
from parafuse.parallel.hooks import Forward
from parafuse.parallel.layout import Layout
from parafuse.parallel.shard import SequenceGroup, Sharded

SIMULATED_DEGREES = (2, 3)
Noise = Callable[[tuple[int, ...], Tensor, int], Tensor]
"""(shape, like, seed) -> what stands for the result of an attention."""
MAX_ERROR = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Seen:
    """What one run of the block showed: q, k, v and the rest of each attention call, and the leaves of the result."""

    sites: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    injected: list[Tensor] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


class Examined:
    """One block with one set of real arguments, run again and again with small changes."""

    def __init__(
        self, block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec, noise: Noise | None = None
    ):
        self.name, self.forward, self.leaves, self.spec = type(block).__name__, forward, leaves, spec
        self.noise = noise or _noise
        self.names = [leaf_name(i, spec, leaves) for i in range(len(leaves))]
        self.base = self.run(leaves, [])

    def run(self, leaves: list[Any], injected: list[Tensor]) -> Seen:
        """Runs the block; attention call i returns `injected[i]`, or a fixed random tensor."""
        seen = Seen()

        def attend(site: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
            if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
                raise self.refusal(
                    f"attention {site} has queries of {q.ndim} dims; (batch, heads, tokens, size) is needed"
                )
            seen.sites.append((q.detach().clone(), k.detach().clone(), v.detach().clone()))
            seen.calls.append(call)
            shape = (*q.shape[:3], v.shape[-1])
            known = site < len(injected) and injected[site].shape == shape
            out = injected[site] if known else self.noise(shape, v, site)
            seen.injected.append(out)
            return out

        args, kwargs = tree_unflatten([owned(x) for x in leaves], self.spec)
        with torch.no_grad(), AttentionMode(attend):
            result = self.forward(*args, **kwargs)
        seen.results = [x.detach().clone() if isinstance(x, Tensor) else x for x in tree_flatten(result)[0]]
        return seen

    def refusal(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.name}: cannot be split over tokens: {why}")

    def changed(self, leaf: int, dim: int, index: int) -> Seen:
        """The run with one index of one argument changed."""
        leaves = list(self.leaves)
        leaves[leaf] = _disturbed(leaves[leaf], dim, index)
        return self.run(leaves, self.base.injected)

    def changed_attention(self, site: int, index: int) -> Seen:
        """The run with one row of one attention result changed."""
        injected = list(self.base.injected)
        injected[site] = _disturbed(injected[site], 2, index)
        return self.run(self.leaves, injected)


def probe(block: nn.Module, forward: Forward, leaves: list[Any], spec: TreeSpec) -> BlockPlan:
    """How `block` is split for arguments of this structure. Local: no communication, the same answer on every rank.

    Raises UnsupportedError, naming the block and what was seen, when it cannot be split."""
    if any(isinstance(leaf, Sharded) for leaf in leaves):
        raise TypeError("probe needs whole tensors")
    examined = Examined(block, forward, leaves, spec)
    if not examined.base.sites:
        return BlockPlan()
    sites = examined.base.sites
    alignment = Alignment({Place("qk"[part], i, 2): s[part].shape[2] for i, s in enumerate(sites) for part in (0, 1)})
    for site, (q, *_) in enumerate(sites):
        alignment.add(Interval(Place("q", site, 2), 0, Node("attention", site, 2), q.shape[2]))
    spread: dict[Node, str] = {}
    for ends in argument_ends(examined):
        _record(alignment, spread, examined, ends)
    alignment.settle_doubtful()
    for ends in _attention_ends(examined, alignment.cuts()):
        _record(alignment, spread, examined, ends)
    alignment.settle_doubtful()
    plan = _plan(alignment.solve(), spread, examined)
    if plan.splits:
        _refuse_mostly_kept(examined, plan)
        for degree in SIMULATED_DEGREES:
            _simulate(examined, plan, degree)
    return plan


def prove(
    plan: BlockPlan,
    block: nn.Module,
    forward: Forward,
    leaves: list[Any],
    spec: TreeSpec,
    noise: Noise | None = None,
) -> None:
    """Raises UnsupportedError unless `plan` gives these arguments' serial result on simulated ranks. Local; 6 runs."""
    examined = Examined(block, forward, leaves, spec, noise)
    if len(examined.base.sites) != len(plan.sites):
        raise examined.refusal(f"it makes {len(examined.base.sites)} attention calls, {len(plan.sites)} at other sizes")
    for degree in SIMULATED_DEGREES:
        _simulate(examined, plan, degree)


@dataclass(frozen=True)
class Ends:
    """Runs in which the first and the last of the rows [offset, offset + length) of `node` were changed."""

    node: Node
    offset: int
    length: int
    seen: tuple[Seen, Seen]


def argument_ends(examined: Examined, only: int | None = None) -> Iterator[Ends]:
    """For every dim of every tensor argument, or of that one."""
    for leaf, value in enumerate(examined.leaves):
        if only is not None and leaf != only:
            continue
        if not isinstance(value, Tensor) or value.numel() == 0:
            continue
        for dim, length in enumerate(value.shape):
            first = examined.changed(leaf, dim, 0)
            last = examined.changed(leaf, dim, length - 1) if length > 1 else first
            yield Ends(Node("argument", leaf, dim), 0, length, (first, last))


def _attention_ends(examined: Examined, cuts: dict[Node | Place, set[int]]) -> Iterator[Ends]:
    """For every run of query rows that belongs together, in the result of that attention."""
    for site in range(len(examined.base.sites)):
        bounds = sorted(cuts[Place("q", site, 2)])
        for start, stop in pairwise(bounds):
            first = examined.changed_attention(site, start)
            last = examined.changed_attention(site, stop - 1) if stop - start > 1 else first
            yield Ends(Node("attention", site, 2), start, stop - start, (first, last))


def _record(alignment: Alignment, spread: dict[Node, str], examined: Examined, ends: Ends) -> None:
    """Adds where the rows of `ends.node` appear, and in `spread` where one of them reaches several rows or others."""
    base, node, length = examined.base, ends.node, ends.length
    for site, whole in enumerate(base.sites):
        for part in range(3):
            tensor = whole[part]
            runs = [_rows_gone(tensor, seen.sites[site][part]) for seen in ends.seen]
            rows = [_rows(tensor, seen.sites[site][part], 2) for seen in ends.seen]
            if any(runs):
                alignment.unsteady.setdefault(Place("qkk"[part], site, 2), []).extend(run for run in runs if run)
                spread.setdefault(node, f"it decides how many rows {'qkv'[part]} has at attention {site}")
            elif tensor.shape[2] == 1 and length == 1:  # one row in all: token or conditioning, other places tell
                if rows[0]:
                    alignment.doubtful.append(Interval(Place("qkk"[part], site, 2), 0, node, 1, ends.offset))
            elif len(rows[0]) == len(rows[1]) == 1 and rows[1][0] - rows[0][0] == length - 1:
                alignment.add(Interval(Place("qkk"[part], site, 2), rows[0][0], node, length, ends.offset))
            elif any(rows):
                many = max(map(len, rows))
                how = f"one row changes {many} rows of" if many > 1 else "rows change places in"
                spread.setdefault(node, f"{how} {'qkv'[part]} at attention {site}")
    for number, tensor in enumerate(base.results):
        if not isinstance(tensor, Tensor):
            continue
        found, mixed = _result_dim(tensor, ends, [s.results[number] for s in ends.seen])
        if found is not None:
            single = tensor.shape[found[0]] == 1 and length == 1
            keep = alignment.doubtful.append if single else alignment.add
            keep(Interval(Place("result", number, found[0]), found[1], node, length, ends.offset))
        elif mixed:
            spread.setdefault(node, f"one row changes several rows of result {number}")


def _result_dim(tensor: Tensor, ends: Ends, seen: list[Tensor]) -> tuple[tuple[int, int] | None, bool]:
    """((dim, first row) along which the rows lie in a result, or None; whether one row reaches several everywhere)."""
    rows = [[_rows(tensor, other, dim) for other in seen] for dim in range(tensor.ndim)]
    found = [
        (dim, first[0])
        for dim, (first, last) in enumerate(rows)
        if len(first) == len(last) == 1 and last[0] - first[0] == ends.length - 1
    ]
    if ends.length == 1:  # every dim of size 1 fits: take one that is longer, else the argument's own
        found.sort(key=lambda c: (tensor.shape[c[0]] == 1, c[0] != ends.node.dim))
    counts = [max(len(first), len(last)) for dim, (first, last) in enumerate(rows) if tensor.shape[dim] > 1]
    return (found[0] if found else None), bool(counts) and min(counts) > 1


def _plan(atoms: Atoms, spread: dict[Node, str], examined: Examined) -> BlockPlan:
    """Chooses what is split: all atoms of sites whose queries attend to themselves; the rest is replicated."""
    sides = [
        (atoms.get(Place("q", i, 2), [None]), atoms.get(Place("k", i, 2), [None]))
        for i in range(len(examined.base.sites))
    ]
    split: set[int] = set()
    for queries, keys in sides:
        if _named(queries) & _named(keys):
            split |= _named(queries) | _named(keys)
    given = _from_arguments(atoms)
    split &= given
    tokens = split.union(*(_named(queries) & given for queries, _ in sides))
    if not split:
        _refuse_unknown_rows(examined, [_named(queries) & given for queries, _ in sides])
    sites = tuple(_site(examined, i, queries, keys, split) for i, (queries, keys) in enumerate(sides))
    arguments: dict[int, TokenDim] = {}
    results: dict[int, TokenDim] = {}
    for node, pieces in atoms.items():
        if node in spread and any(a in tokens for a in pieces):
            name = examined.names[node.index] if node.kind == "argument" else f"the result of attention {node.index}"
            raise examined.refusal(f"tokens mix outside of attention: in {name}, {spread[node]}")
        if node.kind not in ("argument", "result") or not any(a in split for a in pieces):
            continue
        if not all(a in split for a in pieces):
            raise examined.refusal(f"only a part of {node.kind} {node.index} is token rows")
        target = arguments if node.kind == "argument" else results
        if node.index in target:
            shape = (examined.leaves if node.kind == "argument" else examined.base.results)[node.index].shape
            if not shape[node.dim] == shape[target[node.index].dim] == 1:
                raise examined.refusal(f"{node.kind} {node.index} has two token dims")
            if node.dim < target[node.index].dim:
                continue  # a batch of one token: both dims fit, and cutting either is the same; batch dims come first
        target[node.index] = TokenDim(node.dim, tuple(a for a in pieces if a is not None))
    return BlockPlan(arguments, sites, results)


def _site(examined: Examined, number: int, queries: list[int | None], keys: list[int | None], split: set[int]) -> Site:
    """What of one attention call is split. Refuses calls that mix split rows with rows that every rank has."""
    sides = [_side(pieces, split) for pieces in (queries, keys)]
    for what, side in zip(("queries", "keys"), sides, strict=True):
        if side.count(KEPT) > 1:
            raise examined.refusal(f"the {what} of attention {number} mix split rows with rows that every rank has")
    have_q, have_k = (side if any(a in split for a in side) else None for side in sides)
    return Site(sides[0] if have_k else have_q, have_k)


def _side(pieces: list[int | None], split: set[int]) -> tuple[int, ...]:
    """The split atoms of an attention's rows; `KEPT` for each run of others."""
    side: list[int] = []
    for atom in pieces:
        if atom in split:
            side.append(atom)
        elif side[-1:] != [KEPT]:
            side.append(KEPT)
    return tuple(side)


def _refuse_unknown_rows(examined: Examined, queries: list[set[int]]) -> None:
    """Nothing splits: fine for one token, or for cross-attention alone, but not for shuffled or folded tokens."""
    for site, known in enumerate(queries):
        if examined.base.sites[site][0].shape[2] > 1 and not known:
            raise examined.refusal(f"the rows of attention {site} are not the tokens of any argument, in their order")


def _refuse_mostly_kept(examined: Examined, plan: BlockPlan) -> None:
    """Rows that every rank has are computed on every rank: that is no gain where they are most of the queries."""
    for site, (queries, _) in enumerate(Bound(plan, examined.leaves, SequenceGroup(2, 0, None), {}).sites):
        if queries is not None and examined.base.sites[site][0].shape[2] > 2 * queries.total:
            raise examined.refusal(f"most rows of attention {site} are not the tokens of any argument, in their order")


def _named(pieces: list[int | None]) -> set[int]:
    return {a for a in pieces if a is not None}


def _from_arguments(atoms: Atoms) -> set[int]:
    """Atoms that come in with an argument: others (learned tokens, say) are the same on every rank."""
    return {a for node, pieces in atoms.items() if node.kind == "argument" for a in pieces if a is not None}


def _simulate(examined: Examined, plan: BlockPlan, degree: int) -> None:
    """Runs the block as each of `degree` ranks would, and compares with its rows of the serial run."""
    base = examined.base
    for rank in range(degree):
        ranks = SequenceGroup(degree, rank, None)
        bound = Bound(plan, examined.leaves, ranks, {})
        injected, expected = [], []
        for site, out in enumerate(base.injected):
            whole = (out, base.sites[site][1])
            layouts = [
                layout and layout.with_kept(x.shape[2] - layout.total)
                for layout, x in zip(bound.sites[site], whole, strict=True)
            ]
            injected.append(ranks.take(out, 2, layouts[0]) if layouts[0] else out)
            expected.append(layouts)
        try:
            seen = examined.run(bound.local, injected)
        except (RuntimeError, ValueError, IndexError) as error:
            first = str(error).partition("\n")[0]
            raise examined.refusal(
                f"with {degree} simulated ranks, it fails on a part of the tokens ({first}); "
                "does the block take a length or a grid as a number?"
            ) from error
        if len(seen.sites) != len(base.sites):
            raise UnsupportedError(f"{examined.name}: makes {len(seen.sites)} attention calls on a part of the tokens")
        for site, (layout_q, layout_k) in enumerate(expected):
            _compare_calls(examined, site, seen.calls[site], base.calls[site])
            for part, layout in ((0, layout_q), (1, layout_k), (2, layout_k)):
                whole = base.sites[site][part]
                name = f"{'qkv'[part]} of attention {site}"
                _compare(examined, name, ranks, whole, seen.sites[site][part], 2, layout)
        for number, whole in enumerate(base.results):
            label = plan.results.get(number)
            if isinstance(whole, Tensor):
                dim, layout = (label.dim, bound.layout(label.atoms)) if label else (0, None)
                _compare(examined, f"result {number}", ranks, whole, seen.results[number], dim, layout)


def _compare_calls(examined: Examined, site: int, local: Call, whole: Call) -> None:
    """Raises UnsupportedError when a block makes its mask or its scale from the tokens it is given."""
    masks = [x.mask for x in (local, whole) if x.mask is not None]
    if len(masks) == 1 or (masks and not torch.equal(*masks)):
        what = "mask"
    elif (local.scale, local.is_causal) != (whole.scale, whole.is_causal):
        what = "scale"
    else:
        return
    raise examined.refusal(f"it makes the {what} of attention {site} from the number of tokens it is given")


def _compare(
    examined: Examined, what: str, ranks: SequenceGroup, whole: Tensor, local: Tensor, dim: int, layout: Layout | None
) -> None:
    """Raises UnsupportedError when the true rows of `local` are not this rank's rows of `whole`."""
    want = whole if layout is None else ranks.take(whole, dim, layout)
    if want.shape != local.shape:
        seen = f"shape {tuple(local.shape)} where {tuple(want.shape)} was expected"
    else:
        if layout is not None:
            keep = _true_rows(layout, ranks.rank, want.device)
            want, local = want.index_select(dim, keep), local.index_select(dim, keep)
        if not want.is_floating_point() or not want.numel():
            return
        error = float((want - local).abs().max() / whole.abs().max().clamp_min(1e-30))
        if error <= MAX_ERROR.get(want.dtype, 1e-4):
            return
        seen = f"relative error {error:.1e}"
    raise UnsupportedError(
        f"{examined.name}: cannot be split over tokens: with {ranks.degree} simulated ranks, {what} differs ({seen}) "
        "although every argument was split where it changes tokens; does the block take a length or a grid as a number?"
    )


def _true_rows(layout: Layout, rank: int, device: torch.device) -> Tensor:
    pieces, offset = [], 0
    for part, (_, count) in zip(layout.parts, layout.spans(rank), strict=True):
        pieces.append(torch.arange(offset, offset + count, device=device))
        offset += part
    return torch.cat(pieces)


def _rows(base: Tensor, other: Tensor, dim: int) -> list[int]:
    """Indices along `dim` at which two tensors differ (NaN equals NaN)."""
    if base.shape != other.shape:
        return list(range(base.shape[dim]))
    differs = (base != other) & ~(base.isnan() & other.isnan())
    other_dims = [d for d in range(base.ndim) if d != dim % base.ndim]
    return torch.nonzero(differs.any(dim=other_dims) if other_dims else differs).flatten().tolist()


def _rows_gone(base: Tensor, other: Tensor) -> tuple[int, int] | None:
    """The run of rows of `base` (B, H, rows, D) that `other` has more or fewer of; None where both have as many."""
    rows, others = base.shape[2], other.shape[2]
    if rows == others:
        return None
    both = min(rows, others)
    head = next(iter(_rows(base[:, :, :both], other[:, :, :both], 2)), both)
    tail = [rows - both + i for i in _rows(base[:, :, rows - both :], other[:, :, others - both :], 2)]
    return head, max(head, tail[-1] + 1 if tail else rows - both)


def _noise(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _disturbed(x: Tensor, dim: int, index: int) -> Tensor:
    """A copy with one index along `dim` changed: by noise of the tensor's size, as norms would undo a constant."""
    out = x.clone()
    part = out.narrow(dim, index, 1)
    if x.dtype == torch.bool:
        part.logical_not_()
    elif not (x.is_floating_point() or x.is_complex()):
        part.copy_(torch.where(part > 0, part - 1, part + 1))  # stays within what an index may be
    else:
        real = torch.view_as_real(x) if x.is_complex() else x
        size = real.float().abs().nan_to_num(0, 0, 0).max()
        part.add_(_noise(tuple(part.shape), part, 7) * (1 + size).to(real.dtype))
    return out


def owned(leaf: Any) -> Any:
    """A copy of an argument that the block may write into."""
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.device, nn.Module)):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # what cannot be copied is passed on, as it would be without parafuse
        return leaf


def leaf_name(index: int, spec: TreeSpec, leaves: list[Any]) -> str:
    """The argument's name where it was passed by keyword, else its place."""
    args, kwargs = tree_unflatten(list(range(len(leaves))), spec)
    for name, value in kwargs.items():
        if index in tree_flatten(value)[0]:
            return f"argument {name!r}"
    place = next((i for i, value in enumerate(args) if index in tree_flatten(value)[0]), index)
    return f"argument {place}"
