"""Every member of the pipelines, by the scripts: the engine gives what plain diffusers gives, or refuses."""

from __future__ import annotations

import pytest

from tests.dist.ranks import run_ranks
from tests.drop_in.pipelines import CLASSES, members
from tests.drop_in.rows import Row, rows


def faults(found: list[Row]) -> dict[str, str]:
    return {row.member: row.fault for row in found if row.fault}


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("name", CLASSES)
def test_on_one_rank(name: str) -> None:
    found = rows(name, 1)
    assert faults(found) == {}
    assert len(found) == len(members(name))


@pytest.mark.sweep(one_in=6)
@pytest.mark.parametrize("name", CLASSES)
def test_on_two_ranks(name: str) -> None:
    for found in run_ranks(rows, 2, name, 2, timeout_s=600):
        assert faults(found) == {}
        assert len(found) == len(members(name))


def without_exchanges(name: str) -> list[Row]:
    """Control: ranks that think they are alone, each with a part of the work."""
    from parafuse.parallel.attention import SequenceAttention

    def attend(self: SequenceAttention, q, k, v, queries, keys, call, after=None):
        return q

    kept = SequenceAttention.in_order
    SequenceAttention.in_order = attend
    try:
        return rows(name, 2, "disable_lora")
    finally:
        SequenceAttention.in_order = kept


def test_a_wrong_picture_shows() -> None:
    for found in run_ranks(without_exchanges, 2, "FluxPipeline", timeout_s=120):
        assert faults(found)
