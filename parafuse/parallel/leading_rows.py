"""Computes, of a batch with several branches of guidance, the rows of the leading one alone in the steps in which the
others are made from it. Stands inside of what shares calls between ranks: each sees to the rows that it has at hand."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from parafuse.parallel.batch_cut import BatchCut, Cut, rows
from parafuse.parallel.bundle import all_say, without_values
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.effects import Parts
from parafuse.parallel.hooks import Forward, OnForward
from parafuse.parallel.mesh import Mesh


class LastRows(BatchCut):
    """The last rows of a batch, computed here without the others, whose results are zero. Ranks that share the tokens
    of a call have the same rows, and learn together how to cut them."""

    STACKS: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, module: nn.Module, context: CallContext, mesh: Mesh):
        super().__init__(module, degree=2, rank=1, group="", context=context)
        self._mesh = mesh
        self.first = 0
        """Of the rows that are computed."""

    def _ranges(self, batch: int) -> list[tuple[int, int]]:
        return [(0, self.first), (self.first, batch)]

    def _all_say(self, yes: bool) -> bool:
        """Of the ranks that share the tokens of a call."""
        group = self._mesh.sequence
        return yes if group is None else all_say(yes, self.module, group.size(), group.group_name)

    def _everyones(
        self, mine: list[Tensor], shapes: list[list[Tensor]], call: Any, cut: Cut, error: Exception | None
    ) -> list[list[Tensor]]:
        """The others' samples too, where it is held against the whole batch."""
        if error is not None:
            raise error
        if not self.context.is_trial:
            return [[torch.zeros_like(x, device=call.device) for x in shapes[0]], mine]
        leaves, _ = call.flat(call.part(cut, 0, self.first), self.first)
        found = [i for i, like in enumerate(cut.results) if like is not None]
        return [[x for i in found for x in leaves[i]], mine]


class LeadingRows(OnForward):
    """On one denoiser. `install` outside of the cache of its parts."""

    def __init__(self, module: nn.Module, context: CallContext, mesh: Mesh):
        super().__init__(module)
        self._context = context
        self._cut = LastRows(module, context, mesh)
        self._blank: dict[Any, Any] = {}
        """By shapes of the arguments, results without values, where this rank has no leading rows."""
        self._made_of = Parts(module)
        self._first = next(iter(list(inspect.signature(type(module).forward).parameters)[1:]), "")

    def _forward(self, original: Forward) -> Forward:
        context = self._context

        def forward(*args: Any, **kwargs: Any) -> Any:
            if context.leading is None or context.is_trial:
                return original(*args, **kwargs)
            if self._made_of.have_other_objects():
                self._made_of = Parts(self.module)
                self._cut.forget()
                self._blank.clear()
            samples = args[0] if args else kwargs.get(self._first)
            at_hand = range(rows(samples)) if context.rows is None else context.rows
            mine = [row in context.leading for row in at_hand]
            if all(mine) or not context.leading:
                return original(*args, **kwargs)
            if not any(mine):
                return self._without(original, args, kwargs)
            return self._last(mine, original, args, kwargs, samples)

        return forward

    def _without(self, original: Forward, args: Any, kwargs: Any) -> Any:
        """A call without leading rows: zeros, where others are made from those."""
        leaves, spec = tree_flatten((args, kwargs))
        key = (str(spec), *((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves))
        if self._context.is_whole or key not in self._blank:
            result = original(*args, **kwargs)
            self._blank[key] = tree_map_only(Tensor, without_values, result)
            return result
        device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        blank, result_spec = tree_flatten(self._blank[key])
        zeros = [torch.zeros_like(x, device=device) if isinstance(x, Tensor) else x for x in blank]
        return tree_unflatten(zeros, result_spec)

    def _last(self, mine: list[bool], original: Forward, args: Any, kwargs: Any, samples: Any) -> Any:
        """A call with leading rows and others: learns how to cut it where it is computed whole."""
        count = sum(mine)
        self._cut.first = len(mine) - count
        is_cut = self._cut.knows(args, kwargs, samples)
        if is_cut == self._context.is_whole or not all(mine[-count:]):
            return original(*args, **kwargs)
        return self._cut(original, args, kwargs, samples)[1]
