"""One product for queries, keys and values: exact, off again bit for bit, and never beside weights that it lacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parafuse
from parafuse.engine.rewrites import fusable
from parafuse.engine.rewrites.fusable import attentions
from parafuse.engine.rewrites.qkv import FusedProjections, gain, why_not_auto
from parafuse.errors import ConfigError
from tests.dist.ranks import run_ranks
from tests.graphs import Graphs
from tests.models import EQUAL, ODD, build, call, error, inputs
from tests.rewrites import table
from tests.zoo.collect import cases, inputs_of, outputs, randomized

EXACT = 1e-5
CASES = {
    "FluxTransformer2DModel": (4, 4),
    "FluxTransformer2DModel: image prompt": (2, 4),
    "Flux2Transformer2DModel": (2, 2),
    "SD3Transformer2DModel": (3, 3),
    "WanTransformer3DModel: image to video": (4, 4),
    "PixArtTransformer2DModel": (4, 4),
    "CogVideoXTransformer3DModel": (2, 2),
    "HunyuanVideoTransformer3DModel": (2, 6),
    "AuraFlowTransformer2DModel": (4, 4),
    "DiTTransformer2DModel": (2, 2),
}
"""Attentions that get it, of all."""
NEVER = {
    "SD3Transformer2DModel: dual attention": "FusedJointAttnProcessor2_0 gives something else",
    "QwenImageTransformer2DModel": "QwenDoubleStreamAttnProcessor2_0 does not use a joint projection",
    "DreamLiteTransformer2DModel: grouped queries": "does not use a joint projection",
    "MochiTransformer3DModel": "none has separate projections",
}


def prepared(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A model of the zoo and what it gives."""
    with torch.no_grad():
        model = randomized(cases()[name].build())
    return model, outputs(model, inputs_of(cases()[name], cases()[name].sizes))


def again(model: nn.Module, name: str) -> list[Tensor]:
    return outputs(model, inputs_of(cases()[name], cases()[name].sizes))


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    return max(error(a, b) for a, b in zip(got, want, strict=True))


def insides(model: nn.Module) -> list[Any]:
    """All that modules have of their own, but for values of weights."""
    return [
        (name, key, sorted(value) if key == "_modules" else id(value))
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if key == "_modules" or not key.startswith("_")
    ]


def held_bytes(model: nn.Module) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.state_dict().values()}
    return sum(storages.values())


@pytest.mark.parametrize("name", CASES)
def test_it_is_exact_takes_no_memory_and_goes_off_bit_for_bit(name: str) -> None:
    model, want = prepared(name)
    before, inside, held = {k: v.clone() for k, v in model.state_dict().items()}, insides(model), held_bytes(model)
    rewrite = FusedProjections(model)
    rewrite.install()
    assert (sum(a.fused_projections for _, a in attentions(model)), len(attentions(model))) == CASES[name]
    assert rewrite.lines()[0].startswith(f"rewrite qkv: one product in {CASES[name][0]} of {CASES[name][1]} attentions")
    assert worst(again(model, name), want) <= EXACT
    assert held_bytes(model) == held
    assert rewrite.extra_bytes() == 0
    called: list[nn.Module] = []
    hooks = [part.register_forward_hook(lambda part, *_: called.append(part)) for part in rewrite.idle()]
    again(model, name)
    assert len(rewrite.idle()) >= 2 * CASES[name][0]
    assert not called
    for hook in hooks:
        hook.remove()
    rewrite.remove()
    assert insides(model) == inside
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert held_bytes(model) == held
    assert all(torch.equal(a, b) for a, b in zip(again(model, name), want, strict=True))


@pytest.mark.parametrize("name", NEVER)
def test_what_cannot_have_it_is_refused_and_unchanged(name: str) -> None:
    model, want = prepared(name)
    inside = insides(model)
    with pytest.raises(
        ConfigError, match=rf"rewrites='qkv': {name.split(':', maxsplit=1)[0]} .*{NEVER[name]}.* out of rewrites"
    ):
        FusedProjections(model).install()
    assert insides(model) == inside
    assert worst(again(model, name), want) == 0


def test_without_the_trial_a_norm_would_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers' own fuse_qkv_projections does to Stable Diffusion 3.5."""
    name = "SD3Transformer2DModel: control residuals and a skipped layer"
    model, want = prepared(name)
    monkeypatch.setattr(fusable, "_error", lambda *_: 0.0)
    FusedProjections(model).install()
    assert worst(again(model, name), want) > 0.01


