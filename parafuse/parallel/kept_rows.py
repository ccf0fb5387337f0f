"""Attention of split rows together with rows that every rank has (the valid text tokens of each sample, say, which are
as many as the values of a mask tell): each rank takes its part of those, attends as if they had been split, and gets
all of them back."""

from __future__ import annotations

import torch
from torch import Tensor

from parafuse.parallel.comm import all_gather
from parafuse.parallel.layout import Layout


def own_part(x_BHSD: Tensor, layout: Layout, rank: int) -> Tensor:
    """The rows of `layout.spread` of one rank, filler (zeros) included; itself where no segment is kept."""
    if layout.kept is None:
        return x_BHSD
    before, rows = sum(layout.parts[: layout.kept]), layout.lengths[layout.kept]
    part = layout.spread.parts[layout.kept]
    start, count = layout.spread.spans(rank)[layout.kept]
    mine = x_BHSD.narrow(2, before + start, count)
    filler = mine.new_zeros((*mine.shape[:2], part - count, mine.shape[3]))
    return torch.cat([x_BHSD[:, :, :before], mine, filler, x_BHSD[:, :, before + rows :]], dim=2)


def with_everyone(x_BHSD: Tensor, layout: Layout, group: str) -> Tensor:
    """Rows of `layout.spread` -> rows of `layout`. Collective on `group` where a segment is kept and not empty."""
    if layout.kept is None:
        return x_BHSD
    if layout.degree == 1:
        return x_BHSD.contiguous()
    before, rows = sum(layout.parts[: layout.kept]), layout.lengths[layout.kept]
    part = layout.spread.parts[layout.kept]
    pieces = [x_BHSD[:, :, :before], x_BHSD[:, :, before + part :]]
    if rows:
        everyone = all_gather(x_BHSD.narrow(2, before, part), layout.degree, group)
        pieces.insert(1, everyone.movedim(0, 2).flatten(2, 3).narrow(2, 0, rows))
    return torch.cat(pieces, dim=2)
