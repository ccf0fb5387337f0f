"""Reused parts of blocks on one rank: what is found and reused, compile, requests, refusals, what is left behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import parafuse
from parafuse.cache import cache_of
from parafuse.engine.caches.anatomy import candidates
from parafuse.engine.caches.parts import KeptBlock, KeptParts, Output, PartReuse, _Call
from parafuse.engine.caches.schedules import CROSS, FEED_FORWARD, SELF, TEMPORAL, is_kept, schedule_of
from parafuse.errors import ConfigError, UnsupportedError
from tests import pipelines
from tests.caches.steps import letters, steps_of
from tests.graphs import Graphs
from tests.models import Inputs, error
from tests.zoo.collect import cases, inputs_of, outputs, randomized

EXACT = 1e-5
UNET: dict[str, Any] = dict(
    block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8, sample_size=16,
    attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
METHODS = {
    "pab:2,2,2,warmup_steps=1": "FluxTransformer2DModel LatteTransformer3DModel WanTransformer3DModel unet",
    "fora:2,warmup_steps=1": "SD3Transformer2DModel QwenImageTransformer2DModel WanTransformer3DModel unet",
    "tgate:1": "PixArtTransformer2DModel LTXVideoTransformer3DModel WanTransformer3DModel unet",
    "fastercache:2,warmup_steps=1": "CogVideoXTransformer3DModel HunyuanVideoTransformer3DModel unet",
}  # fmt: skip


def unet(**changes: Any) -> nn.Module:
    import diffusers

    return randomized(diffusers.UNet2DConditionModel(**UNET | changes).eval().requires_grad_(False))


def unet_inputs(batch: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return dict(
        sample=torch.randn(batch, 4, 8, 12, generator=generator),
        timestep=torch.tensor(500),
        encoder_hidden_states=torch.randn(batch, 5, 8, generator=generator),
        return_dict=False,
    )


def made(name: str) -> tuple[nn.Module, Inputs]:
    if name == "unet":
        return unet(), unet_inputs()
    case = cases()[name]
    return randomized(case.build()).eval(), inputs_of(case, case.sizes)


def twice(model: nn.Module, values: Inputs, cache: str, *, between: Any = None) -> tuple[list[Tensor], list[str], Any]:
    """Two steps of the same inputs: (results, decisions, cache)."""
    found = []
    with parafuse.apply(model, parafuse.Config(cache=cache)) as handle, handle.request() as memories:
        (memory,), (caching,) = memories.values(), handle.skipping.values()
        for step in range(2):
            memory.told.steps = step
            found.append(outputs(model, values)[0])
            if between and not step:
                between(caching)
        return found, letters(memory), caching


@pytest.mark.parametrize(
    ("cache", "name"), [(cache, name) for cache, names in METHODS.items() for name in names.split()]
)
def test_reuse_with_unchanged_inputs_changes_nothing(cache: str, name: str) -> None:
    model, values = made(name)
    attributes = [sorted(vars(module)) for module in model.modules()]
    want = outputs(model, values)[0]

    def spoil(caching: PartReuse) -> None:
        for kept in caching.memory.branches.values():
            for one in kept.outputs:
                for x in one.tensors:
                    x.mul_(3)

    (first, second), decisions, _ = twice(model, values, cache)
    assert (set(decisions[0]), set(decisions[1])) == ({"c"}, {"s"})
    assert max(error(first, want), error(second, want)) <= EXACT
    assert error(twice(model, values, cache, between=spoil)[0][1], want) > 100 * EXACT  # what was kept counts
    assert torch.equal(outputs(model, values)[0], want)
    assert attributes == [sorted(vars(module)) for module in model.modules()]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("FluxTransformer2DModel", {SELF, FEED_FORWARD}),  # joint attention
        ("WanTransformer3DModel", {SELF, CROSS, FEED_FORWARD}),
        ("LatteTransformer3DModel", {SELF, TEMPORAL, CROSS, FEED_FORWARD}),
        ("Lumina2Transformer2DModel", {SELF, FEED_FORWARD}),  # is given its stream twice
        ("SanaTransformer2DModel", {CROSS, FEED_FORWARD}),  # linear attention
        ("unet", {SELF, CROSS, FEED_FORWARD}),
    ],
)
def test_kinds_of_parts(name: str, kinds: set[str]) -> None:
    model, values = made(name)
    caching = twice(model, values, "fora:2,warmup_steps=1")[2]
    parts = [part for found in caching._parts.values() for part in found]
    assert {part.kind for part in parts} == kinds
    assert all(bool(part.sites) != (part.kind == FEED_FORWARD) for part in parts)


def test_what_is_reused_shows_where_inputs_change() -> None:
    model, values = made("WanTransformer3DModel")
    plain = steps_of(model, "", [values], 8).outputs
    for cache, decisions in {"pab:2,2,2": "cccscscs", "pab:2,4,6": "cccsssss", "tgate:5": "cccccsss"}.items():
        found = steps_of(model, cache, [values], 8)
        assert "".join(one[0] for one in found.decisions) == decisions
        reused = [error(a, b) > 10 * EXACT for a, b in zip(found.outputs, plain, strict=True)]
        assert reused == [one[0] == "s" for one in found.decisions]


def test_schedules() -> None:
    pab = schedule_of(cache_of("pab:2,3,1") or parafuse.PyramidAttentionBroadcast())
    assert [pab.reuses(SELF, step, 10) for step in range(10)] == [c == "s" for c in "cccscscscc"]
    assert [pab.reuses(TEMPORAL, step, 10) for step in range(10)] == [c == "s" for c in "cccsscsscc"]
    assert not any(pab.reuses(kind, step, None) for kind in (CROSS, FEED_FORWARD) for step in range(10))
    fora = schedule_of(parafuse.ForaCache(2, feed_forward=1))
    assert fora.kinds == {SELF, TEMPORAL, CROSS}
    gate = schedule_of(parafuse.TGateCache(4))
    assert [gate.reuses(CROSS, step, None) for step in range(6)] == [False] * 4 + [True] * 2
    assert [is_kept(gate, CROSS, step, None) for step in range(5)] == [False] * 3 + [True] * 2
    assert not any(gate.reuses(SELF, step, None) for step in range(9))
    faster = schedule_of(parafuse.FasterCache(2, weight=0.8))
    assert (faster.depth, faster.slope(5, 10), faster.slope(5, None)) == (2, 0.4, 0.4)


def test_forecast_goes_on_along_the_last_two() -> None:
    """An attention whose output moves by the same amount each step, and a weight of 1, are met exactly."""
    model, values = made("CogVideoXTransformer3DModel")
    with parafuse.apply(model, parafuse.Config(cache="fastercache:2,warmup_steps=2,final_steps=0,weight=2")) as handle:
        caching: Any = next(iter(handle.skipping.values()))
        with handle.request() as memories:
            (memory,) = memories.values()
            for step in range(3):
                memory.told.steps = step
                if step == 2:
                    kept = next(iter(memory.branches[0].blocks.values())).outputs
                    new, old = next(iter(kept.values()))
                    for x, y in zip(new.tensors, old.tensors, strict=True):
                        y.copy_(x).mul_(0.5)
                outputs(model, values)
            call = memory.branches[0]
            assert letters(memory) == ["cc", "cc", "ss"]
            outs = next(iter(next(iter(call.blocks.values())).outputs.values()))
            one = _Call(caching, (0, 1))
            got = one._forecast(outs)
            for x, y in zip(Output(got).tensors, outs[0].tensors, strict=True):
                assert error(x, 1.5 * y) <= EXACT


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize(
    ("name", "cache"), [("FluxTransformer2DModel", "fora:2"), ("unet", "tgate:4"), ("unet", "pab:2,2,2")]
)
def test_compiled_blocks_compute_and_reuse_in_one_graph_each(name: str, cache: str) -> None:
    def run(asked: str) -> Any:
        torch.compiler.reset()
        (model, values), graphs = made(name), Graphs()
        compiled: Any = model

        def prepare() -> None:
            compiled.compile_repeated_blocks(fullgraph=True, backend=graphs)

        return steps_of(model, asked, [values], 8, graphs=lambda: graphs.made, prepare=prepare)

    plain, found = run("interval:1000,first_blocks=0"), run(cache)
    model, values = made(name)
    want = steps_of(model, cache, [values], 8)
    assert max(map(error, found.outputs, want.outputs)) <= EXACT
    assert "s" in found.decisions[5][0] or "s" in found.decisions[6][0]
    assert plain.graphs[-1] < found.graphs[-1] <= 2 * plain.graphs[-1]
    assert found.graphs[5] == found.graphs[-1]


def test_a_block_that_writes_into_a_parts_result_gets_a_copy() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            out = self.attn(x)
            out.mul_(0.5)
            return x + out

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model, values = Model().eval().requires_grad_(False), dict(x=torch.randn(2, 5, 8))
    want = outputs(model, values)[0]
    (first, second), decisions, caching = twice(model, values, "pab:2,2,2,warmup_steps=1")
    assert decisions == ["cc", "ss"]
    assert max(error(first, want), error(second, want)) <= EXACT
    assert [part.is_written for part in next(iter(caching._parts.values()))] == [True]


def test_an_exception_leaves_nothing_behind() -> None:
    model, values = made("WanTransformer3DModel")
    want = outputs(model, values)[0]
    with parafuse.apply(model, parafuse.Config(cache="pab:2,2,2,warmup_steps=1")) as handle:
        with handle.request() as memories:
            (memory,), caching = memories.values(), cast(PartReuse, next(iter(handle.skipping.values())))
            outputs(model, values)
            assert memory.nbytes > 0
            memory.told.steps = 1
            block: Any = next(iter(caching.hosts))
            hook = block.norm2.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                outputs(model, values)
            hook.remove()
            assert memory.nbytes == 0
            assert not any(host.cell.is_on or host.cell.given or host.left_out for host in caching.hosts.values())
            assert error(outputs(model, values)[0], want) <= EXACT
            assert letters(memory)[-1] == "cc"  # what the failed call left is not reused
        assert caching.memory.nbytes == 0


def test_requests_do_not_mix_and_other_sizes_are_computed() -> None:
    model, values = made("WanTransformer3DModel")
    case = cases()["WanTransformer3DModel"]
    other = inputs_of(case, case.sizes, seed=5)
    other["encoder_hidden_states"] = values["encoder_hidden_states"]
    want = [outputs(model, one)[0] for one in (values, other)]
    with parafuse.apply(model, parafuse.Config(cache="pab:2,2,2,warmup_steps=1")) as handle, handle.request() as one:
        (first,) = one.values()
        outputs(model, values)
        with handle.request() as two:
            (second,) = two.values()
            second.told.steps = 1
            assert error(outputs(model, other)[0], want[1]) <= EXACT
            assert letters(second) == ["cc"]
        assert second.nbytes == 0
        first.told.steps = 1
        assert error(outputs(model, values)[0], want[0]) <= EXACT
        longer = values | dict(hidden_states=torch.cat([values["hidden_states"]] * 2, dim=-1))
        first.told.steps = 2  # other latents: it is the third
        outputs(model, longer)
        assert handle.clock.step == 3
        assert letters(first) == ["cc", "ss", "cc"]


def test_rows_of_a_batch_that_is_cut() -> None:
    x = torch.arange(24.0).view(4, 3, 2)
    kept = KeptParts((0, 1), {("blocks.0", 0): KeptBlock((), {0: [Output([(x.clone(), None)])]})})
    assert kept.nbytes == x.nbytes
    assert kept.narrow((1,))
    assert torch.equal(kept.outputs[0].tensors[0], x[2:])
    assert kept.nbytes == x.nbytes // 2
    assert not kept.narrow((0,))


def test_replay_holds_a_schedule_to_its_receipt() -> None:
    model, values = made("WanTransformer3DModel")
    with parafuse.apply(model, parafuse.Config(cache="pab:2,2,2,warmup_steps=1")) as handle, handle.request():
        (caching,) = handle.skipping.values()
        caching.replay = lambda number, row: False
        outputs(model, values)
        caching.memory.told.steps = 1
        with pytest.raises(ConfigError, match=r"plan.replay: call 2 is decided otherwise by the schedule of cache pab"):
            outputs(model, values)


@pytest.mark.parametrize(
    ("name", "cache", "text"),
    [
        ("FluxTransformer2DModel", "tgate:3", "has no cross-attention of its own to reuse; it can have .*pab, fora"),
        ("FluxTransformer2DModel", "token-merging:0.5", "is a transformer, which can have .*pab, fora, tgate"),
        ("unet", "taylorseer:3", "is a unet, which can have .*token-merging"),
    ],
)  # fmt: skip
def test_models_that_cannot_have_a_cache(name: str, cache: str, text: str) -> None:
    model, _ = made(name)
    attributes = [sorted(vars(module)) for module in model.modules()]
    with pytest.raises(ConfigError, match=text):
        parafuse.apply(model, parafuse.Config(cache=cache))
    assert attributes == [sorted(vars(module)) for module in model.modules()]


def test_a_model_without_such_parts_is_refused_at_its_first_call() -> None:
    model, values = made("SanaTransformer2DModel")
    refused = pytest.raises(UnsupportedError, match="cache fastercache: none of its blocks has self-attention or temp")
    with parafuse.apply(model, parafuse.Config(cache="fastercache:2")), refused:
        outputs(model, values)


def test_a_block_is_as_it_was_after_its_parts_were_found() -> None:
    model, values = made("WanTransformer3DModel")
    block: Any = model.get_submodule("blocks.0")
    before = {name: len(part._forward_hooks) + len(part._forward_pre_hooks) for name, part in block.named_modules()}
    twice(model, values, "pab:2,2,2")
    assert before == {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in block.named_modules()}
    assert list(candidates(block)) == ["attn1", "attn2", "ffn"]


class Halves:
    """An attention processor that makes two attention calls."""

    def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Any:
        projected = (one(hidden_states) for one in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        halves = [nn.functional.scaled_dot_product_attention(x, k, v) for x in q.chunk(2, dim=2)]
        return attn.to_out[0](torch.cat(halves, dim=2).transpose(1, 2).flatten(2))


def test_attention_that_is_changed_while_a_cache_is_on() -> None:
    model, values = made("PixArtTransformer2DModel")
    changed: Any = model
    config = parafuse.Config(cache="pab:2,2,2,warmup_steps=1")
    with parafuse.apply(model, config) as handle, handle.request() as memories:
        (memory,), caching = memories.values(), cast(PartReuse, next(iter(handle.skipping.values())))
        outputs(model, values)
        for block in changed.transformer_blocks:
            block.attn1.set_processor(Halves())
        for step in (1, 2, 3):
            memory.told.steps = step
            outputs(model, values)
        assert letters(memory) == ["cc", "cc", "cc", "ss"]  # what the old processor gave is not reused
        sites = [[part.sites for part in found if part.sites] for found in caching._parts.values()]
        assert sites == [[(0,), (1,)], [(0, 1), (2,)]]


def test_in_inference_mode() -> None:
    model, values = made("FluxTransformer2DModel")
    with torch.inference_mode():
        want = outputs(model, values)[0]
        (first, second), decisions, _ = twice(model, values, "fora:2,warmup_steps=1")
    assert decisions == ["cc", "ss"]
    assert max(error(first, want), error(second, want)) <= EXACT


def test_an_engine_says_what_was_reused_and_does_it_again(tmp_path: Path) -> None:
    folder = str(pipelines.sd3(tmp_path / "sd3"))
    config = parafuse.Config(cache="fora:2,warmup_steps=2", dtype="float32", device="cpu")
    call: dict[str, Any] = dict(prompt="a cat", height=8, width=8, num_inference_steps=7, output_type="latent", seed=3)
    decisions = ["cc", "cc", "ss", "cc", "ss", "cc", "cc"]
    with parafuse.Engine.from_pretrained(folder, config) as engine:
        first = engine(**call).images
        found = engine.receipt["cache"]
        assert found["decisions"] == {"transformer": decisions}
        assert found["hits"] == ["0/2", "0/2", "2/2", "0/2", "2/2", "0/2", "0/2"]
        assert found["bytes"][0] > 0
        assert torch.equal(engine(**call).images, first)
        again = dataclasses.replace(engine.plan, replay={"transformer": decisions})
    with parafuse.Engine.from_pretrained(folder, plan=again) as engine:
        assert torch.equal(engine(**call).images, first)
