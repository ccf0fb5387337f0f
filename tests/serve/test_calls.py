"""How long a call that was told to end may go on."""

from __future__ import annotations

import pytest

from parafuse.launch.serve.calls import MOST_STOP_S, Call
from parafuse.launch.serve.messages import Paint


@pytest.mark.parametrize("phase", ["denoising", "compiling", "decoding", "idle"])
def test_a_call_that_was_told_to_end_does_not_go_on_for_ever(phase: str) -> None:
    """Also where a step is as long as a request makes it, and its limit with it."""
    call = Call(Paint(call="c", items=()))
    assert not call.ignores_stop(1e6, phase, 10.0)
    call.stop_reason, call.stop_since, call.stop_told = "cancelled", 1000.0, 1000.0
    assert not call.ignores_stop(1000.0 + MOST_STOP_S - 1, phase, 4000.0)
    assert call.ignores_stop(1000.0 + MOST_STOP_S + 1, phase, 4000.0)


def test_between_steps_its_limit_is_that_of_a_step() -> None:
    call = Call(Paint(call="c", items=()))
    call.stop_reason, call.stop_since, call.stop_told = "cancelled", 1000.0, 1000.0
    assert call.ignores_stop(1011.0, "denoising", 10.0)
    assert not call.ignores_stop(1012.0, "compiling", 10.0), "there is no step boundary in there"
    assert not call.ignores_stop(1021.0, "denoising", 10.0)
    assert call.ignores_stop(1023.0, "denoising", 10.0)
