"""diffusers' layer-wise casting of weights (`enable_layerwise_casting`), called by the user after parafuse is on: it
works or says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import parafuse
from parafuse.errors import ConfigError
from tests.dist.ranks import run_ranks
from tests.guided import flux

CALL: dict[str, Any] = flux.call(1) | {"num_inference_steps": 4}
CACHE = "interval:2,warmup_steps=1,final_steps=0"


def cast(pipeline: Any) -> None:
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def plain(*, is_cast: bool = True) -> Tensor:
    pipeline = flux.build("FluxPipeline")
    if is_cast:
        cast(pipeline)
    return pipeline(**CALL, generator=torch.Generator().manual_seed(1)).images


def painted(layout: dict[str, int], **asked: Any) -> Tensor:
    config = parafuse.Config(parallel=parafuse.Parallel(**layout), **asked)
    with parafuse.Engine.from_pipeline(flux.build("FluxPipeline"), config) as engine:
        cast(engine)
        found = engine(**CALL, seed=1).images
        assert torch.equal(engine(**CALL, seed=1).images, found)
        assert {p.dtype for p in engine.pipeline.transformer.parameters()} >= {torch.float8_e4m3fn}
        return found


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def split(cache: str | None) -> Tensor:
    return painted(dict(ulysses=2), cache=cache)


def test_it_works_beside_split_tokens_and_caches() -> None:
    want = plain()
    assert off(want, plain(is_cast=False)) > 1e-3  # it rounds
    assert off(painted({}), want) == 0
    assert max(off(found, want) for found in run_ranks(split, 2, None)) <= 1e-5
    cached = painted({}, cache=CACHE)
    assert off(cached, want) > 1e-3  # it skips
    assert max(off(found, cached) for found in run_ranks(split, 2, CACHE)) <= 1e-5


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(compile=True), "which no compiled block can look through; use quantize='fp8-weight'"),
        (dict(rewrites="modulation"), "reads weights of layers between their calls"),
        (dict(quantize="int8-weight:min_features=8", cache=CACHE), "weights are in 8 bits already"),
        (dict(offload="group:to=disk"), "casts weights before and after each layer runs"),
    ],
)
def test_what_cannot_be_beside_it_is_said_up_front(asked: dict[str, Any], words: str) -> None:
    with parafuse.Engine.from_pipeline(flux.build("FluxPipeline"), parafuse.Config(**asked)) as engine:
        with pytest.raises(ConfigError, match=words):
            cast(engine)
        assert not any(hasattr(part, "_diffusers_hook") for part in engine.pipeline.transformer.modules())
