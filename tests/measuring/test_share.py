"""One rank's share on one device: the same shapes and bytes as on real ranks, and marked as modelled."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

import parafuse
from parafuse.config import Axis, Config, Parallel
from parafuse.errors import ConfigError
from parafuse.launch.bench import report
from parafuse.launch.bench.case import Case, Variant, load_case
from parafuse.launch.bench.contestant import Contestant
from parafuse.launch.bench.figures import figures_of
from parafuse.launch.bench.model import load
from parafuse.launch.bench.record import NotAppliedError, Record
from parafuse.launch.bench.run import Run
from parafuse.parallel import absent
from parafuse.parallel.comm import Count, since
from parafuse.parallel.mesh import make_mesh
from tests.dist.ranks import run_ranks
from tests.measuring.quick import quick

LAYOUTS: list[dict[str, int]] = [{"ulysses": 2}, {"ring": 3}, {"ring": 2, "ulysses": 2}]


def exchanged(degrees: dict[str, int]) -> dict[str, Count]:
    """Of the second forward of a small FLUX in this layout, on the world there is; lengths that do not divide."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8))
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4, in_channels=16, **sizes
    )
    call: dict[str, Any] = dict(
        hidden_states=torch.randn(2, 21, 16), encoder_hidden_states=torch.randn(2, 7, 32), timestep=torch.ones(2),
        pooled_projections=torch.randn(2, 32), img_ids=torch.zeros(21, 3), txt_ids=torch.zeros(7, 3),
    )  # fmt: skip
    mesh = make_mesh({axis: degrees.get(axis, 1) for axis in Axis}, "cpu", 60.0)
    with torch.no_grad(), parafuse.apply(model, mesh=mesh) as handle:
        model(**call)
        before = handle.exchanged()
        model(**call)
        return {name: count for name, count in since(handle.exchanged(), before).items() if count.calls}


@pytest.fixture
def world() -> Iterator[None]:
    absent.enter(4, 60.0)
    try:
        yield
    finally:
        if dist.is_initialized():
            absent.leave()


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore:Set timeout")
def test_a_share_sends_what_the_first_of_real_ranks_sends(world: None, degrees: dict[str, int]) -> None:
    size = 1
    for degree in degrees.values():
        size *= degree
    mine, real = exchanged(degrees), run_ranks(exchanged, size, degrees)[0]
    assert mine == real
    assert sum(count.bytes for count in mine.values()) > 0


def test_messages_are_this_ranks_own(world: None) -> None:
    group = dist.group.WORLD
    received = torch.zeros(7)
    dist.all_to_all_single(received, torch.arange(3.0), [2, 2, 2, 1], [1, 1, 1, 0], group=group)
    assert received.tolist() == [0, 1, 2, 0, 1, 2, 0]
    total = torch.ones(2)
    dist.all_reduce(total, group=group)
    assert total.tolist() == [4, 4]
    said: list[Any] = [None] * 4
    dist.all_gather_object(said, {"a": 1})
    assert said == [{"a": 1}] * 4


def test_it_is_a_world_of_its_own(world: None) -> None:
    with pytest.raises(ConfigError, match="a process of its own"):
        absent.enter(2, 60.0)


def test_the_wire_is_bytes_and_calls() -> None:
    link = absent.Link(bytes_per_s=1e6, latency_s=0.5)
    counts = {"ulysses.all_to_all calls": 4, "ulysses.all_to_all bytes": 3e6, "graphs run": 7, "denoiser calls": 2}
    assert link.seconds(counts) == pytest.approx(3 + 4 * 0.5)
    for wrong in ({"bytes_per_s": 0}, {"latency_s": -1}):
        with pytest.raises(ConfigError, match="bytes_per_s must be above 0"):
            absent.Link(**wrong)


PLAIN = Variant(name="plain", way="plain")
HALF = Variant(name="half", share_of=2)


def measured(*variants: Variant) -> Record:
    call: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 2, "width": 64, "height": 64}
    case = Case(
        name="small", theme="test", model="emoji", baseline="plain", variants=variants, call=call, rounds=2,
        whole_steps=10, link={"bytes_per_s": 1e8, "latency_s": 1e-3},
    )  # fmt: skip
    with quick():
        return Run(case, load("emoji", Config()), 2, Config(timeout_s=60)).measure({})


def test_a_share_is_measured_and_marked() -> None:
    threads = torch.get_num_threads()
    try:
        record = measured(PLAIN, HALF)
    finally:
        torch.set_num_threads(threads)
    plain, half = record.rows
    assert (half.share_of, half.ranks, half.degrees, half.quality) == (2, 1, {"ulysses": 2}, {})
    calls, sent = half.counts["ulysses.all_to_all calls"], half.counts["ulysses.all_to_all bytes"]
    assert half.wire_s >= calls * 1e-3 + sent / 1e8 > 0.1
    found = figures_of(record, half)
    assert found is not None
    assert found.step_s is not None
    assert found.whole_s is not None
    assert found.step_s.median == pytest.approx(
        sorted(half.step_s)[0] / 2 + sorted(half.step_s)[1] / 2 + half.wire_s / 2
    )
    steps, more = record.steps, record.whole_steps - record.steps
    rounds = zip(half.step_s, half.total_s, strict=True)
    whole = [total + half.wire_s + more * (step + half.wire_s / steps) for step, total in rounds]
    assert more > 0
    assert found.whole_s.median == pytest.approx(statistics.median(whole))
    assert set(plain.parts_s) == {"text", "denoising", "VAE", "file"}
    assert sum(plain.parts_s.values()) <= max(plain.total_s) + plain.parts_s["file"]
    page = report.markdown(record)
    assert "| half | 1 of 2, modelled |" in page
    assert "0.1 GB/s and 1000 us" in page
    assert "request of 10 steps, extrapolated" in page


def test_a_share_that_exchanges_nothing_leaves_no_record() -> None:
    with patch.object(Contestant, "count", lambda *_: None), pytest.raises(NotAppliedError, match="half: ulysses: no"):
        measured(PLAIN, HALF)
    assert not dist.is_initialized()


def test_a_share_is_for_our_ways_on_one_rank() -> None:
    for wrong in (dict(way="plain"), dict(needs_ranks=2), dict(share_of=0)):
        with pytest.raises(ConfigError, match=r"share_of=.*must be at least 1"):
            Variant(**{"name": "v", "share_of": 2, **wrong})
    assert HALF.ranks(8) == 1
    assert HALF.config(2) == Parallel()


@pytest.mark.parametrize("name", ["hunyuanvideo", "wan2.2-a14b", "sdxl"])
def test_a_large_case_runs_in_its_tiny_form(name: str) -> None:
    """Eager: compiling takes minutes."""
    case = load_case(name).tiny()
    shares = [v for v in case.variants if v.share_of > 1]
    eager = tuple(replace(v, compile=False, may_fail=False) for v in shares)
    case = replace(case, variants=(PLAIN, *eager))
    threads = torch.get_num_threads()
    with quick():
        try:
            record = Run(case, load(case.model, Config()), 2, Config(timeout_s=60)).measure({})
        finally:
            torch.set_num_threads(threads)
    assert len(record.rows) == 1 + len(shares) > 1
    assert [(row.name, row.error) for row in record.rows if row.error] == []
    assert all(row.counts for row in record.rows if row.share_of > 1)
