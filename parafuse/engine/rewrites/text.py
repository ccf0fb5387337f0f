"""The rewrite `text`: text tokens that the mask says are padding are cut off where a denoiser is called, and a mask
that leaves every token is not handed on.

Which arguments to cut is told by their sizes, and held against the whole call before it is used: noise in the place of
what is cut must change nothing, and the cut call must give the same. A mask is looked up once, not in every step.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from parafuse.engine.rewrites.gates import Gates, Sites
from parafuse.engine.rewrites.rewrite import Boundary, Rewrite, Site, bare
from parafuse.engine.rewrites.text_cuts import Change, Masks, Text, Valid, disturbed, shortened, texts_of, ways
from parafuse.errors import is_out_of_memory
from parafuse.log import note
from parafuse.parallel.batch_cut import TRIES
from parafuse.parallel.bundle import all_say
from parafuse.parallel.comm import all_gather
from parafuse.parallel.effects import Parts, Watched
from parafuse.parallel.hooks import Forward, OnForward
from parafuse.parallel.lent import Lent
from parafuse.parallel.nest import Flattener

EXACT = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the largest value: how far a cut call may be from the whole one, which sums in another order."""
UNMOVED = 1e-5
"""How far noise in padding may move the result, in any dtype: what is masked has no weight at all."""
NO_MASK, NOTHING_PADDED = "some calls have no mask of a text", "in some calls nothing is padded"
MAX_KNOWN = 64
"""Structures of calls that are kept in mind; those beyond are not cut."""


@dataclass(frozen=True)
class Way:
    """How calls of one structure are cut."""

    texts: list[Text]
    change: dict[int, tuple[Change, Text]]
    no_mask: frozenset[int] = frozenset()
    """Masks that are not given at all."""
    sites: Sites = field(default_factory=Sites)
    """Parts of the model that are called without the mask that it made."""

    @property
    def what(self) -> str:
        """In words."""
        if self.no_mask:
            return "cut, no mask given"
        return f"cut, no mask for {len(self.sites)} parts" if self.sites else "cut, with the mask"


@dataclass(frozen=True)
class _Call:
    """A call whose text may be cut."""

    leaves: list[Any]
    spec: TreeSpec
    texts: list[Text]
    says: dict[int, Valid]
    """By mask."""
    sample: Any


