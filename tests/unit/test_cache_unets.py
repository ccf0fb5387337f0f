"""Caches on UNets: a step that is skipped with unchanged inputs gives what it would have given, on every kind of UNet
that has levels of resnets, also beside ControlNet's and T2I adapters' residuals; the others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import parafuse
from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.skipping import Twin
from parafuse.engine.caches.units import Levels
from parafuse.errors import ConfigError
from tests.zoo.collect import randomized

Made = tuple[nn.Module, dict[str, Any]]
SMALL: dict[str, Any] = dict(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8, sample_size=16)
TEXT_TIME: dict[str, Any] = dict(
    transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=8, projection_class_embeddings_input_dim=60,
)  # fmt: skip
KANDINSKY: dict[str, Any] = dict(
    out_channels=8, addition_embed_type="image", encoder_hid_dim=8, encoder_hid_dim_type="image_proj",
    mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift", attention_head_dim=4,
)  # fmt: skip
CACHES = (
    "deepcache:2",
    "deepcache:2,branch=1",
    "first-block:9",
    "interval:2,first_blocks=0",
    "mask:110,first_blocks=2",
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(name: str, down: tuple[str, ...], up: tuple[str, ...], **config: Any) -> nn.Module:
    kind = getattr(diffusers, name)
    return randomized(kind(down_block_types=down, up_block_types=up, **(SMALL | config)).eval().requires_grad_(False))


def stable_diffusion() -> Made:
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    model = made("UNet2DConditionModel", down, up, layers_per_block=2, attention_head_dim=2)
    return model, dict(sample=noise(2, 4, 16, 24), encoder_hidden_states=noise(2, 7, 8, seed=1))


def sdxl() -> Made:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    model = made("UNet2DConditionModel", down, up, layers_per_block=2, attention_head_dim=2, **TEXT_TIME)
    more = dict(text_embeds=noise(2, 12, seed=2), time_ids=noise(2, 6, seed=3))
    inputs = dict(sample=noise(2, 4, 16, 24), encoder_hidden_states=noise(2, 7, 8, seed=1), added_cond_kwargs=more)
    return model, inputs


def controlled() -> Made:
    model: Any
    model, inputs = stable_diffusion()
    control: Any = randomized(diffusers.ControlNetModel.from_unet(model).eval())
    residuals, middle = control(
        inputs["sample"], 500, inputs["encoder_hidden_states"], controlnet_cond=noise(2, 3, 128, 192), return_dict=False
    )
    return model, inputs | dict(down_block_additional_residuals=tuple(residuals), mid_block_additional_residual=middle)


def adapted() -> Made:
    """The adapter's residuals are added to the streams in place."""
    model, inputs = stable_diffusion()
    adapter: Any = diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=8)
    features = randomized(adapter.eval())(noise(2, 3, 128, 192, seed=5))
    return model, inputs | dict(down_intrablock_additional_residuals=list(features))


def video() -> Made:
    down, up = ("CrossAttnDownBlock3D", "DownBlock3D"), ("UpBlock3D", "CrossAttnUpBlock3D")
    model = made("UNet3DConditionModel", down, up, layers_per_block=2, attention_head_dim=2)
    return model, dict(sample=noise(2, 4, 3, 16, 16), encoder_hidden_states=noise(2, 7, 8, seed=1))


def motion() -> Made:
    down, up = ("CrossAttnDownBlockMotion", "DownBlockMotion"), ("UpBlockMotion", "CrossAttnUpBlockMotion")
    model = made("UNetMotionModel", down, up, num_attention_heads=2, motion_num_attention_heads=2)
    return model, dict(sample=noise(2, 4, 3, 16, 16), encoder_hidden_states=noise(6, 7, 8, seed=1))


def stable_video() -> Made:
    down = ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")
    up = ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")
    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), down_block_types=down, up_block_types=up, cross_attention_dim=32, sample_size=16,
        num_attention_heads=8, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
    )  # fmt: skip
    inputs = dict(sample=noise(2, 3, 8, 16, 16), encoder_hidden_states=noise(2, 1, 32, seed=1))
    return randomized(model.eval().requires_grad_(False)), inputs | dict(added_time_ids=noise(2, 3, seed=2))


