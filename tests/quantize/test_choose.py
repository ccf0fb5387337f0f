"""Which layers are quantized: by measured role, full name and size; every other one is listed with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import parafuse
from parafuse.engine.quantize.choose import ADAPTER, MODULATION, NAMED, OUTSIDE, choose
from parafuse.engine.quantize.report import ranges
from parafuse.engine.quantize.roles import measured, pattern_of, sees_samples
from parafuse.engine.stack import named_blocks
from parafuse.errors import ConfigError
from parafuse.quantization import Fp8, Fp8Weight, Int8
from tests.models import build
from tests.quantize.roles import SAMPLES, measure, seen
from tests.zoo.collect import cases

UNKNOWN_TO_THE_RULE = {
    "CogView4Transformer2DModel", "CosmosTransformer3DModel", "EasyAnimateTransformer3DModel",
    "GlmImageTransformer2DModel", "HunyuanVideoTransformer3DModel", "Ideogram4Transformer2DModel",
    "Kandinsky5Transformer3DModel", "Kandinsky6SRTransformer3DModel", "Kandinsky6Transformer3DModel",
    "MiniMaxH3Transformer3DModel", "MochiTransformer3DModel", "PRXTransformer2DModel", "RFD4ProteinaTransformer",
    "Transformer2DModel",
}  # fmt: skip
"""Classes with modules of their own for modulation: these must be measured."""


@pytest.fixture(scope="module")
def roles() -> dict[str, list[str]]:
    return measure()


def test_roles_are_what_every_class_of_diffusers_does(roles: dict[str, list[str]]) -> None:
    assert roles == measured(), "python -m tests.quantize.roles writes them anew"
    assert SAMPLES == 2
    assert sum(map(bool, roles.values())) >= 33


def test_a_class_that_nobody_measured_is_told_by_what_holds_its_layers(
    roles: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule for others, held against the measured ones: it is wrong for those that are named alone."""
    monkeypatch.setattr("parafuse.engine.quantize.roles.measured", dict)
    wrong: set[str] = set()
    for name, case in cases().items():
        kind = name.partition(":")[0]
        model = case.build()
        for block, module in named_blocks(model).items():
            for path, holder in module.named_modules():
                for child, layer in holder.named_children():
                    full = ".".join(filter(None, (block, path, child)))
                    if isinstance(layer, nn.Linear) and sees_samples(model, full, holder) != (
                        pattern_of(full) in roles[kind]
                    ):
                        wrong.add(kind)
    assert wrong == UNKNOWN_TO_THE_RULE


def test_layers_of_a_block_that_see_tokens_are_chosen() -> None:
    model = build("flux", heads=4)
    choice = choose("transformer", model, Fp8(min_features=16))
    assert {pattern_of(name) for name in choice.layers} >= {
        "transformer_blocks.*.attn.to_q", "transformer_blocks.*.ff.net.*", "single_transformer_blocks.*.proj_out",
    }  # fmt: skip
    assert choice.left["proj_out"] == choice.left["x_embedder"] == OUTSIDE
    assert choice.left["transformer_blocks.0.norm1.linear"] == MODULATION
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert choice.layers.keys() | choice.left.keys() == every
    called = seen(cases()["FluxTransformer2DModel"])
    assert {pattern_of(name) for name in choice.layers} <= {name for name, ones in called.items() if ones == {False}}


def test_skip_takes_full_names_alone() -> None:
    """`proj_out` is the last projection, not a part of `single_transformer_blocks.0.proj_out`, which is a quarter of
    the work."""
    model = build("flux", heads=4)

    def chosen(skip: str) -> set[str]:
        return set(choose("transformer", model, Fp8(min_features=16, skip=skip)).layers)

    whole = chosen("")
    assert chosen("transformer.proj_out") == whole
    assert whole - chosen("transformer.single_transformer_blocks.0.proj_out") == {
        "single_transformer_blocks.0.proj_out"
    }
    all_of_them = {name for name in whole if pattern_of(name) == "single_transformer_blocks.*.proj_out"}
    assert whole - chosen("transformer.single_transformer_blocks.*.proj_out") == all_of_them
    assert len(all_of_them) == 2
    with pytest.raises(ConfigError, match="has no such layer; did you mean 'single_transformer_blocks"):
        chosen("transformer.single_transformer_block.0.proj_out")
    with pytest.raises(ConfigError, match="begins with no component that is quantized here"):
        parafuse.apply(model, parafuse.Config(quantize=Int8(skip="vae.conv_in")))
    named = choose("transformer", model, Fp8(min_features=16, skip="transformer.transformer_blocks.0.attn.to_q"))
    assert named.left["transformer_blocks.0.attn.to_q"] == NAMED


def test_what_does_not_fit_is_listed_with_its_size() -> None:
    """torchao leaves such layers as they are without a word."""
    model = build("flux", heads=3)  # 48 wide: a multiple of 16; 36 in Wan is not
    assert choose("t", model, Fp8(min_features=64)).left["transformer_blocks.0.attn.to_q"] == (
        "48 inputs, fewer than 64"
    )
    wan = build("wan", heads=3)
    left = choose("t", wan, Fp8(min_features=16)).left
    assert left["blocks.0.attn1.to_q"] == "36 inputs, no multiple of 16"
    assert "blocks.0.attn1.to_q" in choose("t", wan, Fp8Weight(min_features=16)).layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32) for _ in range(3))
        self.third.weight = self.second.weight
        self.attention = nn.MultiheadAttention(32, 2)
        self.low = nn.Linear(32, 32).bfloat16()
        self.adapted = nn.Module()
        self.adapted.base_layer = nn.Linear(32, 32)
        self.adapted.lora_A = nn.ModuleDict({"a": nn.Linear(32, 32)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Model(nn.Module):
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(32, 32)


def test_odd_layers_are_left_with_the_reason() -> None:
    choice = choose("model", Model(), Int8(min_features=16))
    assert choice.left["blocks.0.second"] == choice.left["blocks.0.third"] == "its weight is another layer's too"
    assert choice.left["blocks.0.low"] == "kept in bfloat16, the model in float32"
    assert choice.left["blocks.0.adapted.lora_A.a"] == ADAPTER
    assert "no plain linear layer" in choice.left["blocks.0.attention.out_proj"]
    assert choice.left["head"] == OUTSIDE
    assert set(choice.layers) == {"blocks.0.first", "blocks.0.adapted"}


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"has no layer to quantize \(.*fewer than 128.*lower min_features"):
        parafuse.apply(build("flux"), parafuse.Config(quantize="int8"))
    with pytest.raises(ConfigError, match="there is none of text_encoder"):
        parafuse.apply(build("flux", heads=4), parafuse.Config(quantize=Int8(min_features=16, text_encoders="int8")))


def test_names_are_put_together_by_their_first_number() -> None:
    names = ["x", "blocks.0.to_q", "blocks.2.to_q", "blocks.1.to_q", "blocks.5.to_q", "blocks.0.net.2"]
    assert ranges(names) == ["x", "blocks.0-2,5.to_q", "blocks.0.net.2"]


def test_blocks_inside_of_blocks_count_once() -> None:
    outer: Any = nn.Module()
    outer._repeated_blocks = ["Block"]
    outer.embedder = Block()  # declared too, and no repeated one
    outer.blocks = nn.ModuleList([Block(), Block()])
    outer.blocks[0].inner = nn.ModuleList([Block()])
    assert list(named_blocks(outer)) == ["blocks.0", "blocks.1"]
