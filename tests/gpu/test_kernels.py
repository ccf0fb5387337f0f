"""Triton kernels on the GPU against their twins there, with the inputs of `tests/kernels`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parafuse.kernels.fused import missing
from tests.kernels.test_merge import DTYPES, SIZES, errors_of_kernel
from tests.kernels.test_norm_rope import CASES, both, check


@pytest.fixture(autouse=True)
def _can_run() -> None:
    reason = missing(torch.device("cuda"))
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SIZES, (1, 24, 4608, 128)], ids=str)
def test_merge(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for heads_first in (True, False):
        out, lse, twin_out, twin_lse = errors_of_kernel(shape, dtype, heads_first, "cuda")
        assert out <= max(2 * twin_out, 1e-6)
        assert lse <= max(2 * twin_lse, 1e-5)


@pytest.mark.parametrize("rows", [0, 576])
@pytest.mark.parametrize("name", CASES)
def test_norm_rope(name: str, rows: int) -> None:
    case = replace(CASES[name], device="cuda", rows=rows or CASES[name].rows)
    found, differing = both(case)
    check(found, case)
    assert max(differing.values()) < 0.01, differing