def adapter(model: Any, seed: int = 3) -> dict[str, Tensor]:
    """A LoRA for all projections, in peft's format."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"transformer.{name}.lora_{half}.weight": torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.endswith(("to_q", "to_v", "add_k_proj"))
        for half, shape in (("A", (2, part.in_features)), ("B", (part.out_features, 2)))
    }


def with_adapter(model: Any, weights: dict[str, Tensor], steps: tuple[str, ...]) -> Tensor:
    """What the model gives after an adapter came and did these things."""
    model.load_lora_adapter(dict(weights), adapter_name="a", prefix="transformer")
    for step in steps:
        if step == "call":
            call(model, inputs("flux", ODD))
        else:
            getattr(model, step)()
    return call(model, inputs("flux", ODD))


@pytest.mark.parametrize(
    "steps", [(), ("call", "unload_lora"), ("fuse_lora", "unload_lora"), ("call", "fuse_lora", "call", "unload_lora")]
)
def test_an_adapter_that_comes_later_counts(steps: tuple[str, ...]) -> None:
    plain, model = build("flux"), build("flux")
    weights = adapter(plain)
    want = with_adapter(plain, weights, steps)
    assert error(want, call(build("flux"), inputs("flux", ODD))) > 1e-3 or steps == ("call", "unload_lora")
    rewrite = FusedProjections(model)
    rewrite.install()
    call(model, inputs("flux", ODD))
    assert error(with_adapter(model, weights, steps), want) <= EXACT
    assert rewrite.num_on == (4 if "unload_lora" in steps else 0)
    assert ("an adapter is on its projections (4)" in rewrite.lines()[0]) is ("unload_lora" not in steps)
    rewrite.remove()
    assert torch.equal(call(model, inputs("flux", ODD)), want)


def test_an_adapter_put_in_by_hand_is_found_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def changed(*, watched: bool) -> tuple[Tensor, Tensor]:
        plain, model = build("flux"), build("flux")
        rewrite = FusedProjections(model)
        rewrite.install()
        if not watched:
            monkeypatch.setattr(rewrite, "_before_call", lambda: None)
        for one in (plain, model):
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), one)
            for name, weight in one.named_parameters():
                if "lora" in name:
                    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
        return call(model, inputs("flux", ODD)), call(plain, inputs("flux", ODD))

    assert error(*changed(watched=True)) <= EXACT
    assert error(*changed(watched=False)) > 1e-3


def test_an_adapter_that_is_there_already_is_refused() -> None:
    model: Any = build("flux")
    model.load_lora_adapter(adapter(model), adapter_name="a", prefix="transformer")
    with pytest.raises(ConfigError, match=r"an adapter is on its projections \(4\)\. fuse_lora\(\) and unload"):
        FusedProjections(model).install()


def test_another_processor_is_left_alone_and_weights_may_move() -> None:
    model: Any = randomized_unet()
    values = dict(sample=torch.randn(2, 4, 8, 8), timestep=1, encoder_hidden_states=torch.randn(2, 5, 16))
    want, default = call_unet(model, values), attentions(model)[0][1].processor
    rewrite = FusedProjections(model)
    rewrite.install()
    assert rewrite.num_on == len(attentions(model)) == 8
    assert error(call_unet(model, values), want) <= EXACT
    first, own = attentions(model)[0][1], Doubled()
    first.set_processor(own)
    changed = call_unet(model, values)
    assert error(changed, want) > 1e-3
    assert rewrite.num_on == 7
    model.double().float()  # each weight by itself
    assert rewrite.extra_bytes() > 0
    assert torch.equal(call_unet(model, values), changed)
    assert rewrite.extra_bytes() == 0
    first.set_processor(default)
    assert error(call_unet(model, values), want) <= EXACT
    assert rewrite.num_on == 8
    first.set_processor(own)
    rewrite.remove()
    assert first.processor is own
    first.set_processor(default)
    assert torch.equal(call_unet(model, values), want)


class Doubled:
    """A processor of somebody's own."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return attn.to_out[0](2 * attn.to_v(hidden_states))


def randomized_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    with torch.no_grad():
        return randomized(unet.eval().requires_grad_(False))


def call_unet(model: nn.Module, values: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**values).sample


