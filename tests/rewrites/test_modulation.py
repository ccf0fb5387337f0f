"""The rewrite `modulation`: the same results with layers looked up, whatever a pipeline does to its steps, and never a
wrong row."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

import parafuse
from parafuse.engine.rewrites import modulation, step_tables
from parafuse.engine.rewrites.modulation import StepModulation
from parafuse.engine.verify import relative_error
from parafuse.errors import ConfigError, UnsupportedError
from tests.adapters import lora
from tests.dist.ranks import run_ranks
from tests.guided.cells import seeded, tensors
from tests.guided.collect import cases
from tests.guided.flux import CONFIG, build
from tests.guided.parts import made
from tests.rewrites.layouts import painted

EXACT = 1e-5
CONFIG_ON = parafuse.Config(rewrites="modulation")


def of(handle: Any, name: str = "transformer") -> StepModulation:
    standing = next(one for found, one in handle._on if found == name)
    return next(one for one in standing.rewrites if isinstance(one, StepModulation))


def both(name: str, prompts: int = 1, **changes: Any) -> tuple[float, StepModulation]:
    """Largest error of two requests, and the rewrite."""
    case = cases()[name]
    call = case.call(min(prompts, case.max_prompts)) | changes
    pipeline = case.build()
    want, errors = tensors(pipeline(**seeded(call))), list[float]()
    with parafuse.apply(pipeline, CONFIG_ON) as handle:
        rewrite = of(handle, "unet" if "Diffusion XL" in name else "transformer")
        for _ in range(2):
            with handle.request():
                errors.append(relative_error(tensors(pipeline(**seeded(call))), want))
    return max(errors), rewrite


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("FLUX.1", 2),  # a call for each branch, each with a pooled prompt of its own
        ("FLUX.1 Kontext", 1),
        ("HunyuanVideo", 1),  # distilled guidance, and a refiner whose conditioning comes from the text
        ("Stable Diffusion 3: skipped layers", 1),  # branches in the batch, and calls of one more
        ("Stable Diffusion XL: Heun", 1),  # two calls in a step
        ("Stable Diffusion XL: image to image", 1),  # starts in mid-schedule
        ("LTX-2", 1),  # the timestep in three arguments
        ("Wan 2.2: two experts", 1),
    ],
)
def test_pictures_are_the_same_and_every_call_is_looked_up(name: str, prompts: int) -> None:
    error, rewrite = both(name, prompts)
    assert error <= EXACT
    assert rewrite.seen["looked up"] >= 2  # of the second request
    assert rewrite.seen["as they are"] == 0


def test_a_timestep_for_each_token_is_left_alone() -> None:
    error, rewrite = both("LTX-Video: image to video")
    assert error == 0
    assert rewrite.seen["looked up"] == 0
    assert any("by token" in why for why in rewrite.why)


def test_sigmas_of_the_call() -> None:
    error, rewrite = both("FLUX.1", sigmas=[1.0, 0.7, 0.2])
    assert error <= EXACT
    assert rewrite.seen["as they are"] == 0


def test_guidance_as_an_input_of_the_model() -> None:
    def distilled() -> Any:
        torch.manual_seed(0)
        pipeline = build("FluxPipeline")
        pipeline.transformer = made("FluxTransformer2DModel", CONFIG, guidance_embeds=True).eval()
        return pipeline

    pipeline, case = distilled(), cases()["FLUX.1"]
    call = case.call(1) | dict(true_cfg_scale=1.0)
    want = [tensors(pipeline(**seeded(call | dict(guidance_scale=scale)))) for scale in (3.5, 7.0)]
    assert relative_error(want[1], want[0]) > 1e-3
    with parafuse.apply(pipeline, CONFIG_ON) as handle:
        for scale, expected in zip((3.5, 7.0), want, strict=True):
            assert relative_error(tensors(pipeline(**seeded(call | dict(guidance_scale=scale)))), expected) <= EXACT
        assert of(handle).seen["as they are"] == 0


def test_bf16_is_no_further_from_fp32() -> None:
    case = cases()["HunyuanVideo"]
    call, found = case.call(1), list[list[Tensor]]()
    for dtype, rewrites in ((torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "text,modulation")):
        pipeline = case.build()
        pipeline.transformer.to(dtype)
        with parafuse.apply(pipeline, parafuse.Config(rewrites=rewrites)) as handle:
            found.append(tensors(pipeline(**seeded(call))))
            assert not rewrites or of(handle).seen["looked up"] == 6
    plain, rewritten = (relative_error(one, found[0]) for one in found[1:])
    assert 0 < rewritten <= 2 * plain


def changing(in_place: bool) -> Any:
    """A callback that changes the pooled prompt after the first step."""

    def callback(pipeline: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = values["pooled_prompt_embeds"]
        if step == 0:
            values["pooled_prompt_embeds"] = pooled.mul_(3.0) if in_place else 3.0 * pooled
        return values

    return dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["pooled_prompt_embeds"])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_callback_that_changes_the_prompt_in_mid_request(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases()["Stable Diffusion 3"]
    pipeline, call = case.build(), case.call(1)
    plain = tensors(pipeline(**seeded(call)))
    want = tensors(pipeline(**seeded(call), **changing(in_place)))
    assert relative_error(plain, want) > 1e-3
    with parafuse.apply(pipeline, CONFIG_ON) as handle:
        assert relative_error(tensors(pipeline(**seeded(call), **changing(in_place))), want) <= EXACT
        assert of(handle).seen["as they are"] == 0
        # Negative control: without the look at what stays the same, the rows of the first prompt are used.
        monkeypatch.setattr(step_tables.Table, "is_known", lambda *_: True)
        assert relative_error(tensors(pipeline(**seeded(call), **changing(in_place))), want) > 1e-3


class Loop:
    """A pipeline of one's own: calls a denoiser at given times, which need not be the scheduler's."""

    def __init__(self, shift: Any = None) -> None:
        import diffusers

        case = cases()["FLUX.1"]
        self.transformer = case.build().transformer
        self.scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.shift = shift or (lambda step, time: time)
        generator = torch.Generator().manual_seed(3)
        self.given: dict[str, Any] = dict(
            encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
            pooled_projections=torch.randn(1, 8, generator=generator),
            txt_ids=torch.zeros(5, 3),
            img_ids=torch.zeros(6, 3),
            return_dict=False,
        )
        self.latents = torch.randn(1, 6, 16, generator=generator)

    @torch.no_grad()
    def __call__(self, steps: int = 5) -> Tensor:
        self.scheduler.set_timesteps(steps)
        latents = self.latents.clone()
        for step, time in enumerate(self.scheduler.timesteps):
            given = self.shift(step, time.expand(1) / 1000)
            noise = self.transformer(hidden_states=latents, timestep=given, **self.given)[0]
            latents = self.scheduler.step(noise, time, latents, return_dict=False)[0]
        return latents


def odd_last(step: int, time: Tensor) -> Tensor:
    return time + 0.0371 if step == 3 else time


def test_times_that_are_not_the_schedulers_are_computed() -> None:
    loop = Loop(odd_last)
    want = loop()
    with parafuse.apply(loop, CONFIG_ON) as handle:
        assert relative_error([loop()], [want]) <= EXACT
        assert of(handle).seen["as they are"] > 0


def test_where_the_device_is_not_waited_for_a_wrong_time_is_an_error() -> None:
    """As on a GPU: no silent wrong row."""
    loop = Loop(odd_last)
    with parafuse.apply(loop, CONFIG_ON) as handle:
        of(handle).is_host_free = False
        with pytest.raises(UnsupportedError, match=r"modulation.*leave modulation out"):
            loop()
        good = Loop()
        loop.shift = good.shift
        assert relative_error([loop()], [good()]) <= EXACT  # and the next request is right


def test_the_value_itself_is_no_number_there() -> None:
    """Even where nobody comes to look."""
    loop, seen = Loop(odd_last), list[bool]()
    with parafuse.apply(loop, CONFIG_ON) as handle:
        rewrite = of(handle)
        rewrite.is_host_free = False
        hook = loop.transformer.register_forward_hook(lambda *_: seen.append(bool(_[2][0].isfinite().all())))
        with pytest.raises(UnsupportedError):
            loop()
        hook.remove()
    assert seen == [True, True, True, False, False]


def test_what_changes_in_every_step_is_given_up() -> None:
    loop = Loop()
    pooled = loop.given["pooled_projections"]

    def moving(step: int, time: Tensor) -> Tensor:
        loop.given["pooled_projections"] = pooled * (1 + step)
        return time

    loop.shift = moving
    want = loop(12)
    with parafuse.apply(loop, CONFIG_ON) as handle:
        assert relative_error([loop(12)], [want]) <= EXACT
        assert any("from step to step" in why for why in of(handle).why)
        assert len(of(handle)._tables) <= step_tables.MAX_TABLES


def test_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    want = loop()
    monkeypatch.setattr(modulation, "MAX_TABLE_BYTES", 1000)
    with parafuse.apply(loop, CONFIG_ON) as handle:
        assert relative_error([loop()], [want]) == 0
        assert any("GB" in why for why in of(handle).why)


def test_adapters_on_these_layers_come_and_go() -> None:
    pipeline, case = build("FluxPipeline"), cases()["FLUX.1"]
    call = case.call(1)
    with parafuse.apply(pipeline, CONFIG_ON) as handle:
        before = tensors(pipeline(**seeded(call)))
        pipeline.load_lora_weights(lora(pipeline, ["transformer"], rank=2, seed=1), adapter_name="a")
        with_lora = tensors(pipeline(**seeded(call)))
        weaker = tensors(pipeline(**seeded(call), joint_attention_kwargs={"scale": 0.5}))
        pipeline.unload_lora_weights()
        after = tensors(pipeline(**seeded(call)))
        assert of(handle).seen["as they are"] == 0
    plain = build("FluxPipeline")
    want = tensors(plain(**seeded(call)))
    plain.load_lora_weights(lora(plain, ["transformer"], rank=2, seed=1), adapter_name="a")
    assert relative_error(tensors(plain(**seeded(call))), want) > 1e-3
    assert relative_error(with_lora, tensors(plain(**seeded(call)))) <= EXACT
    assert relative_error(weaker, tensors(plain(**seeded(call), joint_attention_kwargs={"scale": 0.5}))) <= EXACT
    assert relative_error(before, want) <= EXACT
    assert relative_error(after, want) <= EXACT


def test_remove_restores_bit_for_bit() -> None:
    pipeline, case = build("FluxPipeline"), cases()["FLUX.1"]
    call = case.call(1)
    want, keys = tensors(pipeline(**seeded(call))), list(pipeline.transformer.state_dict())
    before = [(type(part), sorted(vars(part))) for part in pipeline.transformer.modules()]
    handle = parafuse.apply(pipeline, CONFIG_ON)
    pipeline(**seeded(call))
    assert list(pipeline.transformer.state_dict()) == keys
    handle.remove()
    assert [(type(part), sorted(vars(part))) for part in pipeline.transformer.modules()] == before
    assert all(torch.equal(a, b) for a, b in zip(tensors(pipeline(**seeded(call))), want, strict=True))
    assert handle.clock.on_start == []


def test_a_bare_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"modulation.*timesteps to come are not known"):
        parafuse.apply(cases()["FLUX.1"].build().transformer, CONFIG_ON)
    parafuse.apply(cases()["FLUX.1"].build().transformer, parafuse.Config(rewrites="auto")).remove()


def test_auto_says_what_it_leaves_off() -> None:
    case = cases()["HunyuanVideo"]
    pipeline, call = case.build(), case.call(1)
    with parafuse.apply(pipeline, parafuse.Config(rewrites="auto")) as handle, handle.request():
        modulation.MIN_GAIN, before = 2.0, modulation.MIN_GAIN
        try:
            pipeline(**seeded(call))
        finally:
            modulation.MIN_GAIN = before
        rewrite = of(handle)
    assert rewrite.seen["looked up"] == 0
    assert any("left off: its layers have" in line for line in rewrite.lines())


def test_blocks_compile_to_as_many_graphs_as_without() -> None:
    made = list[int]()
    for rewrites in ("", "modulation"):
        torch.compiler.reset()
        case, graphs = cases()["FLUX.1"], CompileCounter()
        pipeline, call = case.build(), case.call(1)
        want = tensors(pipeline(**seeded(call)))
        with parafuse.apply(pipeline, parafuse.Config(rewrites=rewrites)):
            pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=graphs)
            for _ in range(2):
                assert relative_error(tensors(pipeline(**seeded(call))), want) <= EXACT
        made.append(graphs.frame_count)
    assert made[0] == made[1] > 0


def compiled_on_rank() -> tuple[float, list[int], int]:
    torch.compiler.reset()
    case, graphs = cases()["FLUX.1"], CompileCounter()
    pipeline, call = case.build(), case.call(1) | dict(true_cfg_scale=1.0)
    want, made, errors = tensors(pipeline(**seeded(call))), list[int](), list[float]()
    with parafuse.apply(pipeline, CONFIG_ON) as handle:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=graphs)
        for _ in range(2):
            errors.append(relative_error(tensors(pipeline(**seeded(call))), want))
            made.append(graphs.frame_count)
        return max(errors), made, of(handle).seen["as they are"]


def test_compiled_on_two_ranks() -> None:
    for error, graphs, missed in run_ranks(compiled_on_rank, 2, timeout_s=120):
        assert error <= EXACT
        assert graphs[0] == graphs[1] > 0
        assert missed == 0


@pytest.mark.parametrize(
    ("degrees", "prompts", "cache"),
    [
        (dict(ulysses=2), 1, ""),
        (dict(cfg=2, ulysses=1), 1, ""),
        (dict(data=2, ulysses=1), 3, ""),
        (dict(cfg=2, ulysses=1), 1, "first-block:0.2"),
    ],
)
def test_on_two_ranks(degrees: dict[str, int], prompts: int, cache: str) -> None:
    steps = 6 if cache else 0
    for error, applied in run_ranks(painted, 2, "FLUX.1", "modulation", degrees, prompts, cache, steps, timeout_s=120):
        assert error <= EXACT
        assert any("looked up" in line for line in applied)


def picture(rewrites: str) -> np.ndarray:
    with parafuse.Engine.from_pretrained("emoji", parafuse.Config(rewrites=rewrites)) as engine:
        output: Any = engine(prompt="a red apple", num_inference_steps=4, seed=7)
        assert not rewrites or any("looked up" in line for line in engine.receipt["applied"])
    return np.asarray(output.images[0]).astype(int)


def test_a_picture_of_a_real_model() -> None:
    want = picture("")
    pictures = [picture("modulation"), *run_ranks(picture, 2, "modulation", timeout_s=120)]
    assert all(np.abs(found - want).max() <= 1 for found in pictures)


class Products(TorchFunctionMode):
    """Counts the linear layers that run, by weight."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self.seen[id(args[1])] += 1
        return func(*args, **(kwargs or {}))


