"""Which plans are legal, which is the best, and what is said of it."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from parafuse.engine.planning.cost import SHARDED, Candidate, Corrections, Cost, Costs
from parafuse.engine.planning.facts import DECODE, DENOISE
from parafuse.engine.planning.machine import Machine
from parafuse.engine.planning.search import (
    Demand,
    Fidelity,
    Floors,
    Found,
    Objective,
    ranked,
    search,
)
from parafuse.engine.planning.search import best as best_alone
from parafuse.engine.planning.turns import changes_of, turns
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
    assert found.best.candidate.offload
    assert found.best.memory_bytes <= 1.005 * min(cost.memory_bytes for cost in found.costs)


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
        (Fidelity.EXACT, {"sparse": "window:2,8,8"}),
        (Fidelity.HIGH, {"sparse": "radial:0.5"}),
        (Fidelity.EXACT, {"attention": "sage"}),
        (Fidelity.HIGH, {"attention": "fp8"}),
    ],
)
def test_contradictory_demands(fidelity: Fidelity, fixed: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="which is lossy"):
        search(facts(), machine(1), Demand(ranks=1, fidelity=fidelity, fixed=fixed))


@pytest.mark.parametrize(
    ("fidelity", "fixed"),
    [
        (Fidelity.EXACT, {"sparse": "", "attention": "auto", "cache": None}),
        (Fidelity.EXACT, {"attention": "flash-attn-3"}),
        (Fidelity.FAST, {"sparse": "window:2,8,8", "attention": "sage", "cache": "taylorseer:3"}),
    ],
)
def test_demands_that_do_not_contradict(fidelity: Fidelity, fixed: dict[str, str | None]) -> None:
    Demand(ranks=1, fidelity=fidelity, fixed=fixed).check()
    Demand(ranks=1, fixed={"sparse": "window:2,8,8", "quantize": "fp8"}, layouts_only=True).check()


def test_what_no_candidate_has_changes_no_plan() -> None:
    fixed = {"sparse": "window:2,8,8", "attention": "sage"}
    plain, given = (
        search(facts(), machine(), Demand(ranks=8, fidelity=Fidelity.FAST, fixed=one)).costs for one in ({}, fixed)
    )
    assert plain == given


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"cfg": 2}, r"parallel\.cfg=2 \(--cfg\): the request has no guidance: one branch; leave it out, or ask for"),
        ({"data": 8}, r"parallel\.data=8 \(--data\): the request has 1 picture .*; leave it out.*--num-images"),
        ({"data": 4, "cfg": 1, "ring": 1, "ulysses": 2}, r"parallel\.data=4"),
    ],
)
def test_degrees_that_the_request_has_no_work_for(fixed: dict[str, int], said: str) -> None:
    """A plan is refused; an engine's own choice leaves them as they are, since its requests are not known yet."""
    for look in (search, best_alone):
        with pytest.raises(ConfigError, match=said):
            look(facts(), machine(), Demand(ranks=8, fixed=fixed))
    found = search(facts(), machine(), Demand(ranks=8, fixed=fixed, layouts_only=True))
    assert fixed.items() <= best(found).degrees.items()
    with pytest.raises(ConfigError, match=r"cfg=3 \(--cfg\): the request has 2 branches"):
        search(guided(), machine(6), Demand(ranks=6, fixed={"cfg": 3}))
    assert best(search(guided(), machine(), Demand(ranks=8, fixed={"cfg": 2}))).cfg == 2
    assert best(search(facts(pictures=8), machine(), Demand(ranks=8, fixed={"data": 8}))).data == 8
    busy = Demand(ranks=8, fixed={"data": 8}, objective=Objective.THROUGHPUT)
    assert best(search(facts(), machine(), busy)).data == 8


def test_what_a_user_has_set_stays() -> None:
    found = search(guided(), machine(), Demand(ranks=8, fixed={"cfg": 1, "ring": 2, "compile": False}))
    assert {(cost.candidate.cfg, cost.candidate.ring, cost.candidate.compile) for cost in found.costs} == {
        (1, 2, False)
    }


NO_FP8 = dataclasses.replace(DEVICE, flops={"bfloat16": 1e14, "fp8": None, "int8": 2e14})


def test_a_device_without_fp8_products_is_given_fp8_weights_alone() -> None:
    found = search(facts(), machine(1, device=NO_FP8), Demand(ranks=1, fidelity=Fidelity.FAST))
    assert {cost.candidate.quantize for cost in found.costs} == {"", "int8", "int8-weight", "fp8-weight"}
    assert "even does not compute in fp8" in found.refused["quantize fp8"]
    assert "quantize fp8-weight" not in found.refused


@pytest.mark.parametrize(
    ("dtype", "methods"),
    [
        ("bfloat16", {"", "int8", "int8-weight", "fp8", "fp8-weight"}),
        ("float16", {"", "fp8-weight"}),
        ("float32", {"", "int8", "int8-weight", "fp8-weight"}),
    ],
)
def test_methods_that_a_dtype_can_have(dtype: str, methods: set[str]) -> None:
    found = search(facts(dtype=dtype), machine(1), Demand(ranks=1, fidelity=Fidelity.FAST))
    assert {cost.candidate.quantize for cost in found.costs} == methods


