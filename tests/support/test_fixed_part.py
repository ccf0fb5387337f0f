"""A part of docs/support.md, measured anew: no cell is worse than the record says.

How a block is split does not depend on the layout (`make test` has every class in Ulysses 3), and how attention
exchanges does not depend on the class: so each case is in one of the layouts, and each layout has half of the cases."""

from __future__ import annotations

import functools

import pytest

from tests.support.cells import Cell, cell_of
from tests.support.compiled import Compiled, compiled_of
from tests.support.record import Record, read_record
from tests.zoo.collect import cases

LAYOUTS = ("ring 3", "ring 2 x Ulysses 2")
CELLS = [(name, LAYOUTS[number % len(LAYOUTS)]) for number, name in enumerate(cases())]
COMPILED = (  # beside those of tests/dist/test_compile.py and tests/options: masks, cross-attention, lists, one kind
    "CogVideoXTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
)


@functools.cache
def record() -> Record:
    return read_record()


def worse(found: Cell, recorded: Cell) -> list[str]:
    """What was right by the record and is not any more."""
    if recorded.faults:
        return []  # the page says so
    lost = [f"refused now ({found.refused[what]})" for what in found.refused if what in recorded.errors]
    return found.faults + lost


def worse_compiled(found: Compiled, recorded: Compiled) -> list[str]:
    if recorded.faults:
        return []
    lost = [f"does not compile now ({found.refused})"] if found.refused and not recorded.refused else []
    more = [f"{found.graphs} graphs, {recorded.graphs} before"] if found.graphs > recorded.graphs else []
    return found.faults + lost + more


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize(("name", "layout"), CELLS)
def test_a_cell_is_as_recorded(name: str, layout: str) -> None:
    known = record().cells.get(name, {}).get(layout, Cell())
    assert worse(cell_of(name, layout, bf16=False), known) == []


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("name", COMPILED)
def test_a_part_is_compiled_as_recorded(name: str) -> None:
    """With a backend that is quick."""
    known = record().compiled.get(name, {}).get("aot_eager", Compiled(graphs=99))
    assert worse_compiled(compiled_of(name), known) == []


def test_what_is_worse_is_found() -> None:
    right = Cell(errors={"as given": 1e-7})
    assert worse(Cell(errors={"as given": 1e-3}), right) == ["as given: 1.0e-03"]
    assert worse(Cell(refused={"as given": "no"}), right) == ["refused now (no)"]
    assert worse(Cell(failed="rank 1 died"), right) == ["rank 1 died"]
    assert worse(Cell(refused={"one token": "no"}), right) == []
    plain = Compiled(graphs=1)
    assert worse_compiled(Compiled(graphs=2), plain) == ["2 graphs, 1 before"]
    assert worse_compiled(Compiled(refused="no"), plain) == ["does not compile now (no)"]
