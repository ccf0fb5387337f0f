"""Quantized in place: what memory it takes meanwhile, what remove() gives back, and what comes later."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import parafuse
from parafuse.engine.quantize import put_on
from parafuse.engine.quantize.choose import EARLIER, choose
from parafuse.engine.quantize.pack import packed, set_weight
from parafuse.engine.quantize.put_on import checked
from parafuse.errors import ConfigError
from parafuse.quantization import Fp8, Int8, quantize_of
from tests import pipelines
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
    left = parafuse.apply(part, parafuse.Config(quantize=TEXT)).quantized["FluxTransformer2DModel"].choice.left
    assert left["transformer_blocks.0.attn.to_q"] == EARLIER


def test_what_others_have_quantized_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    """By torchao, outside of parafuse: in the receipt, and refused where it cannot run or gives another picture."""
    model = build("flux", heads=4)
    layer = model.get_submodule("transformer_blocks.0.attn.to_q")
    assert isinstance(layer, nn.Linear)
    set_weight(layer, packed(layer.weight.data, Fp8(scale="tensor")))
    for config in (None, parafuse.Config(cache="interval:2")):
        with pytest.raises(ConfigError, match=r"is quantized already: .*: a CPU has no fp8"):
            parafuse.apply(model, config)
    allowed = Fp8(reference=True, scale="tensor")
    assert parafuse.apply(model, parafuse.Config(quantize=allowed)).quantized
    with pytest.raises(ConfigError, match="each of 2 ranks would take the largest value of its own part"):
        checked(allowed, [("t", model)], [], 2)
    with pytest.raises(ConfigError, match="is fp8:scale=tensor"):
        parafuse.apply(model, parafuse.Config(quantize=Fp8(reference=True, scale="row")))
    pipeline = flux.build("FluxPipeline")
    parafuse.apply(pipeline, parafuse.Config(quantize="int8-weight:min_features=8")).quantized.clear()
    with parafuse.Engine.from_pipeline(pipeline) as engine:
        assert engine.packed == "int8-weight"
        with pytest.raises(ConfigError, match="weights in int8-weight cannot be added to"):
            engine.fuse_lora()
        engine(**flux.call(1) | {"num_inference_steps": 1, "seed": 1, "true_cfg_scale": 1.0})
        assert engine.receipt["quantized"]["transformer"]["num_quantized"] > 0
    capfd.readouterr()


def test_what_fails_in_the_middle_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = build("flux", heads=4), inputs("flux", ODD)
    want, calls = call(model, values), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 9:
            raise RuntimeError("no memory")
        return packed(*args)

    monkeypatch.setattr(put_on, "packed", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        parafuse.apply(model, parafuse.Config(quantize=f"{TEXT},keep_originals=true"))
    assert torch.equal(call(model, values), want)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert not hasattr(model, "is_quantized")


def test_originals_are_kept_while_it_is_loaded_too(tmp_path: Path) -> None:
    folder = pipelines.sd3(tmp_path / "sd3")
    config = parafuse.Config(quantize=Int8(min_features=8, keep_originals=True))
    with parafuse.Engine.from_pretrained(str(folder), config) as engine:
        layer = engine.pipeline.transformer.transformer_blocks[0].attn.to_q
        assert type(layer.weight).__name__ == "Int8Tensor"
        engine.handle.remove()
        assert type(layer.weight) is nn.Parameter
        engine.handle.remove()


def _engine() -> parafuse.Engine:
    return parafuse.Engine.from_pipeline(flux.build("FluxPipeline"), parafuse.Config(quantize="int8:min_features=8"))


def test_another_pipeline_over_the_same_parts() -> None:
    with parafuse.Engine.from_pipeline(
        flux.build("FluxPipeline"), parafuse.Config(quantize="int8:min_features=8")
    ) as one:
        other = one.from_pipe(diffusers.FluxImg2ImgPipeline)
        assert other.pipeline.transformer is one.pipeline.transformer
        assert other.packed == "int8"
        assert one.pipeline.transformer.is_quantized


def test_a_refused_component_is_not_changed() -> None:
    with parafuse.Engine.from_pipeline(
        flux.build("FluxPipeline"), parafuse.Config(quantize="int8:min_features=8")
    ) as one:
        other = flux.build("FluxPipeline").transformer
        parafuse.apply(other, parafuse.Config(quantize="fp8-weight:min_features=8"))
        before = [type(p) for p in other.parameters()]
        with pytest.raises(ConfigError, match="is quantized already"):
            one.transformer = other
        assert [type(p) for p in other.parameters()] == before
        assert one.pipeline.transformer is not other


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


def test_offload_of_compiled_and_quantized_blocks_is_refused() -> None:
    config = parafuse.Config(quantize="int8-weight:min_features=8", compile=True)
    words = "by swapping tensors, which it cannot where compiled blocks watch"
    one = parafuse.Engine.from_pipeline(flux.build("FluxPipeline"), config)
    with one, pytest.raises(ConfigError, match=words):
        one.enable_model_cpu_offload(device="cpu")
