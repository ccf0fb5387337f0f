"""Which plans are legal, which is the best, and what is said of it."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from parafuse.engine.planning import explain
from parafuse.engine.planning.cost import Candidate
from parafuse.engine.planning.facts import DECODE, DENOISE
from parafuse.engine.planning.search import Demand, Fidelity, Found, Objective, search, turns
from parafuse.errors import ConfigError
from tests.planning.models import DEVICE, SLOW, denoiser, facts, guided, machine


def best(found: Found) -> Candidate:
    return found.best.candidate


def test_on_fast_links_ulysses_takes_all_ranks() -> None:
    found = search(facts(), machine(), Demand(ranks=8, layouts_only=True))
    assert best(found) == Candidate(ulysses=8)
    assert found.tried == 4  # 8, 2 x 4, 4 x 2, 8 of ring x ulysses


def test_branches_go_before_a_sequence_where_there_are_two() -> None:
    assert best(search(guided(), machine(2), Demand(ranks=2, layouts_only=True))) == Candidate(cfg=2)
    assert best(search(guided(), machine(8), Demand(ranks=8, layouts_only=True))) == Candidate(cfg=2, ulysses=4)


def test_the_crossover_moves_with_the_hardware() -> None:
    """Ulysses inside of nodes, ring between them."""
    found = search(facts(), machine(4, nodes=2), Demand(ranks=8, layouts_only=True))
    assert best(found) == Candidate(ring=2, ulysses=4)


def test_more_replicas_for_throughput() -> None:
    found = search(facts(), machine(), Demand(ranks=8, objective=Objective.THROUGHPUT, layouts_only=True))
    assert best(found) == Candidate(data=8)
    latency = search(facts(), machine(), Demand(ranks=8, layouts_only=True))
    assert "1 picture" in latency.refused["data"]


def test_least_memory() -> None:
    found = search(facts(), machine(), Demand(ranks=8, objective=Objective.MEMORY, fidelity=Fidelity.FAST))
    assert found.best.candidate.quantize
    assert found.best.memory_bytes == min(cost.memory_bytes for cost in found.costs)


def test_every_plan_multiplies_to_the_ranks_and_keeps_to_the_facts() -> None:
    for ranks in (1, 2, 3, 6, 12, 64):
        found = search(guided(), machine(8, nodes=8), Demand(ranks=ranks))
        assert {cost.candidate.num_ranks for cost in found.costs} == {ranks}
        assert all(cost.candidate.cfg <= 2 and cost.candidate.ulysses <= 24 for cost in found.costs)
        values = [found.value(cost) for cost in found.costs]
        assert all(later >= earlier * 0.99 for earlier, later in itertools.pairwise(values))


def test_what_cannot_be_shared_is_not_tried() -> None:
    parts = tuple(denoiser(refused="UNet has no block stack") if p.phase == DENOISE else p for p in guided().parts)
    found = search(guided(parts=parts), machine(2), Demand(ranks=2))
    assert {cost.candidate.sequence for cost in found.costs} == {1}
    assert found.refused["ulysses, ring"] == "UNet has no block stack"


def test_no_legal_plan_names_every_constraint() -> None:
    parts = tuple(denoiser(refused="UNet has no block stack") if p.phase == DENOISE else p for p in facts().parts)
    with pytest.raises(ConfigError, match="no plan of 4 ranks is legal") as caught:
        search(facts(parts=parts), machine(4), Demand(ranks=4))
    for said in ("1 picture", "one branch", "UNet has no block stack"):
        assert said in str(caught.value)


def test_memory_rules_plans_out_and_offload_lets_them_in() -> None:
    small = machine(1, device=dataclasses.replace(DEVICE, memory_bytes=int(5.6e9)))
    found = search(facts(), small, Demand(ranks=1))
    assert found.best.candidate.offload == "model"
    assert "needs 6.5 GB in denoise" in found.refused["1 rank"]
    with pytest.raises(ConfigError, match=r"needs 6\.5 GB"):
        search(facts(), small, Demand(ranks=1, fixed={"offload": ""}))


def test_fidelity_bounds_the_options() -> None:
    def options(fidelity: Fidelity) -> set[tuple[str, str]]:
        found = search(facts(), machine(1), Demand(ranks=1, fidelity=fidelity))
        return {(cost.candidate.quantize, cost.candidate.cache.partition(":")[0]) for cost in found.costs}

    assert options(Fidelity.EXACT) == {("", "")}
    assert ("int8", "") in options(Fidelity.HIGH)
    assert not any(cache or method.startswith("fp8") for method, cache in options(Fidelity.HIGH))
    assert ("fp8", "first-block") in options(Fidelity.FAST)


@pytest.mark.parametrize(
    ("fidelity", "fixed"),
    [
        (Fidelity.EXACT, {"cache": "first-block:0.1"}),
        (Fidelity.EXACT, {"quantize": "int8"}),
        (Fidelity.HIGH, {"quantize": "fp8"}),
    ],
)
def test_contradictory_demands(fidelity: Fidelity, fixed: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="which is lossy"):
        search(facts(), machine(1), Demand(ranks=1, fidelity=fidelity, fixed=fixed))


def test_what_a_user_has_set_stays() -> None:
    found = search(guided(), machine(), Demand(ranks=8, fixed={"cfg": 1, "ring": 2, "compile": False}))
    assert {(cost.candidate.cfg, cost.candidate.ring, cost.candidate.compile) for cost in found.costs} == {
        (1, 2, False)
    }


def test_a_device_without_fp8_is_not_given_it() -> None:
    old = machine(1, device=dataclasses.replace(DEVICE, flops={"bfloat16": 1e14, "fp8": None, "int8": 2e14}))
    found = search(facts(), old, Demand(ranks=1, fidelity=Fidelity.FAST))
    assert not any(cost.candidate.quantize.startswith("fp8") for cost in found.costs)
    assert "even does not compute in fp8" in found.refused["quantize fp8"]


def test_compiling_pays_over_many_requests() -> None:
    assert best(search(facts(), machine(1), Demand(ranks=1, requests=1000))).compile
    assert not best(search(facts(), machine(1), Demand(ranks=1, requests=1))).compile


def test_of_plans_that_are_as_good_the_simpler_one() -> None:
    free = dataclasses.replace(DEVICE, bytes_per_s=1e18)
    found = search(facts(), machine(1, device=free), Demand(ranks=1, requests=10**9))
    assert best(found) == Candidate()


def test_what_would_change_the_choice_does() -> None:
    found = search(facts(), machine(), Demand(ranks=8, layouts_only=True))
    changes = turns(found)
    assert [one.what for one in changes] == ["12 heads"]
    assert changes[0].plan == Candidate(ring=2, ulysses=4)  # 12 heads do not divide by 8
    assert all(one.gain > 1 and one.plan != best(found) for one in changes)


def test_the_explanation_names_the_parts_that_cost() -> None:
    found = search(facts(), machine(inside=SLOW), Demand(ranks=8))
    said = "\n".join(explain.lines(found))
    assert f"best: {found.best.candidate}" in said
    assert "more a step for" in said
    assert "ruled out:" in said
    assert json.loads(json.dumps(explain.to_dict(found)))["plans"][0]["degrees"] == found.best.candidate.degrees


def test_hundreds_of_plans_for_64_ranks() -> None:
    found = search(
        guided(), machine(8, nodes=8), Demand(ranks=64, objective=Objective.THROUGHPUT, fidelity=Fidelity.FAST)
    )
    assert found.tried >= 500


def test_a_layout_alone_is_chosen_even_if_the_request_that_is_taken_for_granted_has_no_room() -> None:
    there = machine(4)
    small = dataclasses.replace(there, device=dataclasses.replace(there.device, memory_bytes=1))
    found = search(facts(), small, Demand(ranks=4, layouts_only=True))
    assert best(found) == best(search(facts(), there, Demand(ranks=4, layouts_only=True)))
    with pytest.raises(ConfigError, match="no plan of 4 ranks is legal"):
        search(facts(), small, Demand(ranks=4))


def test_tiles_are_the_way_out_where_a_decode_has_no_room() -> None:
    there = machine(2)
    parts = tuple(dataclasses.replace(p, peak_alone=1e15 if p.phase == DECODE else p.peak_alone) for p in facts().parts)
    for tiles, said in ((0, True), (9, False)):
        large = dataclasses.replace(facts(), parts=parts, tiles=tiles)
        with pytest.raises(ConfigError) as caught:
            search(large, there, Demand(ranks=2))
        assert ("--vae tiled" in str(caught.value)) == said