class TrimmedText(Rewrite):
    """Collective on the sequence group at the first call of a structure, local after that."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.masks = Masks()
        self.seen: Counter[str] = Counter()
        """Calls by what was done."""
        self.why: dict[str, None] = {}
        """Why calls were left whole."""
        self._gates = Gates(self.module)
        self._known: dict[Any, Way | int] = {}
        """By structure: how it is cut, or how often that was tried in vain."""
        self._first = next(iter(list(inspect.signature(type(site.module).forward).parameters)[1:]), "")
        self._parts = Parts(self.module)
        self._flatten = Flattener()
        self._kept: set[tuple[int, int]] = set()
        """(tokens kept, of how many)."""

    def install(self) -> None:
        self._gates.install()

    def remove(self) -> None:
        self._gates.remove()
        self._known.clear()

    def met_parts(self) -> list[nn.Module]:
        return self._gates.parts

    def at_boundary(self) -> list[OnForward]:
        return [Boundary(self.module, self.call)]

    def begin(self) -> None:
        self.seen.clear()
        self._kept.clear()
        for why in (NO_MASK, NOTHING_PADDED):
            self.why.pop(why, None)

    def lines(self) -> list[str]:
        done = [f"{count} calls {what}" for what, count in sorted(self.seen.items())]
        kept = ", ".join(f"{left} of {length} tokens" for left, length in sorted(self._kept))
        return [
            "rewrite text: "
            + ("; ".join([*done, *([f"kept {kept}"] if kept else []), *self.why]) or "as soon as a mask allows it")
        ]

    def call(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the denoiser, with no more text than is needed."""
        if self.site.context.is_trial or torch.is_grad_enabled():
            return original(*args, **kwargs)
        if self._parts.have_other_objects():
            self._parts = Parts(self.module)
            self._known.clear()
        try:
            return self._call(original, args, kwargs)
        finally:
            if self._parts.have_other_objects():  # what a call has changed itself (tables that it keeps) is no change
                self._parts = Parts(self.module)

    def _call(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = self._flatten((args, kwargs))
        sample = args[0] if args else kwargs.get(self._first)
        texts = texts_of(leaves, sample)
        valid = {one.mask: self.masks(leaves[one.mask], one.offset, one.length) for one in texts}
        texts = [one for one in texts if valid[one.mask] is not None]
        says = {mask: found for mask, found in valid.items() if found is not None}
        useful = [one for one in texts if says[one.mask].is_full or one.is_cut(says[one.mask])]
        if not useful:
            self.why[NOTHING_PADDED if texts else NO_MASK] = None
            self.seen["left whole"] += 1
            return original(*args, **kwargs)
        lengths = {one.length for one in useful}
        key = (
            str(spec),
            tuple(_fact(x, lengths) for x in leaves),
            tuple((one.mask, says[one.mask].is_full, one.is_cut(says[one.mask])) for one in useful),
        )
        way = self._known.get(key, 0)
        if isinstance(way, int) and way < TRIES:
            if len(self._known) >= MAX_KNOWN:
                return self._whole("too many structures of calls", original, args, kwargs)
            call = _Call(leaves, spec, useful, says, sample)
            way = self._known[key] = self._learn(original, call, way)
        if not isinstance(way, Way):
            self.seen["left whole"] += 1
            return original(*args, **kwargs)
        new_args, new_kwargs = tree_unflatten(self._cut(leaves, way, says), spec)
        self.seen[way.what] += 1
        with self._gates.closed(way.sites):
            return original(*new_args, **new_kwargs)

    def _whole(self, why: str, original: Forward, args: Any, kwargs: Any) -> Any:
        self._say(why)
        self.seen["left whole"] += 1
        return original(*args, **kwargs)

    def _say(self, why: str) -> None:
        if why not in self.why and not self.site.is_choice:
            note(f"rewrite text on {self.site.name}: {why}")
        self.why[why] = None

    def _cut(self, leaves: list[Any], way: Way, says: dict[int, Valid]) -> list[Any]:
        kept = {one.mask: one.kept(says[one.mask]) for one in way.texts}
        self._kept |= {(kept[one.mask], one.length) for one in way.texts}
        out = shortened(leaves, way.change, kept)
        for mask in way.no_mask:
            out[mask] = None
        return out

    def _learn(self, original: Forward, call: _Call, tried: int) -> Way | int:
        """How to cut such calls, or how often that was tried. Collective on the sequence group."""
        with self._trial(original) as forward, torch.no_grad():

            def run(leaves: list[Any]) -> Any:
                args, kwargs = tree_unflatten(leaves, call.spec)
                return forward(*args, **kwargs)

            args, kwargs = tree_unflatten(call.leaves, call.spec)
            watched, lent = Watched(self.module, (args, kwargs)), Lent(args, kwargs)
            try:
                whole = forward(*lent.args, **lent.kwargs)
                has_effects = lent.left() is None or watched.has_changed()
            finally:
                lent.give_back()
            if not self._all_say(not has_effects):  # a table that is made at the first call is none at the second
                watched.undo()  # the call itself is still to be made
                if tried + 1 == TRIES:
                    self._say("its calls do more than give a result")
                return tried + 1
            found = self._proven(run, whole, call)
            return TRIES if found is None else found

    def _proven(self, run: Callable[[list[Any]], Any], whole: Any, call: _Call) -> Way | None:
        leaves, texts, says = call.leaves, call.texts, call.says
        kept = {one.mask: one.kept(says[one.mask]) for one in texts}
        cuts = [one for one in texts if one.is_cut(says[one.mask])]
        if cuts and not self._holds(run, disturbed(leaves, cuts, kept), whole, tight=True):
            self._say("tokens that the mask says are padding have a part in the result")
            return None
        tried = (way for way in ways(leaves, texts, call.sample))
        found = next((way for way in tried if self._holds(run, shortened(leaves, way, kept), whole)), None)
        if found is None:
            self._say("a call with fewer text tokens gives something else: their number is known in other ways too")
            return None
        way = Way(texts, found)
        full = [one.mask for one in texts if says[one.mask].is_full]
        return self._without_mask(run, whole, self._cut(leaves, way, says), way, full) if full else way

    def _without_mask(
        self, run: Callable[[list[Any]], Any], whole: Any, cut: list[Any], way: Way, full: list[int]
    ) -> Way:
        """The way with no mask given, or with none handed on to the model's parts, if that holds."""
        without: list[Any] = [None if i in full else x for i, x in enumerate(cut)]
        if self._holds(run, without, whole):
            return Way(way.texts, way.change, no_mask=frozenset(full))
        sites = self._gates.find(lambda: run(cut), cut, frozenset(full))
        if not self._all_have([(self._gates.parts.index(part), places) for part, places in sites.items()]):
            return way
        kinds = dict.fromkeys(type(part) for part in sites)
        found: Sites = {}
        for some in (tuple(kinds), *((kind,) for kind in kinds)):
            more = {part: places for part, places in sites.items() if type(part) in some and part not in found}
            with self._gates.closed({**found, **more}):
                if more and self._holds(run, cut, whole):
                    found |= more
        if not found:
            self._say("the model needs its mask, though it masks nothing")
        return Way(way.texts, way.change, sites=found)

    def _holds(self, run: Callable[[list[Any]], Any], values: list[Any], whole: Any, *, tight: bool = False) -> bool:
        """Whether a call with these leaves gives the same, on all ranks that share a sequence."""
        try:
            same = is_same(run(values), whole, tight=tight)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            same = False
        return self._all_say(same)

    def _all_say(self, yes: bool) -> bool:
        mesh = self.site.mesh
        if mesh.sequence is None:
            return yes
        return all_say(yes, self.module, mesh.sequence_degree, mesh.sequence.group_name)

    def _all_have(self, facts: Any) -> bool:
        """Whether all ranks that share a sequence found the same, so that they go on with the same calls."""
        mesh = self.site.mesh
        if mesh.sequence is None:
            return True
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        mine = int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7])
        found = all_gather(torch.tensor([mine], device=device), mesh.sequence_degree, mesh.sequence.group_name)
        return len(set(found.flatten().tolist())) == 1

    @contextmanager
    def _trial(self, original: Forward) -> Iterator[Forward]:
        """The denoiser for calls that are made to learn something: plain where one rank has all tokens, else as the
        ranks share them."""
        if self.site.mesh.sequence is None:
            with self.site.context.trying(), bare(self.module) as forward:
                yield forward
            return
        with self.site.context.trying():
            yield original