def kandinsky() -> Made:
    down, up = (
        ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    model = made("UNet2DConditionModel", down, up, layers_per_block=1, **KANDINSKY)
    more = dict(image_embeds=noise(2, 8, seed=3))
    return model, dict(sample=noise(2, 4, 16, 16), encoder_hidden_states=None, added_cond_kwargs=more)


UNETS: list[Callable[[], Made]] = [
    stable_diffusion, sdxl, controlled, adapted, video, motion, stable_video, kandinsky,
]  # fmt: skip


def call(model: nn.Module, inputs: dict[str, Any], scale: float) -> Tensor:
    """On latents that differ by a factor; nothing that is given is shared with another call."""
    mine = tree_map_only(Tensor, lambda x: x.clone(), inputs)
    return model(**mine | {"sample": mine["sample"] * scale}, timestep=torch.tensor(500), return_dict=False)[0]


def skipped_against_computed(make: Callable[[], Made], cache: str) -> tuple[list[str], float, float]:
    """(decisions, error of the skipped step on the same latents, difference that other latents make)."""
    with torch.no_grad(), patch.object(Clock, "counts", True):
        model, inputs = make()
        want, other = call(model, inputs, 1.0), call(model, inputs, 1.2)
        handle = parafuse.apply(model, parafuse.Config(cache=f"{cache},warmup_steps=2,final_steps=0"))
        got: list[Tensor] = []
        with handle, handle.request() as memories:
            for handle.clock.step, scale in enumerate((1.2, 1.0, 1.0)):
                got.append(call(model, inputs, scale))
            decisions = next(iter(memories.values())).decisions.values()
    letters = ["".join("s" if one.skipped else "c" for one in samples.values()) for samples in decisions]
    size = want.abs().max()
    return letters, float((got[-1] - want).abs().max() / size), float((other - want).abs().max() / size)


@pytest.mark.parametrize("make", UNETS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("cache", CACHES)
def test_a_skipped_step_reproduces_the_computed_one(make: Callable[[], Made], cache: str) -> None:
    letters, error, difference = skipped_against_computed(make, cache)
    assert letters == ["cc", "cc", "ss"]
    assert error <= 1e-5
    assert difference > 1e-3  # what is reused is not what another step gave


def test_without_its_safeguard_an_adapter_fails() -> None:
    """Negative control: streams that are left out as they are, where the model adds to them in place."""
    with patch.object(Twin, "lent", staticmethod(lambda x: x)), pytest.raises(RuntimeError, match="written-to tensor"):
        skipped_against_computed(adapted, "deepcache:2")


@pytest.mark.parametrize(("branch", "layers"), [(0, 1), (1, 2), (3, 4), (5, None)])
def test_deepcache_runs_the_outermost_layers_only(branch: int, layers: int | None) -> None:
    """Of the way down `branch` resnets and downsamplers, of the way up one resnet more."""
    with torch.no_grad(), patch.object(Clock, "counts", True):
        model: Any
        model, inputs = stable_diffusion()
        config = parafuse.Config(cache=f"deepcache:2,branch={branch},warmup_steps=2,final_steps=0")
        if layers is None:
            with pytest.raises(ConfigError, match="has layers to skip beside 4 leading ones at most; 5 are asked for"):
                parafuse.apply(model, config)
            return
        runs: list[nn.Module] = []
        down = [unit for block in model.down_blocks for unit in (*block.resnets, *(block.downsamplers or ()))]
        up = [unit for block in model.up_blocks for unit in block.resnets]
        for unit in (*down, *up):  # of resnets and downsamplers, what they are made of
            (unit.conv1 if hasattr(unit, "conv1") else unit.conv).register_forward_hook(
                lambda *_, unit=unit: runs.append(unit)
            )
        with parafuse.apply(model, config) as handle, handle.request():
            for handle.clock.step in range(3):
                runs.clear()
                call(model, inputs, 1.0)
        assert runs == [*down[:branch], *up[len(up) - layers :]]


@pytest.mark.parametrize(
    ("cache", "fault"),
    [
        ("teacache:0.1", "is a unet, which can have first-block, deepcache, interval, mask"),
        ("interval:2,last_blocks=1", "has no last blocks to choose"),
        ("first-block:0.1,first_blocks=9", "has layers to skip beside 4 leading ones at most; 9 are asked for"),
    ],
)
def test_what_a_unet_cannot_have_is_refused(cache: str, fault: str) -> None:
    model, _ = stable_diffusion()
    with pytest.raises(ConfigError, match=fault):
        parafuse.apply(model, parafuse.Config(cache=cache))
    assert "forward" not in vars(model)


def test_other_unets_are_refused_by_what_can_have_a_cache() -> None:
    model = diffusers.Kandinsky3UNet(
        time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3, block_out_channels=(32, 64),
        cross_attention_dim=4, encoder_hid_dim=32,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"no down_blocks and up_blocks of resnets .* UNet3DConditionModel"):
        parafuse.apply(model, parafuse.Config(cache="deepcache:3"))
    assert Levels(stable_diffusion()[0]).kind == "unet"
