"""Machines by name, and measured ones."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from itertools import pairwise
from typing import Any

import pytest

from parafuse.engine.planning import known, learned, measure
from parafuse.engine.planning.cost import Candidate, Costs, rate_of
from parafuse.engine.planning.facts import Facts
from parafuse.engine.planning.machine import MEASURED, TABLE, Machine, machine_names, named, on_curve
from parafuse.errors import ConfigError, ParafuseError
from tests.planning.models import DEVICE, facts, guided, machine


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
    assert named("64xh200").name == "8x8xh200"
    assert named("1x64xh200").name == "1x64xh200"
    inside = named("2x8xh100-pcie5")
    assert (inside.inside.name, inside.across.name) == ("pcie5", "ib400"), "a link that joins no nodes is in them"
    assert named("8xh200-nvlink").inside.name == "nvlink4"
    assert named("8xh800-nvlink").inside.name == "nvlink4-400"
    assert named("4xa40-pcie").inside.name == "pcie4"
    assert two.link(8).name == "nvlink4"
    assert two.link(16).name == "ib400"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xh20o", "did you mean 'h20"),
        ("h200", "NUMBERxDEVICE"),
        ("0xh200", "from 1 to"),
        ("9999xh200", "from 1 to"),
        ("8xh200-nvlonk", "did you mean 'nvlink4'"),
        ("8xh200-nvlonk", "Its links are nvlink4, pcie5"),
        ("8xh200-ib400", "ib400 joins nodes, and this is one"),
        ("4xl40-nvlink", "l40 has no such link. Its links are pcie4, pcie3"),
        ("4xl40-pcie5", "l40 has no such link"),
        ("4xrtx3090-nvlink", "rtx3090 has no such link"),
        ("8xh100-p", "h100 has no kind or link 'p'"),
        ("9xfoo", "'foo' is not known. There are a10, "),
        ("", "NUMBERxDEVICE"),
    ],
)
def test_a_wrong_name(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="hardware=") as caught:
        named(text)
    assert said in str(caught.value)


def test_the_way_from_the_host_goes_by_the_slot() -> None:
    rates = {name: named(f"1x{name}").device.host_bytes_per_s for name in ("v100", "a100-80g", "l40", "h100")}
    assert rates["v100"] < rates["a100-80g"] == rates["l40"] < rates["h100"]
    measured = measure.with_other_dtypes(dataclasses.replace(DEVICE, name="Tesla T4", flops={"float16": 1e13}))
    assert measured.host_bytes_per_s == rates["v100"]


def test_a_curve_between_and_beyond_its_points() -> None:
    curve = ((1e3, 1e-6), (1e5, 1e-4))
    assert on_curve(curve, 1e4) == pytest.approx(1e-5)
    assert on_curve(curve, 10) == 1e-6
    assert on_curve(curve, 1e6) == pytest.approx(1e-3)


def test_a_machine_and_facts_as_json() -> None:
    for one in (named("2x8xh100-ib400"), machine()):
        assert Machine.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert Facts.from_dict(json.loads(json.dumps(facts().to_dict()))) == facts()


@pytest.mark.whole
def test_this_machine_is_measured_alone_and_busy() -> None:
    found = measure.measure(2, "cpu", "float32")
    assert (found.per_node, found.nodes) == (2, 1)
    assert found.busy is not None
    for device in (found.device, found.busy):
        assert {"gemm.float32", "attention.float32", "convolution.float32", "pointwise.float32"} <= device.curves.keys()
        assert 1e9 < rate_of(device, "float32") < 1e13
        assert all(later[0] > earlier[0] for one in device.curves.values() for earlier, later in pairwise(one))
    assert 0 < found.inside.latency_s < 1
    assert 1e6 < found.inside.bytes_per_s < 1e12
    assert found.is_measured
    assert rate_of(found.device, "bfloat16") == rate_of(found.device, "float32")
    assert Machine.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def one_fails(rank: int, *rest: Any) -> None:
    if rank == 0:
        time.sleep(300)
    rest[-1].put("ValueError: no room for it")


def one_ends(rank: int, *_: Any) -> None:
    if rank == 0:
        time.sleep(300)
    os._exit(7)


@pytest.mark.parametrize(("does", "said"), [(one_fails, "ValueError: no room for it"), (one_ends, "exit code 7")])
def test_a_rank_that_fails_ends_the_others_and_says_why(monkeypatch, does, said) -> None:
    monkeypatch.setattr(measure, "_rank", does)
    begun = time.monotonic()
    with pytest.raises(ParafuseError, match=said):
        measure._run(2, "cpu", "float32")
    assert time.monotonic() - begun < measure.MOST_S / 2


def test_an_exchange_is_a_line_through_all_of_its_sizes() -> None:
    latency, rate = measure.fitted([(size, 1e-4 + size / 1e9, 2e-4 + size / 1e9) for size in measure.SENT])
    assert latency == pytest.approx(1e-4)
    assert rate == pytest.approx(1e9)


@pytest.mark.parametrize("wrong", range(len(measure.SENT)))
@pytest.mark.parametrize("by", [-1.0, 1.0])
def test_one_disturbed_exchange_does_not_make_a_link_that_cannot_be(wrong: int, by: float) -> None:
    whole = [1e-3 + size / 1e9 for size in measure.SENT]
    points = [(size, one - 5e-4, one) for size, one in zip(measure.SENT, whole, strict=True)]
    points[wrong] = (points[wrong][0], points[wrong][1] + by * points[wrong][2], points[wrong][2])
    latency, rate = measure.fitted(points)
    fastest = max(size / one for size, one in zip(measure.SENT, whole, strict=True))
    assert 0 < latency < 2e-3
    assert 1e8 < rate <= 2 * fastest * (1 + 1e-9)


def test_what_is_measured_in_one_dtype_has_estimates_of_others() -> None:
    h100 = named("1xh100").device
    alone: dict[str, Any] = {"flops": {"bfloat16": 7e14}, "attention": {"bfloat16": 5e14}}
    found = measure.with_other_dtypes(dataclasses.replace(DEVICE, name="NVIDIA H100 80GB HBM3", **alone))
    assert rate_of(found, "bfloat16") == 7e14
    assert rate_of(found, "float32") == pytest.approx(7e14 * rate_of(h100, "float32") / rate_of(h100, "bfloat16"))
    assert rate_of(found, "fp8") == pytest.approx(7e14 * rate_of(h100, "fp8") / rate_of(h100, "bfloat16"))
    assert rate_of(found, "float32", attention=True) < rate_of(found, "bfloat16", attention=True) == 5e14
    cpu = measure.with_other_dtypes(dataclasses.replace(DEVICE, name="some", kind="cpu", **alone))
    assert {rate_of(cpu, dtype) for dtype in ("float32", "float16", "int8", "bfloat16")} == {7e14}
    assert not cpu.flops.get("fp8")


def test_rates_where_no_other_device_is_known() -> None:
    assert measure._filled_in({"bfloat16": 8.0}, {})["float32"] == 4.0
    assert measure._filled_in({"float32": 8.0}, {"float32": None, "int8": 5.0})["bfloat16"] == 16.0


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


def test_a_run_of_several_ranks_that_hardly_exchange_corrects_what_they_compute(folder) -> None:
    """Branches exchange next to nothing: no factor of that explains a step that took half as long again."""
    one = Candidate(cfg=2)

    def cost(**how: Any):
        return Costs(guided(), machine(2), **how).cost(one)

    plain = cost()
    assert plain.denoise.batch < 0.01 * plain.denoise.total
    for measured in (1.5, 0.7):
        known.forget()
        told = {"model": "small", "layout": str(one), "measured_s": measured * plain.step_s}
        learned.record("some", told | learned.of_step(plain, 10))
        after = cost(corrections=learned.corrections("some"))
        assert after.step_s == pytest.approx(measured * plain.step_s, rel=0.01)
    alone = Costs(guided(), machine(2), learned.corrections("some")).cost(Candidate())
    assert alone.step_s == pytest.approx(Costs(guided(), machine(2)).cost(Candidate()).step_s)


def test_what_is_known_says_whether_it_is_used(folder) -> None:
    learned.record("some", _run("1 rank", 1.5, Candidate()), machine(1), "bfloat16")
    learned.record("some", _run("1 rank", 1.2, Candidate()), machine(1), "float32")
    learned.record_hits("some", "small", "first-block", 0.4)
    said = learned.table("some", machine(1), "bfloat16")
    assert said[0].endswith("(in use)")
    assert said[1].endswith("(not in use: of another device, machine or dtype)")
    assert said[2] == "some; small; cache first-block: 40% of the calls were left out, in 1 run (in use)"
    assert said[4:] == [
        "predictions for 1xeven in bfloat16 go by:",
        "  what is computed: 1.50",
        "  cache first-block: 40% left out",
    ]
    assert learned.table("other", machine(1), "bfloat16")[-1] == "  nothing that was learned"


def test_a_disturbed_run_is_not_kept_and_runs_are_bounded(folder) -> None:
    assert not learned.record("some", _run("1 rank", 100.0, Candidate()))
    for _ in range(learned.MOST_RUNS + 5):
        learned.record("some", _run("1 rank", 1.1, Candidate()))
    assert "in 20 runs" in learned.table()[0]
    assert known.forget() == 1
    assert "nothing was learned" in learned.table()[0]


def test_only_runs_that_were_predicted_alike_correct_a_prediction(folder) -> None:
    guessed, right = named("1xh100"), dataclasses.replace(machine(1), sources=(MEASURED,))
    estimate = dataclasses.replace(right, sources=())
    learned.record("some", _run("1 rank", 1.5, Candidate()), estimate, "bfloat16")
    learned.record("some", _run("1 rank", 0.5, Candidate()), estimate, "float32")

    def factor(machine: Machine, dtype: str) -> float:
        return learned.corrections("some", machine, dtype).of("gemm")

    assert factor(estimate, "bfloat16") == pytest.approx(1.5)
    assert factor(estimate, "float32") == pytest.approx(0.5)
    assert factor(dataclasses.replace(estimate, per_node=8, name="8xeven"), "bfloat16") == pytest.approx(1.5)
    assert factor(right, "bfloat16") == factor(guessed, "bfloat16") == factor(estimate, "float16") == 1.0
    learned.record("some", _run("1 rank", 1.1, Candidate()), right, "bfloat16")
    assert factor(right, "bfloat16") == pytest.approx(1.1)
    assert factor(estimate, "bfloat16") == pytest.approx(1.5)
    assert [line.partition(":")[0].split("; ")[3:] for line in learned.table()] == [
        ["bfloat16 by even, estimated"],
        ["float32 by even, estimated"],
        ["bfloat16 by even, measured"],
    ]


def test_runs_of_one_dtype_do_not_push_out_those_of_another(folder) -> None:
    learned.record("some", _run("1 rank", 1.5, Candidate()), machine(1), "float32")
    for _ in range(learned.MOST_RUNS):
        learned.record("some", _run("1 rank", 1.1, Candidate()), machine(1), "bfloat16")
    assert learned.corrections("some", machine(1), "float32").of("gemm") == pytest.approx(1.5)


def test_what_a_cache_leaves_out_does_not_depend_on_the_prediction(folder) -> None:
    learned.record_hits("some", "small", "first-block", 0.4)
    assert learned.corrections("some", machine(), "bfloat16").hit_rates == {"first-block": 0.4}
