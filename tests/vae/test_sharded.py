"""Autoencoders of diffusers, undivided over ranks, against one process alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.ranks import run_ranks
from tests.vae import sharded
from tests.vae.zoo import CASES

NAMED = (
    "AutoencoderKL AutoencoderKLFlux2 AutoencoderTiny AutoencoderDC AutoencoderKLTemporalDecoder AutoencoderKLWan "
    "AutoencoderKLQwenImage AutoencoderKLHunyuanVideo AutoencoderKLHunyuanVideo15 AutoencoderKLCogVideoX "
    "AutoencoderKLLTXVideo AutoencoderKLMochi AutoencoderKLCosmos AutoencoderKLAllegro AutoencoderOobleck"
).split()
REFUSED = {
    ("AutoencoderRAE", "encode"): "the operator gather",
    ("LTX2VideoDiffusionDecoderModel", "decode"): "the operator torch.ops.higher_order.flex_attention",
}
ALL = [case.name for case in CASES if not case.unbuilt]


def hold(found: list[dict[str, Any]], name: str) -> None:
    assert all(rank.keys() == found[0].keys() for rank in found)
    for rank in found:
        for method, error in rank.items():
            refused = REFUSED.get((name, method))
            if refused:
                assert refused in str(error)
                assert error == found[0][method]
            else:
                assert isinstance(error, float), error
                assert error < 1e-5, (name, method)


@pytest.mark.sweep(one_in=9)
@pytest.mark.parametrize("name", ALL)
def test_every_class_at_odd_sizes(name: str) -> None:
    hold(run_ranks(sharded.errors, 3, name, 2, True), name)


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize(("name", "num_ranks"), zip(NAMED, [2, 4] * 8, strict=False))
def test_classes_on_few_and_many_ranks(name: str, num_ranks: int) -> None:
    """In turn: where slabs are cut depends on the number, what layers make of them on the class."""
    hold(run_ranks(sharded.errors, num_ranks, name, 1 if num_ranks == 4 else 2, num_ranks == 4), name)


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderOobleck"])
@pytest.mark.parametrize("form", ["tiled", "sliced"])
def test_tiles_and_slices_remain(name: str, form: str) -> None:
    hold(run_ranks(sharded.errors, 2, name, 1 if form == "tiled" else 2, False, form), name)


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
def test_channels_stay_last(name: str) -> None:
    hold(run_ranks(sharded.errors, 3, name, 2, False, "channels_last"), name)


def test_latents_smaller_than_the_ranks_are_refused_before_any_exchange() -> None:
    for found in run_ranks(sharded.too_small, 3):
        assert found.startswith("ConfigError: vae.decode: an input of 2 rows")
        assert "over 3 ranks" in found


@pytest.mark.parametrize(("name", "method"), REFUSED)
def test_an_operator_in_the_way_is_found_before_anything_is_computed(name: str, method: str) -> None:
    """One number is exchanged: whether some rank has found one."""
    for error, sent, is_as_it_was in run_ranks(sharded.refused_early, 2, name, method):
        assert REFUSED[name, method] in error
        assert sent == [1, 4]
        assert is_as_it_was


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderDC", "AutoencoderKLWan", "AutoencoderKLLTXVideo"])
def test_in_bf16_nothing_is_lost_beyond_bf16(name: str) -> None:
    for found in run_ranks(sharded.in_bf16, 2, name):
        for whole, shared in found.values():
            assert whole > 1e-4
            assert shared < 1.25 * whole


def test_encode_gives_a_distribution_of_whole_tensors() -> None:
    for found in run_ranks(sharded.distributions, 2):
        assert max(found) < 1e-5


def test_groups_of_ranks_decode_their_own() -> None:
    assert max(run_ranks(sharded.in_pairs, 4)) < 1e-5


def test_gradients_are_refused() -> None:
    assert all("gradients" in found for found in run_ranks(sharded.with_gradients, 2))


def test_memory_of_a_rank_falls_with_their_number() -> None:
    """Of all that operators make, the result with it, and of weights beside it: at most 1.6 / P."""
    names = list(sharded.LARGE)
    alone = run_ranks(sharded.peaks, 1, names)[0]
    for num_ranks in (2, 4):
        for found in run_ranks(sharded.peaks, num_ranks, names):
            for name, (made, weights) in found.items():
                assert made * num_ranks <= 1.4 * alone[name][0], name
                assert (made + weights) * num_ranks <= 1.6 * (alone[name][0] + weights), name
