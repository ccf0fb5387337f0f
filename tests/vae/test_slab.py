"""Each rule of slabs against plain torch on 2, 3 and 4 ranks."""

from __future__ import annotations

import pytest

from tests.dist.ranks import run_ranks
from tests.vae import rules


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("bounds", ["even", "thin"])
@pytest.mark.parametrize("kind", rules.RULES)
def test_operators_are_exact(kind: str, bounds: str, num_ranks: int) -> None:
    for found in run_ranks(rules.errors_of, num_ranks, kind, bounds):
        assert {name: error for name, error in found.items() if not error < 1e-5} == {}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_has_no_rule_is_refused_by_name_on_all_ranks(num_ranks: int) -> None:
    first, *others = run_ranks(rules.refusals, num_ranks)
    for name, operator, _ in rules.REFUSED:
        assert f"the operator {operator}" in first[name], first[name]
    assert all(other == first for other in others)


def test_without_the_exchange_operators_are_wrong() -> None:
    off = run_ranks(rules.errors_without, 2, "exchange")[0]
    for name in ("conv2d", "conv3d, height", "transposed", "reflect", "avg_pool2d, padded", "bilinear", "stft"):
        assert off[name] > 1e-2, name
    assert off["linear"] < 1e-5
    off = run_ranks(rules.errors_without, 2, "sum")[0]
    for name in ("mean and sum", "linear attention", "linear over the split dim", "norm"):
        assert off[name] > 1e-2, name
    assert run_ranks(rules.errors_without, 2, "statistics")[0]["group_norm"] > 1e-2
