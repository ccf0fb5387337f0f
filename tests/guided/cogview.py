"""CogView 4, whose text is padded to the longest prompt of a call and passed without a mask."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.guided.case import Guided
from tests.guided.parts import NEGATIVE_PROMPTS, STEPS, assemble, made
from tests.pipelines import _t5_tokenizer, _vae
from tests.zoo.cogview import CONFIG


def build() -> Any:
    import transformers

    text = transformers.GlmConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return assemble(
        "CogView4Pipeline",
        transformer=made("CogView4Transformer2DModel", CONFIG, rope_axes_dim=(32, 32)),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=transformers.GlmModel(text),
        tokenizer=_t5_tokenizer(),
    )


def call(count: int) -> dict[str, Any]:
    """Every prompt is longer than the one before by more than a row of padding."""
    return dict(
        prompt=[" ".join(["the red apple a cat"] * (1 + 5 * i)) for i in range(count)],
        negative_prompt=list(NEGATIVE_PROMPTS[:count]),
        height=32,
        width=48,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
    )


CASES = [
    Guided(name="CogView 4", build=build, call=call, source="tests/zoo/cogview.py; a tiny GLM for the text"),
]
