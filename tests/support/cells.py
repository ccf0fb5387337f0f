"""What one transformer gives on several ranks in one layout: errors by lengths, bf16, refusals, exchanges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import parafuse
from parafuse.engine.verify import relative_error
from parafuse.errors import ParafuseError
from parafuse.parallel.comm import Count, since
from tests.dist.ranks import RankFailure, run_ranks
from tests.models import Inputs, Sizes
from tests.support.exchanges import Expected, gathers, watched
from tests.support.exchanges import faults as exchange_faults
from tests.zoo.case import Case
from tests.zoo.collect import cases, inputs_of, outputs, randomized

Layout = tuple[int, int]
LAYOUTS: dict[str, Layout] = {
    "Ulysses 2": (1, 2),
    "Ulysses 3": (1, 3),
    "Ulysses 4": (1, 4),
    "ring 2": (2, 1),
    "ring 3": (3, 1),
    "ring 4": (4, 1),
    "ring 2 x Ulysses 2": (2, 2),
}
"""Name -> (ring, ulysses)."""
GIVEN = "as given"
FEW_LENGTHS = (GIVEN, "fewer tokens than ranks")
ALL_LENGTHS_AT = "Ulysses 3"
"""How a block is split does not depend on the layout, so one column has all lengths."""
EXACT = 1e-5
ROUNDED = 1e-3
BF16_RATIO = 2.0
"""How many times plain bf16's distance from fp32 the parallel one may have."""


@dataclass
class Cell:
    """One case in one layout. Lengths that the plain model cannot do are left out."""

    errors: dict[str, float] = field(default_factory=dict[str, float])
    """Length -> largest difference from the plain model over the largest value, fp32."""
    bf16: float | None = None
    """Distance from fp32 over that of plain bf16; None: not measured, or plain diffusers cannot."""
    refused: dict[str, str] = field(default_factory=dict[str, str])
    """Length (or "bf16") -> the refusal."""
    gathers: int | None = None
    """Exchanges of one forward beside those of attention."""
    miscounted: list[str] = field(default_factory=list[str])
    """Where attention's exchanges differ from their formulas."""
    rounding: str = ""
    """Of the case: why more than 1e-5 is allowed."""
    failed: str = ""
    """A crash, a hang, or ranks that disagree."""

    @property
    def faults(self) -> list[str]:
        """What is not as promised; a refusal is none."""
        limit = ROUNDED if self.rounding else EXACT
        found = [f"{name}: {value:.1e}" for name, value in self.errors.items() if not value <= limit]
        if self.bf16 is not None and not self.bf16 <= BF16_RATIO:
            found.append(f"bf16: {self.bf16:.1f} times plain bf16's error")
        return [*found, *self.miscounted, *([self.failed] if self.failed else [])]

    @property
    def is_exact(self) -> bool:
        return not self.faults and not self.refused

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


def lengths_of(case: Case) -> dict[str, Sizes]:
    """The lengths at which a case is measured."""
    sizes = case.sizes
    frames, rows, columns = sizes.grid
    return {
        GIVEN: sizes,
        "batch 1": replace(sizes, batch=1),
        "text as long as image": replace(sizes, text=sizes.image),
        "other lengths": replace(sizes, grid=(frames, rows + 2, columns), text=sizes.text + 4),
        "fewer tokens than ranks": replace(sizes, grid=(1, 1, 3), text=2),
        "one token": replace(sizes, grid=(1, 1, 1), text=1),
    }


def plain_outputs(case: Case, model: nn.Module, lengths: Iterable[str]) -> dict[str, list[Tensor]]:
    """What the plain model gives, for the lengths that it can do."""
    found: dict[str, list[Tensor]] = {}
    for name in lengths:
        try:
            want = outputs(model, inputs_of(case, lengths_of(case)[name]))
        except (RuntimeError, ValueError, LookupError, TypeError, AssertionError):
            if name == GIVEN:
                raise
            continue
        if all(bool(x.isfinite().all()) for x in want):
            found[name] = want
    return found


def measure(name: str, layout: Layout, lengths: tuple[str, ...], bf16: bool) -> Cell:
    """One cell, as one rank sees it."""
    case = cases()[name]
    cell = Cell(rounding=case.rounding)
    model = randomized(case.build())
    plain = plain_outputs(case, model, lengths)
    orders = [list(plain)] if len(plain) <= len(FEW_LENGTHS) else [list(plain), list(reversed(plain))]
    for order in orders:  # what is examined first must not matter
        with parafuse.apply(model, _config(layout)) as handle:
            for length in order:
                with _refusals(cell, length):
                    found = relative_error(outputs(model, inputs_of(case, lengths_of(case)[length])), plain[length])
                    cell.errors[length] = max(found, cell.errors.get(length, 0.0))
                    before = handle.exchanged()  # of a second call: the first one examines
                    with watched(*layout) as expected:
                        outputs(model, inputs_of(case, lengths_of(case)[length]))
                    _count(cell, length, expected, since(handle.exchanged(), before))
    if bf16:
        with _refusals(cell, "bf16"):
            cell.bf16 = _half(case, model, layout, plain[GIVEN])
    return cell


def _count(cell: Cell, length: str, expected: Expected, counted: dict[str, Count]) -> None:
    cell.miscounted += [f"{length}: {fault}" for fault in exchange_faults(expected, counted)]
    if length == GIVEN:
        cell.gathers = gathers(counted)


def _half(case: Case, model: nn.Module, layout: Layout, truth: list[Tensor]) -> float | None:
    """Distance of the parallel bf16 model from fp32 over that of the plain bf16 model; None where plain cannot."""
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        kept = getattr(model, "_keep_in_fp32_modules", None) or []  # as from_pretrained(dtype=...) does
        if parameter.is_floating_point() and not any(word in name.split(".") for word in kept):
            parameter.data = parameter.data.to(torch.bfloat16)

    def values() -> Inputs:
        return tree_map_only(Tensor, lambda x: x.bfloat16() if x.dtype == torch.float32 else x, given)

    given = inputs_of(case, case.sizes)
    try:
        plain = relative_error(outputs(model, values()), truth)
    except (RuntimeError, ValueError, TypeError):
        return None
    with parafuse.apply(model, _config(layout)):
        found = relative_error(outputs(model, values()), truth)
    return found / plain if plain else float(found > 0) * 99


@contextmanager
def _refusals(cell: Cell, what: str) -> Iterator[None]:
    try:
        yield
    except ParafuseError as refusal:
        cell.refused[what] = str(refusal)


def _config(layout: Layout) -> parafuse.Config:
    return parafuse.Config(parallel=parafuse.Parallel(ring=layout[0], ulysses=layout[1]))


def cell_of(name: str, column: str, *, lengths: tuple[str, ...] | None = None, bf16: bool = True) -> Cell:
    """The worst that the ranks of a layout see."""
    layout = LAYOUTS[column]
    if lengths is None:
        lengths = tuple(lengths_of(cases()[name])) if column == ALL_LENGTHS_AT else FEW_LENGTHS
    try:
        first, *others = run_ranks(measure, layout[0] * layout[1], name, layout, lengths, bf16, timeout_s=120)
    except RankFailure as failure:
        return Cell(failed=str(failure).splitlines()[0][:300])
    for other in others:
        if other.refused.keys() != first.refused.keys():
            first.failed = "ranks refuse different calls"
        first.miscounted += other.miscounted
        first.errors = {length: max(value, other.errors.get(length, 0.0)) for length, value in first.errors.items()}
    return first
