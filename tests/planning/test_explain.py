"""What is said of the choice of a plan, and drawn of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from parafuse.engine.planning import explain
from parafuse.engine.planning.cost import Candidate, Corrections
from parafuse.engine.planning.machine import named
from parafuse.engine.planning.search import Demand, Fidelity, Found, Objective, search
from parafuse.errors import ConfigError
from parafuse.launch import scaling
from tests.planning.models import SLOW, facts, machine


def test_the_explanation_names_the_parts_that_cost() -> None:
    found = search(facts(), machine(inside=SLOW), Demand(ranks=8))
    said = "\n".join(explain.lines(found))
    assert f"best: {found.best.candidate}" in said
    assert "more a request for" in said
    assert "ruled out:" in said
    assert json.loads(json.dumps(explain.to_dict(found)))["plans"][0]["degrees"] == found.best.candidate.degrees


def _corrected() -> Found:
    """Ulysses is the best where nothing is known, and a ring by what runs have told."""
    there = machine(inside=dataclasses.replace(SLOW, bytes_per_s=1e11, latency_s=1e-6))
    return search(facts(), there, Demand(ranks=8, layouts_only=True), Corrections(factors={"ulysses": 40.0}))


def test_the_explanation_goes_by_the_corrections_of_the_plan() -> None:
    found = _corrected()
    without = dataclasses.replace(found, corrections=None)
    assert explain.to_dict(found)["changes"] != explain.to_dict(without)["changes"]
    assert explain.lines(found) != explain.lines(without)


def test_the_plot_goes_by_the_corrections_and_the_refusal_of_the_plan() -> None:
    found = _corrected()
    assert found.best.candidate == Candidate(ring=8)
    assert scaling.scaled(found)[8] == found.costs
    assert scaling.scaled(dataclasses.replace(found, corrections=None))[8][0].candidate == Candidate(ulysses=8)
    refused = dataclasses.replace(found, refusal=lambda one: "no ring" if one.ring > 1 else "")
    assert scaling.scaled(refused)[8][0].candidate == Candidate(ulysses=8)


@pytest.mark.parametrize("name", ["1xrtx4090", "4xl40-pcie", "2xcpu", "2x4xh100-eth", "16xh100-eth", "16xh100-ib200"])
def test_a_named_machine_with_other_ranks_is_of_the_same_kind(name: str) -> None:
    there = named(name)
    room = 4 if there.nodes == 2 and there.per_node == 4 else 64 if "cpu" in name else 8
    for ranks in scaling.RANKS:
        other = scaling.with_ranks(there, ranks)
        assert (other.per_node, other.num_ranks) == (min(ranks, room), ranks)
        assert (other.device, other.inside, other.across) == (there.device, there.inside, there.across)


def test_a_machine_of_no_kind_has_the_ranks_of_its_nodes() -> None:
    measured = machine(4, name="4xh100")
    for kind in ("", "unheard-of"):
        for ranks, (per_node, nodes) in {1: (1, 1), 2: (2, 1), 4: (4, 1), 8: (4, 2), 64: (4, 16)}.items():
            other = scaling.with_ranks(dataclasses.replace(measured, kind=kind), ranks)
            assert (other.per_node, other.nodes, other.device) == (per_node, nodes, measured.device)


def test_drawing_changes_nothing_of_matplotlib(tmp_path: Path) -> None:
    mpl = pytest.importorskip("matplotlib")
    before = dict(mpl.rcParams)
    found = search(facts(), machine(), Demand(ranks=8))
    first, second = (scaling.draw(found, str(tmp_path / name)).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert dict(mpl.rcParams) == before
    with pytest.raises(ConfigError, match="cannot be written"):
        scaling.draw(found, str(tmp_path / "nowhere" / "a.svg"))


def test_without_matplotlib_the_extra_is_named_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(facts(), machine(), Demand(ranks=8, objective=Objective.THROUGHPUT))
    real = importlib.util.find_spec

    def lacking(name: str, *more: Any) -> Any:
        return None if name == "matplotlib" else real(name, *more)

    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("a search began")

    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    monkeypatch.setattr(scaling, "search", computed)
    with pytest.raises(ConfigError, match=r"pip install 'parafuse\[bench\]'"):
        scaling.draw(found, "x.svg")


def test_the_plot_says_of_what_it_is() -> None:
    found = search(facts(), named("8xh200"), Demand(ranks=8, objective=Objective.MEMORY))
    assert scaling.title_of(found) == "small, 1024x1024, 10 steps\non h200, the best for memory"


def test_a_found_plan_prints_its_explanation() -> None:
    found = search(facts(), machine(), Demand(ranks=8))
    assert str(found) == "\n".join(explain.lines(found))


def test_json_has_reasons_shares_and_the_request() -> None:
    said = explain.to_dict(search(facts(), machine(inside=SLOW), Demand(ranks=8)))
    first, second = said["plans"][:2]
    assert said["request"] == {"call": facts().call, "pictures": 1, "branches": 1, "steps": 10}
    assert said["flops"]["step"]["gemm"] == said["flops"]["request"]["denoise"]["gemm"] / 10 > 0
    assert "chosen by cost" in said["why"]
    assert "its time is" in first["why"]
    assert "times as long" in second["why"]
    for plan in said["plans"]:
        assert sum(plan["shares"].values()) == pytest.approx(1)
        assert plan["shares"]["gemm"] == pytest.approx(plan["denoise_s"]["gemm"] / plan["seconds"])


def test_the_table_says_what_a_cache_leaves_out_and_whether_that_is_known() -> None:
    demand = Demand(ranks=1, fidelity=Fidelity.FAST, fixed={"cache": "first-block:0.1", "quantize": ""})
    for known, told in ((None, "36% of the steps are left out (assumed"), ({"first-block": 0.5}, "50% of the steps")):
        found = search(facts(), machine(1), demand, Corrections(hit_rates=known) if known else None)
        best = found.best
        said = "\n".join(explain.lines(found))
        assert told in said
        assert f"one that is computed takes {best.step_s * 1e3:.1f} ms" in said
        assert best.mean_step_s == pytest.approx(best.step_s * (1 - best.hits))
        row = next(line for line in said.splitlines() if line.startswith(f"{best.candidate}  "))
        assert f"{best.mean_step_s * 1e3:.1f} ms" in row, "parts of a row add up to its step"


@pytest.mark.parametrize(("name", "dtype", "said"), [
    ("1xv100", "bfloat16", True), ("1xt4", "bfloat16", True), ("1xv100", "float16", False),
    ("1xa100-80g", "bfloat16", False), ("1xa100-80g", "float32", False),
])  # fmt: skip
def test_a_dtype_that_a_device_has_no_units_for(name: str, dtype: str, said: bool) -> None:
    found = search(facts(dtype=dtype), named(name), Demand(ranks=1))
    line = f"{found.machine.device.name} has no units for bfloat16"
    assert (line in "\n".join(explain.lines(found))) == said
    assert any("--dtype float16" in one for one in explain.to_dict(found)["remarks"]) == said


def test_fewer_ranks_are_named_where_they_are_faster() -> None:
    slow = machine(4, inside=dataclasses.replace(SLOW, bytes_per_s=1e7))
    for there, said in ((slow, True), (machine(4), False)):
        found = search(facts(), there, Demand(ranks=4, layouts_only=True))
        assert any("--ranks 1" in line for line in explain.lines(found)) == said


def test_what_is_counted_is_what_is_compared() -> None:
    """Pictures a second, and bytes."""
    found = search(facts(), machine(8), Demand(ranks=8, objective=Objective.THROUGHPUT))
    said = "\n".join(explain.lines(found))
    assert f"{found.best.pictures / found.best.seconds:.3g} pictures a second predicted" in explain.one_line(found)
    assert "more a picture for" in said
    assert "more plans: --json has all" in said
    found = search(facts(), machine(8), Demand(ranks=8, objective=Objective.MEMORY))
    assert " GB against " in "\n".join(explain.lines(found))
    least = found.best.memory_bytes * 1.005
    assert found.best.seconds == min(cost.seconds for cost in found.costs if cost.memory_bytes <= least)
