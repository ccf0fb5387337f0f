"""A part of docs/cache-support.md, measured anew: a first-block cache in every layout does what it does on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.caches.__main__ import COLUMNS, row_of

NAMES = (
    "FluxTransformer2DModel", "Lumina2Transformer2DModel", "WanVACETransformer3DModel", "LatteTransformer3DModel",
)  # fmt: skip


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_right(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAFUSE_CACHE", str(tmp_path))  # how blocks are split is proven in the other layouts
    row = row_of(name)
    assert list(row) == list(COLUMNS)
    assert {column: cell.faults for column, cell in row.items() if cell.faults} == {}
