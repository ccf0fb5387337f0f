"""Quantized in place: what memory it takes meanwhile, what remove() gives back, and what comes later."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

import parafuse
from parafuse.engine.quantize import put_on
from parafuse.engine.quantize.choose import choose
from parafuse.engine.quantize.pack import packed
from parafuse.errors import ConfigError
from parafuse.quantization import Int8, quantize_of
from tests.guided import flux
from tests.models import ODD, build, call, inputs

TEXT = "int8:min_features=16"


def originals_alive(monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    """How many of the weights that are to be quantized are there as they were, whenever the next one is."""
    model = build("flux", heads=4)
    method = quantize_of(text)
    assert method is not None
    refs = [weakref.ref(layer.weight) for layer in choose("t", model, method).layers.values()]
    alive: list[int] = []

    def counting(*args: Any) -> Any:
        alive.append(sum(ref() is not None for ref in refs))
        return packed(*args)

    monkeypatch.setattr(put_on, "packed", counting)
    handle = parafuse.apply(model, parafuse.Config(quantize=text))
    assert len(alive) == len(refs) == 34
    alive.append(sum(ref() is not None for ref in refs))
    handle.remove()
    return alive


def test_no_more_than_one_layer_is_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert originals_alive(monkeypatch, TEXT) == list(range(34, -1, -1))
    assert originals_alive(monkeypatch, f"{TEXT},keep_originals=true") == [34] * 35, "control: they are kept"


@pytest.mark.parametrize("text", [TEXT, "fp8:reference=true,min_features=16"])
def test_remove_gives_the_originals_back_bit_for_bit(text: str) -> None:
    model, values = build("flux", heads=4), inputs("flux", ODD)
    want = call(model, values)
    state = {name: (x, x.clone()) for name, x in model.state_dict(keep_vars=True).items()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    handle = parafuse.apply(model, parafuse.Config(quantize=f"{text},keep_originals=true"))
    config: Any = model.config
    assert "quantization_config" in config
    assert not torch.equal(call(model, values), want)
    handle.remove()
    assert torch.equal(call(model, values), want)
    now = model.state_dict(keep_vars=True)
    assert all(now[name] is x and torch.equal(x, copy) for name, (x, copy) in state.items())
    assert attributes == [sorted(vars(module)) for module in model.modules()]
    assert "quantization_config" not in model.config  # pyright: ignore[reportOperatorIssue]
    handle.remove()


def test_without_them_it_says_that_it_stays(capfd: pytest.CaptureFixture[str]) -> None:
    model = build("flux", heads=4)
    handle = parafuse.apply(model, parafuse.Config(quantize=TEXT))
    quantized = call(model, inputs("flux", ODD))
    handle.remove()
    assert "stays quantized: the original weights are not kept" in capfd.readouterr().err
    assert torch.equal(call(model, inputs("flux", ODD)), quantized)


def test_what_is_quantized_already() -> None:
    model, part = build("flux", heads=4), build("flux", heads=4)
    parafuse.apply(model, parafuse.Config(quantize=TEXT))
    again = parafuse.apply(model, parafuse.Config(quantize=TEXT))
    assert again.applied == ["int8:min_features=16 on FluxTransformer2DModel: 34 of 48 layers"]
    with pytest.raises(ConfigError, match=r"is quantized already \(transformer_blocks.0.attn.to_q is int8\)"):
        parafuse.apply(model, parafuse.Config(quantize="int8-weight:min_features=16"))
    one = "FluxTransformer2DModel.transformer_blocks.0.attn.to_q"
    parafuse.apply(part, parafuse.Config(quantize=f"{TEXT},skip={one}"))
    with pytest.raises(ConfigError, match=r"is quantized already \(in part\)"):
        parafuse.apply(part, parafuse.Config(quantize=TEXT))


def test_a_component_that_comes_later_is_quantized_too() -> None:
    pipeline = flux.build("FluxPipeline")
    with parafuse.Engine.from_pipeline(pipeline, parafuse.Config(quantize=Int8(min_features=8))) as engine:
        values = flux.call(1) | {"num_inference_steps": 1, "seed": 1, "true_cfg_scale": 1.0}
        first = engine(**values).images
        engine.transformer = flux.build("FluxPipeline").transformer
        assert torch.equal(engine(**values).images, first)
        report = engine.receipt["quantized"]["transformer"]
        assert "came later" not in report["left"]
        assert report["num_quantized"] > 0


def test_nothing_is_changed_where_it_is_refused() -> None:
    model = build("flux", heads=4)
    before = [type(p) for p in model.parameters()]
    with pytest.raises(ConfigError, match="a CPU has no fp8"):
        parafuse.apply(model, parafuse.Config(quantize="fp8:min_features=16"))
    assert [type(p) for p in model.parameters()] == before


OFFLOADS: dict[str, Any] = {
    "model": lambda engine: engine.enable_model_cpu_offload(device="cpu"),
    "leaves": lambda engine: engine.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
    "blocks": lambda engine: engine.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    ),
}


@pytest.mark.parametrize("text", ["int8:min_features=8", "fp8:reference=true,min_features=16"])
def test_offload_moves_quantized_weights(text: str) -> None:
    values = flux.call(1) | {"num_inference_steps": 1, "seed": 1, "true_cfg_scale": 1.0}

    def engine() -> parafuse.Engine:
        return parafuse.Engine.from_pipeline(flux.build("FluxPipeline"), parafuse.Config(quantize=text))

    with engine() as one:
        want = one(**values).images
        with pytest.raises(ConfigError, match="use enable_model_cpu_offload, or enable_group_offload"):
            one.enable_sequential_cpu_offload(device="cpu")
        assert torch.equal(one(**values).images, want)
    for offload in OFFLOADS.values():
        with engine() as one:
            offload(one)
            assert torch.equal(one(**values).images, want)
