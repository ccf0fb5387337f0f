"""Weights on a second device, with a stand-in for it: what runs there gets what it needs there, what it gives is where
the caller is, and the picture is exact. Copies between true devices are for tests/gpu."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import parafuse
from parafuse.config import Config, Parallel
from parafuse.engine.placement.put_on import Placing
from parafuse.engine.source import EMBEDDED
from parafuse.parallel.hops import Hop
from parafuse.placement import MAP, Placement
from tests.dist.ranks import run_ranks
from tests.memory.stand_in import OTHER, Places, StandInPlacing

HALF = {
    "": "0",
    **{f"transformer.transformer_blocks.{i}": "1" for i in (2, 3)},
    **{f"transformer.single_transformer_blocks.{i}": "1" for i in range(4)},
}
SPREAD = {
    "text_encoder": "1", "text_encoder_2": "0", "text_encoder_2.encoder.block.1": "1", "vae": "1", "transformer": "1",
    "transformer.transformer_blocks.0": "0", "transformer.norm_out": "0",
}  # fmt: skip
"""Components, single blocks and single layers; the transformer's own code runs on device 1."""
CALL: dict[str, Any] = {
    "prompt": ["a rocket", ""], "negative_prompt": ["", ""], "width": 96, "height": 72, "true_cfg_scale": 2.0,
    "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np",
}  # fmt: skip


def pipeline() -> Any:
    from diffusers import FluxPipeline

    found = FluxPipeline.from_pretrained(EMBEDDED / "emoji")
    found.set_progress_bar_config(disable=True)
    return found


def painted(one: Any) -> np.ndarray:
    return one(**CALL, generator=torch.Generator().manual_seed(7)).images


def placed(homes: dict[str, str], asked: dict[str, Any]) -> tuple[float, int, list[str], Any]:
    """How far the picture is from that without a placement, operators on the other device, what was applied, and the
    map."""
    one = pipeline()
    with parafuse.apply(one, Config(**asked)):
        expected = painted(one)
    places = Places()
    config = Config(placement=Placement(MAP, tuple(homes.items()), device="cpu"), **asked)
    with mock.patch.object(Placing, "of", StandInPlacing.over(places)), parafuse.apply(one, config) as handle:
        there = {name for name, p in one.transformer.named_parameters() if places.where(p) == OTHER}
        assert there, "weights have moved"
        with places:
            got = painted(one)
        applied, device_map = list(handle.applied), one.hf_device_map
    assert all(places.where(p) != OTHER for p in one.transformer.parameters()), "and are back"
    return float(np.abs(got - expected).max() / np.abs(expected).max()), places.num_there, applied, device_map


RUNS: list[tuple[int, dict[str, str], dict[str, Any]]] = [
    (1, HALF, {}),
    (1, SPREAD, {}),
    (2, HALF, {"parallel": Parallel(ulysses=2)}),
    (2, SPREAD, {"parallel": Parallel(ring=2)}),
    (2, SPREAD, {"parallel": Parallel(cfg=2, ulysses=1)}),
    (2, SPREAD, {"parallel": Parallel(data=2, ulysses=1)}),
    (3, SPREAD, {}),
    (1, HALF, {"cache": "first-block:0.3"}),
    (1, HALF, {"cache": "taylorseer:2"}),
]


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize(("ranks", "homes", "asked"), RUNS, ids=[f"{i}" for i in range(len(RUNS))])
def test_what_is_on_another_device_runs_there(ranks: int, homes: dict[str, str], asked: dict[str, Any]) -> None:
    """Two ranks with two devices each, two-way sequence parallel, among them."""
    for got in run_ranks(placed, ranks, homes, asked, timeout_s=400) if ranks > 1 else [placed(homes, asked)]:
        wrong, num_there, applied, device_map = got
        assert wrong <= 1e-5
        assert num_there > 100
        assert "placement: weights on device 0, device 1" in applied
        assert device_map["transformer"] == ("cpu" if homes.get("transformer", "0") == "0" else 1)


def test_without_hops_the_stand_in_says_so() -> None:
    """Negative control: the stand-in is no place where everything works."""
    with (
        mock.patch.object(Hop, "around", lambda self, original: original),
        mock.patch.object(Hop, "bring", lambda self, module, args, kwargs: (args, kwargs)),
        pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"),
    ):
        placed(HALF, {})


def test_what_passes_through_a_hop_unchanged_is_the_callers_own() -> None:
    places = Places()
    from tests.memory.stand_in import StandInHop

    hop = StandInHop(OTHER, places)
    x, y = torch.ones(2), torch.zeros(3)
    seen: list[torch.device] = []

    def call(a: Any, *, b: Any) -> Any:
        seen.extend(places.where(one) for one in (a, b["y"]))
        return {"same": b["y"], "new": a * 2}

    with places:
        got = hop.around(call)(x, b={"y": y})
    assert seen == [OTHER, OTHER]
    assert got["same"] is y
    assert places.where(got["new"]) != OTHER
    assert torch.equal(got["new"], 2 * x)
