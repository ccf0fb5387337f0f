"""Members of the pipeline on an engine in a plain process, which tells the rank that it has started."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler, FluxImg2ImgPipeline
from torch import nn

import parafuse
from parafuse.engine.surface import Part
from parafuse.errors import ConfigError, RankMismatchError
from tests.adapters import lora

CALL: dict[str, Any] = dict(num_inference_steps=2, width=64, height=64, output_type="latent")


@pytest.fixture(scope="module")
def engine() -> Iterator[parafuse.Engine]:
    config = parafuse.Config(parallel=parafuse.Parallel(ulysses=2), timeout_s=60)
    with parafuse.Engine.from_pretrained("emoji", config) as made:
        yield made


@pytest.fixture(scope="module")
def plain() -> parafuse.Engine:
    return parafuse.Engine.from_pretrained("emoji")


def latents(engine: Any, **more: Any) -> torch.Tensor:
    torch.manual_seed(0)  # some schedulers draw from torch's own generator, whose state is rank 0's on all ranks
    return engine("a red apple", seed=7, **(CALL | more)).images


def error(engine: Any, plain: Any, **more: Any) -> float:
    want = latents(plain, **more)
    return float((latents(engine, **more) - want).abs().max() / want.abs().max())


def test_a_component_stands_for_those_of_all_ranks(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    assert type(engine.vae) is Part
    assert isinstance(engine.vae, nn.Module)
    assert engine.transformer.config.num_layers == len(engine.transformer.transformer_blocks)
    assert engine.transformer.transformer_blocks[0].attn.heads == 6
    engine.vae.enable_tiling()
    engine.enable_vae_slicing()
    assert engine.pipeline.vae.use_tiling
    assert engine.pipeline.vae.use_slicing
    assert error(engine, plain) <= 1e-5  # the ranks say that their pipelines are alike
    engine.disable_vae_tiling()
    engine.disable_vae_slicing()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    channels = engine.vae.config.latent_channels
    z = z.repeat(1, -(-channels // 4), 1, 1)[:, :channels]
    assert torch.equal(engine.vae.decode(z, return_dict=False)[0], plain.vae.decode(z, return_dict=False)[0])


def test_attributes_are_set_on_all_ranks(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    before, old = latents(plain), plain.scheduler
    for one in (engine, plain):
        scheduler: Any = FlowMatchLCMScheduler.from_config(old.config)
        one.scheduler = scheduler
        one.scheduler.set_shift(2.5)
    assert error(engine, plain) <= 1e-5
    assert not torch.allclose(latents(plain), before)
    for one in (engine, plain):
        one.scheduler = old
    assert error(engine, plain) <= 1e-5


def test_adapters_and_arguments_that_are_parts(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    before = latents(plain)
    weights = lora(plain.pipeline, ["transformer"], rank=2, seed=1, every=6)
    for one in (engine, plain):
        one.load_lora_into_transformer(weights, None, one.transformer, adapter_name="a")
    assert error(engine, plain) <= 1e-5
    assert not torch.allclose(latents(plain), before)
    for one in (engine, plain):
        one.unload_lora_weights()
    assert torch.equal(latents(plain), before)
    assert error(engine, plain) <= 1e-5


def test_another_pipeline_over_the_same_components(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    start = torch.rand(
        1, 3, 1200, 1200, generator=torch.Generator().manual_seed(0)
    )  # more than the store takes at once
    assert start.nbytes > 16 << 20
    more: dict[str, Any] = dict(image=start, strength=0.9, num_inference_steps=3, negative_prompt=None)
    found = []
    for one in (engine, plain):
        with one.from_pipe(FluxImg2ImgPipeline) as other:
            found.append(latents(other, **more))
        with pytest.raises(ConfigError, match="it is closed"):
            latents(other)
    assert float((found[0] - found[1]).abs().max() / found[1].abs().max()) <= 1e-5
    assert error(engine, plain) <= 1e-5  # the first goes on


def test_many_pipelines_may_be_made_and_closed(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    """A request that no rank answers must not be taken away before all have read it."""
    for _ in range(2):
        children = [engine.from_pipe(FluxImg2ImgPipeline) for _ in range(4)]
        for child in children:
            child.close()
    assert error(engine, plain) <= 1e-5


def test_a_component_that_cannot_be_split_is_not_taken(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    kept = engine.pipeline.transformer
    with pytest.raises(parafuse.ParafuseError):
        engine.transformer = nn.Linear(2, 2)
    assert engine.pipeline.transformer is kept
    assert error(engine, plain) <= 1e-5


def test_a_component_is_replaced_under_offload(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    kept, other = plain.pipeline.transformer, copy.deepcopy(plain.pipeline.transformer)
    with torch.no_grad():
        other.proj_out.weight.mul_(1.1)
    before = latents(plain)
    engine.enable_model_cpu_offload(device="cpu")
    engine.transformer, plain.transformer = copy.deepcopy(other), other
    assert error(engine, plain) <= 1e-5
    assert not torch.allclose(latents(plain), before)
    assert "sequence parallel" in engine.receipt["applied"][0]
    engine.transformer, plain.transformer = copy.deepcopy(kept), kept
    engine.remove_all_hooks()
    assert error(engine, plain) <= 1e-5


def test_another_pipeline_leaves_dtypes_and_offload_as_they_are(
    engine: parafuse.Engine, plain: parafuse.Engine
) -> None:
    assert type(engine.vae.to(torch.bfloat16)) is Part  # calls can be chained
    engine.enable_model_cpu_offload(device="cpu")
    with engine.from_pipe(FluxImg2ImgPipeline) as other:
        assert other.vae.dtype == torch.bfloat16
        engine.vae = copy.deepcopy(plain.pipeline.vae)
        with pytest.raises(ConfigError, match="vae: is a component of another engine"):
            other.vae = engine.vae
    assert hasattr(engine.pipeline.transformer, "_hf_hook")
    engine.remove_all_hooks()
    engine.vae.to(torch.float32)


class OfThisScript:
    """As a class in the script of a user."""


def test_what_only_the_script_has_is_refused(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    OfThisScript.__module__, sys.modules["__main__"].OfThisScript = "__main__", OfThisScript  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="argument 1: OfThisScript is of the script that runs"):
        engine.scheduler = OfThisScript()
    assert error(engine, plain) <= 1e-5


def test_noise_of_a_method_is_that_of_rank_0(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    from peft import LoraConfig

    for one in (engine, plain):
        torch.manual_seed(5)  # on this rank alone
        wish = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"])
        one.transformer.add_adapter(wish, adapter_name="noise")
    assert error(engine, plain) <= 1e-5
    for one in (engine, plain):
        one.transformer.delete_adapters("noise")
        one.unload_lora_weights()


def test_what_one_rank_alone_did_is_found(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    engine.pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(RankMismatchError, match=r"transformer is .* on rank 0, .* on rank 1\. Change it on the engine"):
        latents(engine)
    engine.pipeline.transformer.unfuse_qkv_projections()
    engine.transformer.fuse_qkv_projections()
    assert error(engine, plain) <= 1e-5
    engine.transformer.unfuse_qkv_projections()
    with pytest.raises(ConfigError, match=r"FluxTransformer2DModel\.forward: was called on one rank alone"):
        engine.pipeline("a red apple", **CALL)
    assert error(engine, plain) <= 1e-5


def test_what_cannot_be_is_refused_and_the_engine_goes_on(engine: parafuse.Engine, plain: parafuse.Engine) -> None:
    with pytest.raises(AttributeError, match="FluxPipeline has no 'vea'; did you mean 'vae'"):
        engine.vea = None
    with pytest.raises(AttributeError, match="AutoencoderKL has no 'enable_tilling'; did you mean 'enable_tiling'"):
        engine.vae.enable_tilling()
    with pytest.raises(ConfigError, match="gpu_id=1: every rank has a device of its own"):
        engine.enable_model_cpu_offload(gpu_id=1)
    with pytest.raises(ConfigError, match="to: device=cuda: the ranks of this engine are on 'cpu'"):
        engine.to("cuda")
    with pytest.raises(ConfigError, match="argument 1: cannot be sent to the ranks"):
        engine.transformer.apply(lambda module: None)
    with pytest.raises(ConfigError, match=r"argument 1: has 257 MiB; at most 256 can be sent"):
        engine.encode_prompt(torch.zeros(257 << 18))
    with pytest.raises(ValueError, match="number of processors 0 does not match"):  # diffusers' own, on all ranks
        engine.vae.set_attn_processor({})
    assert error(engine, plain) <= 1e-5


def test_files_are_written_once_and_offload_comes_off(
    engine: parafuse.Engine, plain: parafuse.Engine, tmp_path: Path
) -> None:
    engine.save_pretrained(tmp_path)
    assert np.array_equal(latents(parafuse.Engine.from_pretrained(str(tmp_path)), **defaults()), latents(plain))
    engine.enable_model_cpu_offload(device="cpu")
    assert error(engine, plain) <= 1e-5
    engine.remove_all_hooks()
    assert error(engine, plain) <= 1e-5
    engine.enable_model_cpu_offload(device="cpu")  # close takes it off


def defaults() -> dict[str, Any]:
    """What the embedded model says of its calls, and a folder of diffusers does not."""
    return dict(true_cfg_scale=2.0, negative_prompt="", max_sequence_length=16)
