"""Machines by name, and measured ones."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from parafuse.engine.planning import known, learned, measure
from parafuse.engine.planning.cost import Candidate, Costs
from parafuse.engine.planning.facts import Facts
from parafuse.engine.planning.machine import TABLE, Machine, machine_names, named, of_kind, on_curve
from parafuse.errors import ConfigError
from tests.planning.models import facts, machine


def test_every_machine_of_the_table_can_be_named() -> None:
    for name in machine_names():
        found = named(f"2x{name}")
        assert found.num_ranks == 2
        assert found.sources
        assert found.device.memory_bytes > 10**10


def test_each_number_of_the_table_has_a_source() -> None:
    table = json.loads(TABLE.read_text())
    assert all(one["sources"] for kind in ("devices", "links") for one in table[kind].values())


def test_nodes_ranks_and_links() -> None:
    one, two = named("8xh200"), named("2x8xh100-ib400")
    assert (one.per_node, one.nodes, one.inside.name) == (8, 1, "nvlink4")
    assert (two.per_node, two.nodes, two.across.name) == (8, 2, "ib400")
    assert named("4xl40-pcie").inside.name.startswith("pcie")
    assert named("4xa100-80g-pcie4").inside.name == "pcie4"
    assert (named("16xh100").per_node, named("16xh100").nodes) == (8, 2)
    assert two.link(8).name == "nvlink4"
    assert two.link(16).name == "ib400"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xh20o", "did you mean 'h20"),
        ("h200", "NUMBERxDEVICE"),
        ("0xh200", "from 1 to"),
        ("9999xh200", "from 1 to"),
        ("8xh200-nvlonk", "is not known"),
        ("", "NUMBERxDEVICE"),
    ],
)
def test_a_wrong_name(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="hardware=") as caught:
        named(text)
    assert said in str(caught.value)


def test_names_of_nvml() -> None:
    assert of_kind("NVIDIA H200") == "h200"
    assert of_kind("NVIDIA H100 80GB HBM3") == "h100"
    assert of_kind("NVIDIA H100 PCIe") == "h100-pcie"
    assert of_kind("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert of_kind("Radeon") is None


def test_a_curve_between_and_beyond_its_points() -> None:
    curve = ((1e3, 1e-6), (1e5, 1e-4))
    assert on_curve(curve, 1e4) == pytest.approx(1e-5)
    assert on_curve(curve, 10) == 1e-6
    assert on_curve(curve, 1e6) == pytest.approx(1e-3)


def test_a_machine_and_facts_as_json() -> None:
    for one in (named("2x8xh100-ib400"), machine()):
        assert Machine.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert Facts.from_dict(json.loads(json.dumps(facts().to_dict()))) == facts()


def test_this_machine_is_measured_alone_and_busy() -> None:
    found = measure.measure(2, "cpu", "float32")
    assert (found.per_node, found.nodes) == (2, 1)
    assert found.busy is not None
    for device in (found.device, found.busy):
        assert {"gemm.float32", "attention.float32", "convolution.float32", "pointwise.float32"} <= device.curves.keys()
        assert 1e9 < device.rate("float32") < 1e13
        assert all(later[0] > earlier[0] for one in device.curves.values() for earlier, later in pairwise(one))
    assert 0 < found.inside.latency_s < 1
    assert 1e6 < found.inside.bytes_per_s < 1e12
    assert Machine.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PARAFUSE_CACHE", str(tmp_path))
    return tmp_path / "planner"


def test_what_was_measured_is_kept_for_this_machine(folder) -> None:
    assert known.machine(8, "cpu", "float32") is None
    known.keep_machine(machine(), 8, "cpu", "float32")
    assert known.machine(8, "cpu", "float32") == machine()
    assert known.machine(4, "cpu", "float32") is None
    assert known.machine(8, "cpu", "bfloat16") is None


def test_facts_are_made_once_and_bounded(folder, monkeypatch) -> None:
    made: list[int] = []

    def make() -> Facts:
        made.append(1)
        return facts()

    assert known.facts("a", make) == known.facts("a", make) == facts()
    assert len(made) == 1
    (folder / "facts" / "a.json").write_text("{broken")
    assert known.facts("a", make) == facts()
    assert len(made) == 2
    monkeypatch.setattr(known, "MOST_FACTS", 3)
    for name in "bcdef":
        known.facts(name, make)
    assert len(list((folder / "facts").glob("*.json"))) == 3


def test_nothing_is_kept_without_a_folder(monkeypatch) -> None:
    monkeypatch.setenv("PARAFUSE_CACHE", "")
    assert known.keep_machine(machine(), 8, "cpu", "float32") is None
    assert known.facts("a", facts) == facts()


def _run(layout: str, measured: float, candidate: Candidate) -> dict[str, object]:
    cost = Costs(facts(), machine()).cost(candidate)
    return {"model": "small", "layout": layout, "measured_s": measured * cost.step_s, **learned.of_step(cost, 10)}


def test_runs_correct_what_is_computed_and_then_what_is_exchanged(folder) -> None:
    device = "some"
    assert learned.corrections(device).factors == {}
    assert learned.record(device, _run("1 rank", 1.5, Candidate()))
    factors = learned.corrections(device).factors
    assert factors["gemm"] == factors["attention"] == pytest.approx(1.5)
    right = Costs(facts(), machine(), learned.corrections(device)).cost(Candidate())
    assert right.step_s == pytest.approx(1.5 * Costs(facts(), machine()).cost(Candidate()).step_s)
    learned.record(device, _run("ulysses 8", 1.55, Candidate(ulysses=8)))
    after = Costs(facts(), machine(), learned.corrections(device)).cost(Candidate(ulysses=8))
    assert after.step_s == pytest.approx(1.55 * Costs(facts(), machine()).cost(Candidate(ulysses=8)).step_s, rel=0.01)
    assert learned.corrections("another").factors == {}


def test_a_disturbed_run_is_not_kept_and_runs_are_bounded(folder) -> None:
    assert not learned.record("some", _run("1 rank", 100.0, Candidate()))
    for _ in range(learned.MOST_RUNS + 5):
        learned.record("some", _run("1 rank", 1.1, Candidate()))
    assert "in 20 runs" in learned.table()[0]
    assert known.forget() == 1
    assert "nothing was learned" in learned.table()[0]
