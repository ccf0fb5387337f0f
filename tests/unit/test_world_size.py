"""How many ranks an engine has, and what is asked for twice."""

from __future__ import annotations

import dataclasses

import pytest

from parafuse.config import Config, Parallel
from parafuse.engine.planner import resolve
from parafuse.engine.source import locate
from parafuse.engine.world_size import number_of_ranks
from parafuse.errors import ConfigError

TWO = Config(parallel=Parallel(cfg=2))


def test_in_a_plain_process_as_many_as_are_asked_for() -> None:
    assert number_of_ranks(Config(), None, None, ours=True) == 1
    assert number_of_ranks(Config(), None, 3, ours=True) == 3
    assert number_of_ranks(TWO, None, None, ours=True) == 2
    assert number_of_ranks(TWO, None, 4, ours=True) == 4  # Ulysses has what is left


def test_under_a_launcher_as_many_as_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert number_of_ranks(Config(), None, None, ours=False) == 4
    assert number_of_ranks(Config(), None, 4, ours=False) == 4
    with pytest.raises(ConfigError, match="ranks=2: the launcher started 4; leave ranks out, or say 4"):
        number_of_ranks(Config(), None, 2, ours=False)


def test_a_plan_has_its_own_number() -> None:
    plan = resolve(dataclasses.replace(TWO, device="cpu"), locate("emoji"), 2, elsewhere=True)
    assert number_of_ranks(Config(), plan, None, ours=True) == 2
    with pytest.raises(ConfigError, match="ranks=3: the plan is for 2"):
        number_of_ranks(Config(), plan, 3, ours=True)


@pytest.mark.parametrize("ranks", [0, -1, True, 2.0, "2"])
def test_what_is_no_number_of_ranks(ranks: object) -> None:
    with pytest.raises(ConfigError, match="must be a whole number of at least 1"):
        number_of_ranks(Config(), None, ranks, ours=True)  # pyright: ignore[reportArgumentType]
