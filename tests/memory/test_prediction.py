"""What is predicted of a request beside what torch's allocator says of the real one, and what that rests on."""

from __future__ import annotations

from typing import Any

import pytest

from parafuse import Config
from parafuse.engine.memory import predict as predicting
from parafuse.engine.memory.kernels import CpuKernels
from parafuse.engine.memory.ledger import Allocator
from parafuse.engine.memory.predict import Prediction
from tests.dist.ranks import run_ranks
from tests.memory.cases import BIG, Case
from tests.memory.requests import Figures, measured, predicted

pytestmark = pytest.mark.usefixtures("nothing_kept")
WITHIN = 0.10
LATE = 0.20
"""Of what is beside the weights, where gloo's threads let go of buffers when they are scheduled."""
SMALLEST = 200_000
"""Bytes beside the weights; less is a handful of small tensors."""
ALONE = (
    Case("emoji"),
    Case("tiny:flux.1-dev", call=BIG),
    Case("tiny:sd3.5-large", call=BIG),
    Case("tiny:sdxl", call=BIG),
    Case("tiny:wan2.1-14b"),
    Case("tiny:hunyuanvideo"),
    Case("emoji", 1, {"cache": "first-block:0.1"}, {"num_inference_steps": 6}),
    Case("emoji", 1, {"quantize": "int8"}),
)
AWAY = (
    Case("emoji", 1, {"offload": "model:to=disk"}),
    Case("emoji", 1, {"offload": "sequential:to=disk"}),
    Case("emoji", 2, {"placement": "balanced", "max_memory": {"cpu": "30MB"}, "offload_folder": "."}),
    Case("emoji", 2, {"offload": "group:to=disk", "text_encoders": "one-rank:kept=2"}),
)
SHARED = (
    Case("emoji", 2),
    Case("emoji", 4, {"ulysses": 2, "ring": 2}),
    Case("tiny:flux.1-dev", 3, {}, BIG),
    Case("tiny:sd3.5-large", 4, {"cfg": 2}, BIG),
    Case("tiny:sdxl", 2, {"data": 2}, {**BIG, "num_images_per_prompt": 2}),
    Case("tiny:hunyuanvideo", 2),
)


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are examined anew, here as on the ranks."""
    monkeypatch.setenv("PARAFUSE_CACHE", "")


def both(case: Case) -> tuple[Prediction, list[tuple[Figures, int]]]:
    call = {"num_inference_steps": 2, **case.call}
    return (
        predicted(case.model, case.options, call, case.ranks),
        run_ranks(measured, case.ranks, case.model, case.options, call),
    )


def off(prediction: Prediction, found: list[tuple[Figures, int]], request: str) -> dict[str, tuple[float, float]]:
    """Phase -> relative error of what is beside weights that stay, and of all, against the rank that took most."""
    out: dict[str, tuple[float, float]] = {}
    for phase, one in getattr(prediction, request).items():
        most = max(figures[request][phase] for figures, _ in found)
        beside = one.nbytes - prediction.staying
        error = beside / most - 1 if most >= SMALLEST else 0.0
        out[phase] = error, one.nbytes / (most + prediction.staying) - 1
    return out


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_on_one_rank_every_phase_is_within_a_tenth(case: Case) -> None:
    prediction, found = both(case)
    assert sum(prediction.weights.values()) == found[0][1]
    errors = off(prediction, found, "first")
    assert set(errors) == {"encode", "denoise", "decode"}
    assert all(abs(error) <= WITHIN for pair in errors.values() for error in pair), errors


@pytest.mark.sweep(one_in=6)
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_on_several_ranks_every_phase_is_within_a_tenth(case: Case) -> None:
    prediction, found = both(case)
    assert all(weights == sum(prediction.weights.values()) for _, weights in found)
    for request, limit in (("first", WITHIN), ("later", LATE)):
        errors = off(prediction, found, request)
        assert all(abs(beside) <= limit and abs(all_) <= WITHIN for beside, all_ in errors.values()), errors


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("case", AWAY, ids=lambda case: case.name)
def test_weights_that_come_and_go_are_told_within_a_tenth(case: Case) -> None:
    prediction, found = both(case)
    assert prediction.elsewhere["disk"] > 15_000_000, "control: most weights are on the disk"
    for request in ("first", "later"):
        errors = off(prediction, found, request)
        assert all(abs(error) <= WITHIN for pair in errors.values() for error in pair), errors


def follow(**options: Any) -> Prediction:
    ranks = options.pop("ranks", 1)
    return predicted("emoji", options, {"num_inference_steps": 2}, ranks)


def test_what_kernels_take_is_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = follow()
    monkeypatch.setattr(predicting, "kernels_of", lambda device: Allocator())
    bare = follow()
    one, other = (x.first["decode"].nbytes - x.first["decode"].weights for x in (bare, with_kernels))
    assert one < (1 - WITHIN) * other


@pytest.mark.whole
def test_what_goes_between_ranks_is_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_bodies = follow(ranks=2)
    assert with_bodies.later["denoise"].exchange > 0
    monkeypatch.setattr(predicting, "bodies", lambda ledger: {})
    bare = follow(ranks=2)
    one, other = (x.later["denoise"].nbytes - x.later["denoise"].weights for x in (bare, with_bodies))
    assert one < (1 - WITHIN) * other


def test_examining_blocks_is_a_part_of_the_first_request() -> None:
    found = follow(ranks=2)
    first, later = (x["denoise"].nbytes - x["denoise"].weights for x in (found.first, found.later))
    assert first > 2 * later


@pytest.mark.whole
def test_more_ranks_take_less_each() -> None:
    at = [follow(ranks=ranks).later["denoise"] for ranks in (1, 2, 4)]
    beside = [one.nbytes - one.weights for one in at]
    assert beside[0] > beside[1] > beside[2]


def test_a_large_decode_is_shared_as_in_an_engines_request() -> None:
    call = {"height": 512, "width": 512, "num_inference_steps": 1}
    alone, shared = (
        predicted("tiny:sdxl", {"cfg": 2, **form}, call, 2).later["decode"] for form in ({"vae": "replicated"}, {})
    )
    assert shared.activations < 0.7 * alone.activations


def test_what_a_cache_keeps_is_told_apart() -> None:
    assert follow().first["denoise"].kept == 0
    options, call = {"cache": "first-block:0.1,warmup_steps=0"}, {"num_inference_steps": 4}  # none is left out before
    assert predicted("emoji", options, call, 1).first["denoise"].kept > 100_000


def on_two_devices(placement: dict[str, int], ranks: int = 1) -> Prediction:
    config = Config(placement=placement, max_memory={0: "1GB", 1: "1GB"}, device="cuda")
    return predicted("emoji", config, {"num_inference_steps": 2}, ranks)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("ranks", [1, 2])
def test_another_device_has_what_runs_there(ranks: int) -> None:
    whole, parted = (on_two_devices({"": 0, "transformer": there}, ranks).later for there in (0, 1))
    here, there, plain = parted["denoise"], parted["denoise, device 1"], whole["denoise"]
    assert "denoise, device 1" not in whole
    assert there.weights > 5 * here.weights
    assert there.weights + here.weights == plain.weights
    assert abs(there.activations / plain.activations - 1) < 0.02
    assert here.activations < plain.activations / 10
    assert whole["decode"].activations == parted["decode"].activations


def test_blocks_on_another_device_have_copies_of_what_they_are_given() -> None:
    homes = {"": 0} | {f"transformer.transformer_blocks.{number}": 1 for number in range(2)}
    found = on_two_devices(homes).later
    assert found["denoise, device 1"].exchange > 10_000
    assert found["denoise"].activations > found["denoise, device 1"].activations / 10


def test_nothing_stays_behind() -> None:
    import torch
    import torch.distributed as dist

    before = torch.get_default_dtype(), torch.get_num_threads()
    follow(ranks=2)
    assert not dist.is_initialized()
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before


def test_the_cpu_has_its_own_kernels() -> None:
    from parafuse.engine.memory.kernels import CudaKernels, kernels_of

    assert isinstance(kernels_of("cpu"), CpuKernels)
    assert isinstance(kernels_of("cuda"), CudaKernels)
    assert CudaKernels().size(513) == 1024
