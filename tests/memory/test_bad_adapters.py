"""An adapter that does not fit the model: one error on all ranks, and the engine paints as before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from parafuse import Config, Engine
from parafuse.config import Parallel
from parafuse.engine.adapters import adapters
from parafuse.errors import ConfigError
from tests.dist.ranks import run_ranks

CALL = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}
OTHERS = {
    "another width": "transformer.transformer_blocks.0.attn.to_q",
    "no such layer": "transformer.layers.7.mixer.in_proj",
    "a UNet's": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
}


def refused(layer: str, quantize: str | None, compiled: bool) -> tuple[str, Any, Any, list[str]]:
    lora = {f"{layer}.lora_A.weight": torch.ones(4, 77), f"{layer}.lora_B.weight": torch.ones(77, 4)}
    config = Config(parallel=Parallel(ulysses=2), quantize=quantize, compile=compiled)
    with Engine.from_pretrained("emoji", config) as engine:
        before = engine("a cat", seed=3, **CALL).images
        said = ""
        try:
            engine.load_lora_weights(lora, adapter_name="other")
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
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
        with pytest.raises(ConfigError, match="does not fit"):
            engine.load_lora_weights(lora, adapter_name="other")
        assert not any(adapters(engine.pipeline).values())
        engine.load_lora_weights({k: x for k, x in lora.items() if k.startswith(fits)}, adapter_name="other")
        assert engine.get_active_adapters() == ["other"]