def test_a_layout_is_chosen_for_any_method_that_a_config_has() -> None:
    there = machine(2, device=NO_FP8)
    demand = Demand(ranks=2, fidelity=Fidelity.FAST, fixed={"quantize": "fp8"})
    with pytest.raises(ConfigError, match="does not compute in fp8"):
        search(facts(), there, demand)
    chosen, plain = (
        search(facts(), there, dataclasses.replace(demand, layouts_only=True, fixed=fixed)).best
        for fixed in (demand.fixed, {})
    )
    assert chosen.candidate == dataclasses.replace(plain.candidate, quantize="fp8")
    assert chosen.denoise.gemm == pytest.approx(plain.denoise.gemm)


def test_compiling_pays_over_many_requests() -> None:
    assert best(search(facts(), machine(1), Demand(ranks=1, requests=1000))).compile
    assert not best(search(facts(), machine(1), Demand(ranks=1, requests=1))).compile


def test_of_plans_that_are_as_good_the_simpler_one() -> None:
    free = dataclasses.replace(DEVICE, bytes_per_s=1e18)
    demand = Demand(ranks=1, requests=10**9)
    assert best(search(facts(), machine(1, device=free), demand)) == Candidate()
    assert best_alone(facts(), machine(1, device=free), demand).candidate == Candidate()


def test_more_heads_that_divide_are_not_ruled_out_by_those_that_do_not() -> None:
    parts = tuple(denoiser(heads=(20,)) if part.phase == DENOISE else part for part in facts().parts)
    found = search(facts(parts=parts), machine(16), Demand(ranks=16, layouts_only=True))
    assert best(found) == Candidate(ring=2, ulysses=8)
    assert ("80 heads", Candidate(ulysses=16)) in {(one.what, one.plan) for one in turns(found)}


def test_what_would_change_the_choice_does() -> None:
    found = search(facts(), machine(), Demand(ranks=8, layouts_only=True))
    changes = turns(found)
    assert [one.what for one in changes] == ["12 heads"]
    assert changes[0].plan == Candidate(ring=2, ulysses=4)  # 12 heads do not divide by 8
    assert all(one.gain > 1 and one.plan != best(found) for one in changes)


DEMANDS = [
    Demand(ranks=ranks, objective=objective, fidelity=fidelity, layouts_only=layouts_only)
    for ranks in (1, 6, 8)
    for objective in Objective
    for fidelity in (Fidelity.EXACT, Fidelity.FAST)
    for layouts_only in (False, True)
]
SMALL = dataclasses.replace(DEVICE, memory_bytes=int(4e9))
PLACES = {
    "fast": machine(4, nodes=2),
    "slow": machine(4, nodes=2, inside=SLOW),
    "small": machine(4, nodes=2, device=SMALL),
    "tiny": machine(4, nodes=2, device=dataclasses.replace(DEVICE, memory_bytes=1)),
}


def _slowest_ranking(costs: list[Cost], found: Found) -> list[Cost]:
    """What the ranking is, word for word."""
    left, out = sorted(costs, key=found.value), list[Cost]()
    by_time = found.demand.objective == Objective.MEMORY

    def tie(cost: Cost) -> tuple[float, ...]:
        return (cost.seconds if by_time else 0.0, *_options(cost.candidate), found.value(cost))

    while left:
        same = [cost for cost in left if found.value(cost) <= found.value(left[0]) * 1.005]
        out.append(min(same, key=tie))
        left.remove(out[-1])
    return out


def _options(one: Candidate) -> tuple[int, int]:
    given = [one.compile, one.quantize, one.cache, one.offload]
    return sum(map(bool, given)), sum(degree > 1 for degree in one.degrees.values())


def _none(there: Machine, demand: Demand) -> str | None:
    """Why there is no plan."""
    try:
        search(guided(), there, demand)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("where", PLACES)
def test_the_best_alone_is_the_first_of_all(where: str) -> None:
    """Also with what another machine's plans have told about the least that a plan takes."""
    there, legal = PLACES[where], 0
    for demand in DEMANDS:
        costs = Costs(guided(), there)
        floors = Floors(costs, demand)
        if (why := _none(there, demand)) is not None:
            with pytest.raises(ConfigError) as caught:
                best_alone(guided(), there, demand)
            assert str(caught.value) == why
            continue
        found = search(guided(), there, demand)
        legal += 1
        assert best_alone(guided(), there, demand) == found.best
        mixed = random.Random(0).sample(found.costs, len(found.costs))
        assert list(ranked(mixed, demand)) == _slowest_ranking(mixed, found)
        for changes in changes_of(found.facts).values():
            for what, change in changes[-1:]:
                facts_then, there_then = change(found.facts, there)
                then = best_alone(
                    facts_then, there_then, demand, costs=costs.beside(facts_then, there_then), floors=floors
                )
                assert then == search(facts_then, there_then, demand).best, (demand, what)
    assert legal