def test_layers_that_are_looked_up_do_not_run() -> None:
    loop = Loop()
    with parafuse.apply(loop, CONFIG_ON) as handle:
        loop()
        layers = of(handle)._learned[0].layers
        with Products() as products:
            loop()
        handle.remove()
        with Products() as plain:
            loop()
    assert of_layers(products, layers) == 0
    assert of_layers(plain, layers) == 5 * len(layers)
    names = {name for name, part in loop.transformer.named_modules() if part in set(layers)}
    assert {"transformer_blocks.0.norm1.linear", "single_transformer_blocks.1.norm.linear"} <= names
    assert not any("attn" in name or "ff" in name for name in names)


def of_layers(products: Products, layers: list[nn.Linear]) -> int:
    return sum(products.seen[id(layer.weight)] for layer in layers)


def test_pipelines_that_share_a_denoiser() -> None:
    """Each with a scheduler of its own, and another schedule."""
    import diffusers

    case, found = cases()["FLUX.1"], list[list[Tensor]]()
    call = case.call(1)
    for rewrites in ("", "modulation"):
        with parafuse.Engine.from_pipeline(case.build(), parafuse.Config(rewrites=rewrites)) as engine:
            other = engine.from_pipe(diffusers.FluxPipeline)
            other.pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5)
            for one in (engine, other, engine):
                found.append(tensors(one(**seeded(call))))
                assert not rewrites or any(": 6 calls looked up" in line for line in one.receipt["applied"])
    assert relative_error(found[1], found[0]) > 1e-3
    assert all(relative_error(b, a) <= EXACT for a, b in zip(found[:3], found[3:], strict=True))


def test_inference_mode() -> None:
    loop = Loop()
    want = loop()
    with parafuse.apply(loop, CONFIG_ON) as handle:
        with torch.inference_mode():
            inside = loop()
        after = loop()
        assert of(handle).seen == {"looked up": 10}
    assert relative_error([inside], [want]) <= EXACT
    assert relative_error([after], [want]) <= EXACT
