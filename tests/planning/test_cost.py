"""What a plan costs, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from parafuse.engine.planning.cost import SHARDED, Candidate, Corrections, Costs, rate_of, seconds_of, uneven
from parafuse.engine.planning.facts import ATTENTION, DENOISE, GEMM, Amount, Operator
from parafuse.engine.planning.machine import Curve, Link, Machine
from tests.planning.models import BLOCKS, DEVICE, FAST, ITEM, SLOW, TOKENS, WIDTH, denoiser, facts, guided, machine

PRODUCT = 2.0 * TOKENS * WIDTH * WIDTH
PAIRS = 4.0 * TOKENS * TOKENS * WIDTH
MOVED = 2.0 * TOKENS * WIDTH * ITEM


def cost(one: Candidate, there: Machine | None = None, **changes: object):
    return Costs(facts(**changes), there or machine()).cost(one)


def test_one_rank_is_the_sum_of_its_operators() -> None:
    step = cost(Candidate()).denoise
    assert step.gemm == pytest.approx(10 * BLOCKS * PRODUCT / 1e14)
    assert step.attention == pytest.approx(10 * BLOCKS * PAIRS / 1e14)
    assert step.pointwise == pytest.approx(10 * BLOCKS * 4 * MOVED / 1e12)
    assert step.ulysses == step.ring == step.gather == step.batch == 0


def test_an_operator_takes_as_long_as_its_slower_limit() -> None:
    skinny = Operator(where="", family=GEMM, dtype="bfloat16", count=1, flops=Amount(1e9), weights=1e10)
    assert seconds_of(skinny, 1, 1.0, DEVICE) == pytest.approx(1e10 / 1e12)
    wide = dataclasses.replace(skinny, flops=Amount(1e13))
    assert seconds_of(wide, 1, 1.0, DEVICE) == pytest.approx(1e13 / 1e14)


def test_what_is_replicated_does_not_get_less() -> None:
    alone, eight = cost(Candidate()), cost(Candidate(ulysses=8))
    assert eight.denoise.gemm == pytest.approx(alone.denoise.gemm * (0.1 + 0.9 / 8))
    assert eight.replicated == pytest.approx(0.1 * PRODUCT / (PRODUCT * (0.1 + 0.9 / 8) + PAIRS / 8))
    assert alone.replicated == 0


def test_ulysses_sends_what_the_formula_says() -> None:
    found = cost(Candidate(ulysses=4)).denoise.ulysses
    sent = BLOCKS * 4 * TOKENS * WIDTH * ITEM / 4 * 3 / 4
    assert found == pytest.approx(10 * (sent / FAST.bytes_per_s + 2 * BLOCKS * FAST.latency_s))


def test_a_ring_hides_its_sending_behind_attention_where_it_can() -> None:
    fast = cost(Candidate(ring=4)).denoise.ring
    slow = cost(Candidate(ring=4), machine(inside=SLOW)).denoise.ring
    block = 2 * TOKENS * WIDTH * ITEM / 4
    attention = PAIRS / 1e14 / 4 / 4
    shown = block / SLOW.bytes_per_s + SLOW.latency_s - attention + SLOW.latency_s / 2 + 6 * block / 1e12
    assert slow == pytest.approx(10 * BLOCKS * 3 * shown)
    assert block / FAST.bytes_per_s + FAST.latency_s < attention  # all of it is hidden: what is left is merging
    assert fast == pytest.approx(10 * BLOCKS * 3 * (FAST.latency_s / 2 + 6 * block / 1e12))


def test_ulysses_over_nodes_costs_the_slow_link() -> None:
    inside = cost(Candidate(ulysses=8))
    over = cost(Candidate(ulysses=8), machine(4, nodes=2))
    ring = cost(Candidate(ring=2, ulysses=4), machine(4, nodes=2))
    assert over.denoise.ulysses > 20 * inside.denoise.ulysses
    assert ring.seconds < over.seconds  # Ulysses inside a node, ring between nodes


def test_a_shared_bus_slows_all_who_use_it() -> None:
    bus = dataclasses.replace(SLOW, node_bytes_per_s=1e10)
    alone, shared = (cost(Candidate(ulysses=8), machine(inside=one)).denoise.ulysses for one in (SLOW, bus))
    assert shared > 3 * alone


def test_heads_that_do_not_divide_wait_for_the_rank_with_the_most() -> None:
    assert uneven(24, 8) == 1
    assert uneven(24, 16) == pytest.approx(2 * 16 / 24)
    parts = tuple(denoiser(heads=(20,)) if part.phase == DENOISE else part for part in facts().parts)
    even, odd = cost(Candidate(ulysses=8)), cost(Candidate(ulysses=8), parts=parts)
    assert odd.denoise.attention == pytest.approx(even.denoise.attention * 3 * 8 / 20)


def test_branches_side_by_side() -> None:
    both, one = (Costs(guided(), machine()).cost(Candidate(cfg=degree)) for degree in (1, 2))
    assert one.denoise.gemm == pytest.approx(both.denoise.gemm / 2)
    assert both.denoise.batch == 0 < one.denoise.batch
    stacked = guided(parts=facts().parts, stacked=True)
    half = Costs(stacked, machine()).cost(Candidate(cfg=2))
    whole = Costs(stacked, machine()).cost(Candidate())
    assert half.denoise.attention == pytest.approx(whole.denoise.attention / 2)


def test_three_branches_on_two_ranks_take_two_rounds() -> None:
    three = guided(branches=3)
    one, two = (Costs(three, machine()).cost(Candidate(cfg=degree)).denoise.gemm for degree in (1, 2))
    assert two == pytest.approx(one * 2 / 3)


def test_replicas_share_pictures() -> None:
    costs = Costs(facts(), machine())
    four = costs.cost(Candidate(data=4), pictures=4)
    assert four.denoise.gemm == pytest.approx(costs.cost(Candidate()).denoise.gemm)
    assert four.throughput > 3.5 * costs.cost(Candidate()).throughput
    assert costs.cost(Candidate(data=4), pictures=5).denoise.gemm == pytest.approx(2 * four.denoise.gemm)


def test_compiling_fuses_and_costs_once() -> None:
    plain, compiled = cost(Candidate()), cost(Candidate(compile=True))
    assert compiled.denoise.pointwise == pytest.approx(plain.denoise.pointwise / 4)
    assert plain.compile_s == 0 < compiled.compile_s


def test_quantized_products_are_faster_and_smaller() -> None:
    plain, quantized, kept = (cost(Candidate(quantize=how)) for how in ("", "fp8", "fp8-weight"))
    assert quantized.denoise.gemm == pytest.approx(plain.denoise.gemm / 2)
    assert kept.denoise.gemm == pytest.approx(plain.denoise.gemm)
    assert plain.memory_bytes - kept.memory_bytes == pytest.approx(2e9)


def test_a_cache_leaves_steps_out_by_its_hit_rate() -> None:
    plain = cost(Candidate())
    known = Corrections(hit_rates={"first-block": 0.5})
    cached = Costs(facts(), machine(), known).cost(Candidate(cache="first-block:0.1"))
    assert cached.denoise.total == pytest.approx(plain.denoise.total / 2)
    assert cost(Candidate(cache="first-block:0.1")).denoise.total < plain.denoise.total


def test_corrections_scale_what_they_are_of() -> None:
    twice = Costs(facts(), machine(), Corrections(factors={"attention": 2.0})).cost(Candidate())
    assert twice.denoise.attention == pytest.approx(2 * cost(Candidate()).denoise.attention)
    assert twice.denoise.gemm == pytest.approx(cost(Candidate()).denoise.gemm)


def test_the_host_is_waited_for_on_a_gpu_alone_where_it_is_slower() -> None:
    slow_host = machine(device=dataclasses.replace(DEVICE, host_s=1e-3))
    assert cost(Candidate(ulysses=8), slow_host).denoise.host > 0
    assert cost(Candidate()).denoise.host == 0


def test_memory_is_that_of_the_phase_with_the_most() -> None:
    alone, eight = cost(Candidate()), cost(Candidate(ulysses=8))
    assert alone.memory_bytes == pytest.approx(5.1e9 + 5e8 + 0.9e9)
    assert alone.memory_at == DENOISE
    assert eight.memory_bytes < alone.memory_bytes
    away = cost(Candidate(offload="model"))
    assert away.memory_bytes == pytest.approx(4e9 + 5e8 + 0.9e9)
    assert away.seconds > alone.seconds


def test_measured_curves_go_before_rates() -> None:
    curve: Curve = ((1e6, 1e-3), (1e8, 1e-1))
    measured = dataclasses.replace(DEVICE, curves={"gemm.bfloat16": curve, "pointwise.bfloat16": curve})
    product = Operator(where="", family=GEMM, dtype="bfloat16", count=1, flops=Amount(1e7))
    assert seconds_of(product, 1, 1.0, measured) == pytest.approx(1e-2)
    assert seconds_of(dataclasses.replace(product, flops=Amount(1e9)), 1, 1.0, measured) == pytest.approx(1.0)
    other = Operator(where="", family="mul", dtype="bfloat16", count=1, bytes=Amount(1e5))
    assert seconds_of(other, 1, 1.0, measured) == pytest.approx(1e-3)


def test_a_step_is_a_part_of_the_request() -> None:
    found = cost(Candidate(ulysses=2))
    assert found.step_s == pytest.approx(found.denoise.total / 10)
    assert found.seconds == pytest.approx(found.encode_s + found.denoise.total + found.decode_s)
    assert found.to_dict()["seconds"] == found.seconds


def test_weights_in_8_bits_are_less_to_read_and_compute_as_the_model_does() -> None:
    reads = Operator(where="", family=GEMM, dtype="bfloat16", count=1, flops=Amount(1e9), weights=1e10)
    computes = dataclasses.replace(reads, flops=Amount(1e13))
    for method in ("fp8-weight", "int8-weight"):
        assert seconds_of(reads, 1, 1.0, DEVICE, method) == pytest.approx(1e10 / 2 / 1e12)
        assert seconds_of(computes, 1, 1.0, DEVICE, method) == pytest.approx(1e13 / 1e14)
    moves = dataclasses.replace(reads, weights=0.0, bytes=Amount(1e10))
    assert seconds_of(moves, 1, 1.0, DEVICE, "fp8-weight") == seconds_of(moves, 1, 1.0, DEVICE)
    curve: Curve = ((1e6, 1e-3), (1e8, 1e-1))
    measured = dataclasses.replace(DEVICE, curves={"gemm.bfloat16": curve})
    small = dataclasses.replace(reads, weights=0.0, flops=Amount(1e7))
    assert seconds_of(small, 1, 1.0, measured, "int8-weight") == pytest.approx(1e-2)  # as it was measured
    assert seconds_of(small, 1, 1.0, measured, "int8") == pytest.approx(1e7 / 2e14)


def test_a_method_without_a_rate_computes_as_the_model_does() -> None:
    old = dataclasses.replace(DEVICE, flops={"bfloat16": 1e14, "float32": 1e12, "fp8": None})
    product = Operator(where="", family=GEMM, dtype="bfloat16", count=1, flops=Amount(1e13))
    for method in ("fp8", "int8"):
        assert seconds_of(product, 1, 1.0, old, method) == pytest.approx(1e13 / 1e14)


@pytest.mark.parametrize("family", [GEMM, ATTENTION])
def test_a_dtype_without_a_rate_goes_by_the_slowest_that_is_known(family: str) -> None:
    measured = dataclasses.replace(
        DEVICE, flops={"bfloat16": 1e14, "int8": 2e14, "fp8": None}, attention={"bfloat16": 5e13, "fp8": None}
    )
    slowest = 1e14 if family == GEMM else 5e13
    for dtype in ("float32", "float64", "float16"):
        product = Operator(where="", family=family, dtype=dtype, count=1, flops=Amount(1e13))
        assert seconds_of(product, 1, 1.0, measured) == pytest.approx(1e13 / slowest)


def test_a_rate_is_told_whatever_a_device_lacks() -> None:
    none = dataclasses.replace(DEVICE, flops={"bfloat16": 1e14}, attention={"bfloat16": None})
    assert rate_of(none, "bfloat16", attention=True) == 1e14
    assert rate_of(dataclasses.replace(none, flops={}), "bfloat16") == none.bytes_per_s


def test_what_is_known_is_shared_where_ranks_compute_the_same() -> None:
    known = Costs(facts(), machine())
    larger = dataclasses.replace(DEVICE, memory_bytes=1)
    faster = dataclasses.replace(DEVICE, flops=dict(DEVICE.flops) | {"bfloat16": 2e14})
    heads = tuple(dataclasses.replace(part, heads=(20,)) for part in facts().parts)
    one = Candidate(ulysses=8)
    for there, parts in ((machine(inside=SLOW), facts().parts), (machine(device=larger), heads)):
        beside = known.beside(facts(parts=parts), there)
        assert beside._known is known._known
        known.cost(one)
        assert beside.cost(one) == cost(one, there, parts=parts)
    beside = known.beside(facts(), machine(device=faster))
    assert beside._known is not known._known
    assert beside.cost(one) == cost(one, machine(device=faster))


def test_offload_brings_every_component_at_the_rate_of_the_slot_in_the_size_that_it_has() -> None:
    slow = dataclasses.replace(DEVICE, host_bytes_per_s=1e9)
    there = machine(1, device=slow)
    plain, away, small = (
        cost(one, there)
        for one in (Candidate(), Candidate(offload="model"), Candidate(offload="model", quantize="int8"))
    )
    assert away.encode_s - plain.encode_s == pytest.approx(1.0), "1 GB of the text encoder"
    assert away.decode_s - plain.decode_s == pytest.approx(0.1)
    assert away.denoise.offload == pytest.approx(4.0)
    assert small.denoise.offload == pytest.approx(2.0), "8 bits of 16"
    fast = cost(Candidate(offload="model"), machine(1, device=dataclasses.replace(slow, host_bytes_per_s=2e9)))
    assert fast.denoise.offload == pytest.approx(2.0)


def test_weights_cut_between_ranks_come_over_their_link_and_take_a_part_of_the_memory() -> None:
    whole, away = (cost(Candidate(ulysses=4, offload=how), machine(4)) for how in ("", SHARDED))
    assert away.memory_bytes < whole.memory_bytes
    for seconds in (1e-3, 1e3):  # a link that hides them, and one that does not
        there = machine(4, inside=Link(name="wire", bytes_per_s=1e9 / seconds, latency_s=0.0))
        plain, cut = (cost(Candidate(ulysses=4, offload=how), there) for how in ("", SHARDED))
        late = cut.denoise.offload - plain.denoise.offload
        assert (late > 0) == (seconds > 1)