def test_plans_that_floors_rule_out_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    demand = Demand(ranks=16, objective=Objective.THROUGHPUT, fidelity=Fidelity.FAST)
    costs = Costs(guided(), machine(8, nodes=2))
    floors = Floors(costs, demand)
    found = best_alone(guided(), costs.machine, demand, costs=costs, floors=floors)
    asked: list[Candidate] = []
    real = Costs.cost
    monkeypatch.setattr(Costs, "cost", lambda self, one, **how: asked.append(one) or real(self, one, **how))
    assert best_alone(guided(), costs.machine, demand, costs=costs, floors=floors) == found
    assert len(asked) < search(guided(), costs.machine, demand).tried / 3


def test_turns_are_what_whole_searches_tell() -> None:
    for there in (machine(), machine(4, nodes=2)):
        found = search(guided(), there, Demand(ranks=8, fidelity=Fidelity.FAST))
        seen = turns(found)
        assert seen
        for one in seen:
            change = next(c for kind in changes_of(found.facts).values() for what, c in kind if what == one.what)
            then = search(*change(found.facts, there), found.demand)
            now = next(cost for cost in then.costs if cost.candidate == found.best.candidate)
            assert one.plan == then.best.candidate
            assert one.gain == pytest.approx(then.value(now) / then.value(then.best))


def test_memory_turns_a_plan_with_offload() -> None:
    small = machine(1, device=dataclasses.replace(DEVICE, memory_bytes=int(5.6e9)))
    found = search(facts(), small, Demand(ranks=1, fixed={"compile": False}))
    assert found.best.candidate == Candidate(offload="model")
    assert ("2 times the memory", Candidate()) in {(one.what, one.plan) for one in turns(found)}


def test_a_search_keeps_the_corrections_and_turns_go_by_them() -> None:
    slow = Corrections(factors={"ulysses": 40.0})
    there = machine(inside=dataclasses.replace(SLOW, bytes_per_s=1e11, latency_s=1e-6))
    demand = Demand(ranks=8, layouts_only=True)
    plain, corrected = search(facts(), there, demand), search(facts(), there, demand, slow)
    assert corrected.corrections == slow
    assert search(facts(), there, demand, costs=Costs(facts(), there, slow)).corrections == slow
    assert best(plain) == Candidate(ulysses=8)
    assert best(corrected) == Candidate(ring=8)
    assert turns(corrected) != turns(plain)
    assert turns(corrected) != turns(dataclasses.replace(corrected, corrections=None))


def test_layouts_that_are_refused_are_in_no_plan() -> None:
    asked: list[Candidate] = []

    def refusal(one: Candidate) -> str:
        asked.append(one)
        return "attention with sinks has no ring" if one.ring > 1 else ""

    found = search(facts(), machine(), Demand(ranks=8, fidelity=Fidelity.FAST), refusal=refusal)
    assert {cost.candidate.ring for cost in found.costs} == {1}
    assert found.refused["ring 2 x ulysses 4"] == "attention with sinks has no ring"
    assert Candidate(ring=2, ulysses=4) in asked
    assert all(not (one.compile or one.quantize or one.cache or one.offload) for one in asked)
    assert len(asked) == len(set(asked))
    free = search(facts(), machine(), Demand(ranks=8, fidelity=Fidelity.FAST))
    assert any(one.plan.ring > 1 for one in turns(free))
    assert not any(one.plan.ring > 1 for one in turns(found))
    assert "refusal" not in repr(found)
    assert found == dataclasses.replace(found, refusal=None)
    with pytest.raises(ConfigError, match="ulysses 8: never"):
        search(facts(), machine(), Demand(ranks=8), refusal=lambda one: "never")
    with pytest.raises(ConfigError, match="ulysses 8: never"):
        best_alone(facts(), machine(), Demand(ranks=8), refusal=lambda one: "never")


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


def test_where_no_plan_is_legal_a_number_of_ranks_is_told_that_has_one() -> None:
    parts = (denoiser(refused="it has no block stack"),)
    with pytest.raises(ConfigError, match=r"no plan of 8 ranks .*With 2 ranks there is one: cfg 2\."):
        search(guided(parts=parts), machine(8), Demand(ranks=8))
    small = dataclasses.replace(machine(1), device=dataclasses.replace(DEVICE, memory_bytes=1))
    with pytest.raises(ConfigError, match="no plan of 1 rank is legal"):
        search(facts(), small, Demand(ranks=1))


def test_weights_are_cut_only_between_ranks_that_share_a_sequence() -> None:
    found = search(facts(branches=2, pictures=4), machine(4), Demand(ranks=4, fixed={"offload": SHARDED}))
    assert found.costs
    assert all(cost.candidate.sequence > 1 and cost.candidate.offload == SHARDED for cost in found.costs)
    assert any("share a sequence" in why for why in found.refused.values())
