"""Tests of kernels: the torch twins run everywhere, the kernels in Triton's interpreter where triton is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.interpreter import HAS_TRITON, Interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    if not HAS_TRITON:
        pytest.skip("triton is not installed, so its kernels cannot be interpreted: pip install triton")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
