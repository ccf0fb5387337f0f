"""Rewrites beside CUDA graphs: each way in which calls are made has a graph of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import parafuse
from parafuse.engine.verify import relative_error
from parafuse.parallel import captured, tiers
from parafuse.parallel.captured import CapturedCalls
from tests.guided.cells import seeded, tensors
from tests.guided.collect import cases
from tests.rewrites.test_text import EXACT, HUNYUAN, TOKENS, given, outputs
from tests.unit.test_captured import Recorded

GRAPHS: dict[str, Any] = dict(compile=True, cuda_graphs=True)


@contextmanager
def recorded(limit: int = 3) -> Iterator[list[Recorded]]:
    """Inside, calls are captured by a stand-in; a module that is another so many times in a row is an error."""
    made: list[Recorded] = []

    def capture() -> Recorded:
        made.append(Recorded())
        return made[-1]

    torch.compiler.reset()
    with (
        mock.patch.object(captured, "CudaCapture", capture),
        mock.patch.object(captured, "refuse_without_graphs"),
        mock.patch.object(captured, "MOST_ANEW", limit),
        mock.patch.object(tiers, "BACKEND", "eager"),
    ):
        yield made


def captured_by(handle: Any) -> list[CapturedCalls]:
    return [calls for _, one in handle._on for calls in one.captured]


def test_modulation_where_calls_of_two_structures_alternate() -> None:
    case = cases()["Stable Diffusion 3: skipped layers"]
    call = case.call(1) | dict(
        num_inference_steps=6, skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
    )
    pipeline = case.build()
    want: list[Tensor] = tensors(pipeline(**seeded(call)))
    config = parafuse.Config(rewrites="modulation", **GRAPHS)
    with recorded() as made, parafuse.apply(pipeline, config) as handle:
        for _ in range(2):
            assert relative_error(tensors(pipeline(**seeded(call))), want) <= EXACT
        (calls,) = captured_by(handle)
        assert calls.num_captured == 2
        assert made[0].replays == 2 * 11 - 2 * 2  # each runs once, is captured once, and then replayed


def test_text_where_masks_and_none_alternate() -> None:
    model, ragged = given(HUNYUAN, (18, 3))
    same = ragged | dict(encoder_attention_mask=(torch.arange(TOKENS) < 4).expand(2, -1).contiguous().float())
    want = [outputs(model, values) for values in (ragged, same)]
    config = parafuse.Config(rewrites="text", **GRAPHS)
    with recorded() as made, parafuse.apply(model, config) as handle, torch.no_grad():
        for _ in range(5):
            for values, one in zip((ragged, same), want, strict=True):
                assert relative_error(outputs(model, values), one) <= EXACT
        (calls,) = captured_by(handle)
        assert calls.num_captured == 2
        assert made[0].replays == 6
