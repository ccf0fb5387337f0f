"""LoRA before quantizing and after: the same picture, adapters stay in their own dtype, fusing comes before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parafuse
from parafuse.engine.quantize.choose import ADAPTER
from parafuse.errors import ConfigError
from tests import adapters
from tests.dist.ranks import run_ranks
from tests.guided import flux, sdxl
from tests.quantize.test_layouts import off

TEXT = "int8:min_features=8"
FP8 = "fp8:reference=true,min_features=16"
CALL: dict[str, Any] = flux.call(1) | {"num_inference_steps": 2, "true_cfg_scale": 1.0, "seed": 5}


def load(target: Any, name: str = "a", seed: int = 1) -> None:
    weights = adapters.lora(pipeline_of(target), ("transformer",), rank=3, seed=seed, every=2)
    target.load_lora_weights(weights, adapter_name=name)


def pipeline_of(target: Any) -> Any:
    return target.pipeline if isinstance(target, parafuse.Engine) else target


def engine(pipeline: Any, text: str | None, **layout: int) -> parafuse.Engine:
    return parafuse.Engine.from_pipeline(pipeline, parafuse.Config(quantize=text, parallel=parafuse.Parallel(**layout)))


def painted(text: str | None, when: str, layout: dict[str, int] | None = None) -> tuple[Tensor, dict[str, Any]]:
    pipeline = flux.build("FluxPipeline")
    if when == "before":
        load(pipeline)
    with engine(pipeline, text, **(layout or {})) as one:
        if when == "after":
            load(one)
        return one(**CALL).images, one.receipt["quantized"].get("transformer", {})


@pytest.mark.parametrize("text", [TEXT, FP8])
def test_before_and_after_are_the_same(text: str) -> None:
    (before, told), (after, later) = painted(text, "before"), painted(text, "after")
    assert torch.equal(before, after)
    exact, plain = painted(None, "before")[0], painted(text, "never")[0]
    assert off(before, exact) < 0.1
    assert off(before, plain) > 0.2, "control: the LoRA acts, and more than quantizing does"
    assert told["num_quantized"] == later["num_quantized"]
    assert told["left"].keys() >= {ADAPTER}
    for found in (told, later):
        assert not any(".lora_" in name for name in found["quantized"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_on_two_ranks(when: str) -> None:
    """Adapters multiply a rank's rows alone, so that sums have another order: see FLIPS. Kept in 8 bits only, layers
    round nothing that they are given."""
    exact = painted(None, when)[0]
    for text in ("int8-weight:min_features=8", TEXT):
        want = painted(text, when)[0]
        for got, _ in run_ranks(painted, 2, text, when, {"ulysses": 2}):
            assert off(got, want) <= (off(want, exact) if text == TEXT else 1e-5)


def test_adapters_change_and_go_while_layers_are_quantized() -> None:
    with engine(flux.build("FluxPipeline"), TEXT) as one:
        plain = one(**CALL).images
        load(one)
        load(one, "b", seed=2)
        one.set_adapters(["a"], [1.0])
        first = one(**CALL).images
        one.set_adapters(["a", "b"], [0.5, 0.5])
        assert off(one(**CALL).images, first) > 1e-2
        one.unload_lora_weights()
        assert torch.equal(one(**CALL).images, plain)
        layers = [m for m in one.pipeline.transformer.modules() if isinstance(m, nn.Linear)]
        assert any(type(layer.weight).__name__ == "Int8Tensor" for layer in layers)


def test_fusing_comes_before() -> None:
    pipeline = flux.build("FluxPipeline")
    load(pipeline)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    with engine(pipeline, TEXT) as one:
        fused = one(**CALL).images
        assert off(fused, painted(None, "before")[0]) < 0.1
        load(one, "b", seed=2)
        for call in (one.fuse_lora, one.unfuse_lora):
            with pytest.raises(
                ConfigError, match="weights in int8 cannot be added to or joined; fuse before quantizing"
            ):
                call(components=["transformer"])


def test_a_unet_too() -> None:
    call = sdxl.call_text(1) | {"num_inference_steps": 2, "seed": 5}

    def images(text: str | None) -> Tensor:
        with engine(sdxl.build(), text) as one:
            return one(**call).images

    with engine(sdxl.build(), TEXT) as one:
        assert one.receipt == {}
        found = one(**call).images
        report = one.receipt["quantized"]["unet"]
    assert 1e-5 < off(found, images(None)) < 0.2
    assert all("transformer_blocks" in name for name in report["quantized"])
    assert any("time_emb" in name for name in report["left"]["outside of the repeated blocks"])
