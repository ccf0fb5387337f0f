"""An adapter that does not fit the model: one error on all ranks, and the engine paints as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from parafuse import Config, Engine
from parafuse.config import Parallel
from parafuse.engine.adapters import adapters
from parafuse.errors import ConfigError
from tests import adapters as adapters_of
from tests.dist.ranks import run_ranks
from tests.guided import flux

CALL = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}
OTHERS = {
    "another width": "transformer.transformer_blocks.0.attn.to_q",
    "no such layer": "transformer.layers.7.mixer.in_proj",
    "a UNet's": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
}


def state_of(pipeline: Any) -> dict[str, Any]:
    """All that adapters change on components: names and values, kinds of modules, what is active, what is trained."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        wrapping: list[tuple[str, Any]] = [one for one in part.named_modules() if hasattr(one[1], "lora_A")]
        found[name] = {
            "values": {key: x.detach().clone() for key, x in part.state_dict().items()},
            "modules": {path: type(one).__name__ for path, one in part.named_modules()},
            "active": {path: list(one.active_adapters) for path, one in wrapping},
            "trained": {path: p.requires_grad for path, p in part.named_parameters()},
            "scaling": {path: dict(one.scaling) for path, one in wrapping},
            "peft": (sorted(getattr(part, "peft_config", {})), hasattr(part, "peft_config")),
            "loaded": getattr(part, "_hf_peft_config_loaded", None),
        }
    return found


def same_state(pipeline: Any, before: dict[str, Any]) -> bool:
    after = state_of(pipeline)
    values = [(one.pop("values"), before[name].pop("values")) for name, one in after.items()]
    return after == before and all(
        x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in values
    )


def refused(layer: str, quantize: str | None, compiled: bool) -> tuple[str, Any, Any, list[str]]:
    lora = {f"{layer}.lora_A.weight": torch.ones(4, 77), f"{layer}.lora_B.weight": torch.ones(77, 4)}
    config = Config(parallel=Parallel(ulysses=2), quantize=quantize, compile=compiled)
    with Engine.from_pretrained("emoji", config) as engine:
        before = engine("a cat", seed=3, **CALL).images
        state, said = state_of(engine.pipeline) if quantize is None else None, ""
        try:
            engine.load_lora_weights(lora, adapter_name="other")
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        assert state is None or same_state(engine.pipeline, state)
        after = engine("a cat", seed=3, **CALL).images
        return said, before, after, list(engine.get_active_adapters())


@pytest.mark.parametrize("layer", OTHERS.values(), ids=list(OTHERS))
def test_it_is_refused_on_all_ranks_and_nothing_is_left(layer: str) -> None:
    found = run_ranks(refused, 2, layer, None, False)
    assert found[0][0] == found[1][0]
    assert found[0][0].startswith("ConfigError: load_lora_weights: ")
    for _, before, after, active in found:
        assert np.array_equal(before, after)
        assert active == []


@pytest.mark.parametrize("name", ["/nowhere/lora.safetensors", "there/is/none", "lora.safetensors"])
def test_a_file_that_is_not_there_is_told(name: str) -> None:
    says = pytest.raises(ConfigError, match=f"'{name}' does not exist; give a file")
    with Engine.from_pretrained("emoji") as engine, says:
        engine.load_lora_weights(name)


def test_beside_quantized_weights() -> None:
    for said, before, after, active in run_ranks(refused, 2, OTHERS["another width"], "int8", False):
        assert said.startswith("ConfigError: load_lora_weights: the adapter does not fit this model")
        assert np.array_equal(before, after)
        assert active == []


def test_what_came_before_the_fault_is_taken_off() -> None:
    """The transformer's part fits, the text encoder's does not."""
    fits, other = "transformer.transformer_blocks.0.attn.to_q", "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    shapes = {
        f"{fits}.lora_A": (4, 192),
        f"{fits}.lora_B": (192, 4),
        f"{other}.lora_A": (4, 7),
        f"{other}.lora_B": (7, 4),
    }
    lora = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    with Engine.from_pretrained("emoji", alone=True) as engine:
        state = state_of(engine.pipeline)
        with pytest.raises(ConfigError, match="does not fit"):
            engine.load_lora_weights(lora, adapter_name="other")
        assert not any(adapters(engine.pipeline).values())
        assert same_state(engine.pipeline, state)
        engine.load_lora_weights({k: x for k, x in lora.items() if k.startswith(fits)}, adapter_name="other")
        assert engine.get_active_adapters() == ["other"]


@pytest.mark.parametrize("offload", [None, "group:to=disk"])
def test_what_is_saved_after_it_is_what_would_have_been_saved(offload: str | None, tmp_path: Path) -> None:
    layer = OTHERS["another width"]
    lora = {f"{layer}.lora_A.weight": torch.ones(4, 77), f"{layer}.lora_B.weight": torch.ones(77, 4)}
    with Engine.from_pretrained("emoji", Config(offload=offload), alone=True) as engine:
        before = engine("a cat", seed=3, **CALL).images
        with pytest.raises(ConfigError, match="does not fit"):
            engine.load_lora_weights(lora, adapter_name="other")
        assert "peft_config" not in vars(engine.pipeline.transformer)
        engine.save_pretrained(str(tmp_path))
        assert np.array_equal(engine("a cat", seed=3, **CALL).images, before)
        with engine.handle.at_home():
            values = {name: x.clone() for name, x in engine.pipeline.transformer.state_dict().items()}
    saved = FluxTransformer2DModel.from_pretrained(str(tmp_path / "transformer")).state_dict()
    assert saved.keys() == values.keys()
    assert all(torch.equal(saved[name], x) for name, x in values.items())


def test_adapters_that_were_there_stay_as_they_were() -> None:
    """Two are active with weights of their own; the one that does not fit wraps layers that these have not."""
    pipeline = flux.build("FluxPipeline")
    good = [adapters_of.lora(pipeline, ("transformer",), rank=2, seed=seed, every=3) for seed in (1, 2)]
    bad = adapters_of.lora(pipeline, ("transformer",), rank=2, seed=3, every=2)
    key = next(name for name in bad if ".attn.to_" in name and "lora_B" in name)
    bad[key] = bad[key][:-1]
    call = flux.call(1) | {"num_inference_steps": 1, "seed": 1}
    with Engine.from_pipeline(pipeline) as engine:
        for number, weights in enumerate(good):
            engine.load_lora_weights(dict(weights), adapter_name=f"good{number}")
        engine.set_adapters(["good0", "good1"], [0.5, 2.0])
        before, state = engine(**call).images, state_of(pipeline)
        with pytest.raises(ConfigError, match="does not fit"):
            engine.load_lora_weights(bad, adapter_name="bad")
        assert same_state(pipeline, state)
        assert engine.get_active_adapters() == ["good0", "good1"]
        assert torch.equal(engine(**call).images, before)
        engine.unload_lora_weights()
        assert not any("base_layer" in name for name in pipeline.transformer.state_dict())