def is_same(found: Any, whole: Any, *, tight: bool = False) -> bool:
    """Whether results agree, by the largest difference over the largest value."""
    pairs = list(zip(_tensors(found), _tensors(whole), strict=False))
    if len(_tensors(found)) != len(_tensors(whole)):
        return False
    for a, b in pairs:
        if a.shape != b.shape:
            return False
        if b.is_floating_point() and b.numel():
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)
            if not error <= (UNMOVED if tight else EXACT.get(b.dtype, 1e-5)):
                return False
    return True


def _tensors(tree: Any) -> list[Tensor]:
    leaves: Iterable[Any] = tree_leaves(tree)
    return [x for x in leaves if isinstance(x, Tensor)]


def _fact(leaf: Any, lengths: set[int]) -> Any:
    """What of an argument decides how a call is cut. Numbers may count steps, but for those that are lengths."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    if isinstance(leaf, int) and not isinstance(leaf, bool):
        return leaf if leaf in lengths else int
    return leaf if leaf is None or isinstance(leaf, (bool, str)) else type(leaf).__name__


def takes_a_mask(module: nn.Module) -> bool:
    """Whether its forward names a mask at all."""
    code: Any = getattr(type(module).forward, "__wrapped__", type(module).forward)
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    names = code.__code__.co_varnames[: code.__code__.co_argcount + code.__code__.co_kwonlyargcount]
    return any("mask" in name for name in names)