def on_ranks(family: str, degrees: dict[str, int], spoiled: bool) -> list[float]:
    """Errors against plain diffusers, of two lengths."""
    model = build(family)
    calls = [inputs(family, sizes) for sizes in (ODD, EQUAL)]
    plain = [call(model, values) for values in calls]
    rewrite = FusedProjections(model)
    rewrite.install()
    if spoiled:
        next(a.to_qkv for _, a in attentions(model) if "to_qkv" in a._modules).weight.data[0] += 1.0
    with parafuse.apply(model, parafuse.Config(parallel=parafuse.Parallel(**degrees))):
        errors = [error(call(model, values), want) for values, want in zip(calls, plain, strict=True)]
    rewrite.remove()
    return errors


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        ("flux", {"ulysses": 2}),
        ("wan", {"ulysses": 3}),
        ("flux", {"ring": 3, "ulysses": 1}),
        ("flux2", {"ring": 2, "ulysses": 1}),
        ("flux", {"data": 2}),
        ("wan", {"cfg": 2}),
    ],
)
def test_it_is_exact_on_several_ranks(family: str, degrees: dict[str, int]) -> None:
    found = run_ranks(on_ranks, math.prod(degrees.values()), family, degrees, False)
    assert all(max(errors) <= EXACT for errors in found)
    if family == "flux":
        assert all(min(errors) > 1e-4 for errors in run_ranks(on_ranks, len(found), family, degrees, True))


def test_it_is_one_graph_where_the_whole_model_is_compiled() -> None:
    model = build("wan")
    want = call(model, inputs("wan", ODD))
    FusedProjections(model).install()
    graphs = Graphs()
    compiled: Any = torch.compile(model, fullgraph=True, backend=graphs)
    assert error(call(compiled, inputs("wan", ODD)), want) <= EXACT
    assert graphs.made == 1


def test_a_cache_keeps_what_it_gives() -> None:
    model = build("flux")
    rewrite = FusedProjections(model)
    rewrite.install()
    calls = [inputs("flux", ODD, seed=seed) for seed in (1, 1, 2)]
    with parafuse.apply(model, parafuse.Config(cache="first-block:0.2")) as handle, handle.request():
        got = [call(model, values) for values in calls]
    rewrite.remove()
    with parafuse.apply(model, parafuse.Config(cache="first-block:0.2")) as handle, handle.request():
        want = [call(model, values) for values in calls]
    assert all(error(a, b) <= EXACT for a, b in zip(got, want, strict=True))


def test_it_is_quantized_as_the_three_would_be() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model, plain = build("flux"), build("flux")
    values, config = inputs("flux", ODD), torchao.Int8WeightOnlyConfig()
    want = call(model, values)
    torchao.quantize_(plain, config, filter_fn=lambda part, name: isinstance(part, nn.Linear) and "to_" in name)
    rewrite = FusedProjections(model)
    rewrite.install()
    idle = rewrite.idle()
    torchao.quantize_(
        model, config, filter_fn=lambda part, name: isinstance(part, nn.Linear) and "to_" in name and part not in idle
    )
    assert rewrite.lines()[0] == "rewrite qkv: one product in 4 of 4 attentions"
    assert 0 < error(call(model, values), want) <= 2 * error(call(plain, values), want)
    rewrite.remove()


def test_a_saved_engine_is_without_it(tmp_path: Path) -> None:
    engine = parafuse.Engine.from_pretrained("emoji")
    rewrite = FusedProjections(engine.pipeline.transformer)
    rewrite.install()
    with pytest.raises(ConfigError, match=r"transformer has weights that its configuration does not make"):
        engine.save(tmp_path)
    with rewrite.set_aside():
        engine.save(tmp_path)
    assert all(attention.fused_projections for _, attention in attentions(engine.pipeline.transformer))
    again = parafuse.Engine.load(tmp_path)
    rewrite.remove()
    want = engine.pipeline.transformer.state_dict()
    assert all(torch.equal(x, want[k]) for k, x in again.pipeline.transformer.state_dict().items())


def test_a_handle_sets_it_aside() -> None:
    model = build("flux")
    rewrite = FusedProjections(model)
    rewrite.install()
    with parafuse.apply(model, parafuse.Config(cache="interval:2")) as handle:
        handle._on[0][1].rewrites = [rewrite]
        with handle.set_aside():
            assert rewrite.num_on == 0
            call(model, inputs("flux", ODD))
            assert rewrite.num_on == 0
        assert rewrite.num_on == 4


def test_nothing_is_drawn_from_the_global_generator() -> None:
    model = build("flux")
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    FusedProjections(model).install()
    assert torch.equal(torch.rand(3), want)


def test_what_auto_goes_by() -> None:
    assert "does not pay on a CPU" in why_not_auto(build("flux"))
    assert gain(4096, 3072) == 1.0  # 3 times 384 tiles, or 1152, on 132 processors: 9 rounds
    assert gain(512, 3072) == 1.5
    assert gain(2048, 3072) == 1.2
    assert all(gain(rows, width) >= 1.0 for rows in range(64, 9000, 64) for width in (640, 1280, 1536, 3072, 5120))


@pytest.mark.parametrize("name", list(cases())[3::9])
def test_the_page_says_who_can_have_it(name: str) -> None:
    assert table.row(name) in table.PAGE.read_text(), "run python -m tests.rewrites.table"
