"""The table of options: its fixed part leaves nothing out, and a rewrite that does nothing is no success."""

from __future__ import annotations

import pytest

from tests.options import cells
from tests.options.__main__ import FIXED_PART
from tests.options.cells import OPTIONS, PIPELINES, SETTINGS, cell_of
from tests.options.table import page


def test_the_fixed_part_has_every_option_setting_and_pipeline() -> None:
    assert {option for _, option in FIXED_PART} == set(OPTIONS)
    assert {name for names in FIXED_PART.values() for name in names} == set(SETTINGS)
    assert {pipeline for pipeline, _ in FIXED_PART} == set(PIPELINES)


def test_a_rewrite_must_say_that_it_acted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("Stable Diffusion XL", OPTIONS["rewrites text"], SETTINGS["one rank"])
    cell = cell_of(*given)
    assert (cell.fault, cell.error) == ("", 0)
    assert "left whole" in cell.idle
    shown = page({"Stable Diffusion XL": {"rewrites text": {"one rank": cell}}})
    assert "| rewrites text | 0, idle (1) |" in shown
    assert f"1. {cell.idle}" in shown
    monkeypatch.setattr(cells, "NOTHING_TO_DO", {})
    assert "rewrite text did nothing" in cell_of(*given).fault
