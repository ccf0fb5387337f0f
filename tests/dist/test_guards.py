"""Guards around sequence parallel that only a changed, wrapped or unlucky model meets."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import parafuse
from parafuse.config import Axis
from parafuse.engine.request import facts
from parafuse.engine.source import EMBEDDED
from parafuse.engine.workers import read_signed, signed
from parafuse.errors import ConfigError, RankError, UnsupportedError
from parafuse.parallel.fingerprint import fingerprint
from parafuse.parallel.mesh import make_mesh
from tests.dist.ranks import run_ranks
from tests.drop_in.rows import plain

WIDTH, HEADS = 12, 3


class Block(nn.Module):
    """Self-attention whose queries may be shifted by some tokens, which no split survives."""

    def __init__(self, shift: int = 0, *, torch_attention: bool = True):
        super().__init__()
        self.shift, self.torch_attention = shift, torch_attention
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q = q.roll(self.shift, dims=2)
        if self.torch_attention:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return x + out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, *blocks: Block):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def call(model: nn.Module) -> float | str:
    """Relative error of the split model against itself, or the refusal."""
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
        try:
            with parafuse.apply(model):
                out = model(x)
        except (ConfigError, UnsupportedError) as error:
            return str(error)
    return float((out - expected).abs().max() / expected.abs().max())


def all_cases() -> dict[str, Any]:
    shared = Block()
    compiled = Model(Block())
    compiled.blocks[0].compile()
    changed = Model(Block())
    x = torch.randn(2, 7, WIDTH)
    with torch.no_grad(), parafuse.apply(changed):
        changed(x)
        vars(changed.blocks[0])["torch_attention"] = False  # as a user's new attention processor would
        try:
            changed(x)
            after_change = "ran"
        except UnsupportedError as error:
            after_change = str(error)
    return {
        "plain": call(Model(Block(), Block())),
        "shift in the second block": call(Model(Block(), Block(shift=1))),
        "one block twice": call(Model(shared, shared)),
        "compiled": call(compiled),
        "changed": after_change,
    }


def test_changed_wrapped_and_shared_blocks() -> None:
    for seen in run_ranks(all_cases, 2):
        assert seen["plain"] <= 1e-5
        assert seen["one block twice"] <= 1e-5
        assert seen["shift in the second block"] <= 1e-5  # on whole shapes
        assert "is compiled" in str(seen["compiled"])
        assert "made 0 attention calls" in str(seen["changed"])


def group_timeouts() -> list[timedelta]:
    degrees = dict.fromkeys(Axis, 1) | {Axis.RING: 2, Axis.ULYSSES: 2}
    mesh = make_mesh(degrees, "cpu", 77.0)
    assert mesh.sequence is not None
    groups = [*mesh.groups.values(), mesh.sequence]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_the_timeout_reaches_every_group() -> None:
    for seen in run_ranks(group_timeouts, 4):
        assert seen == [timedelta(seconds=77)] * 3


def test_blocks_that_behave_differently_are_told_apart() -> None:
    assert fingerprint(Block()) == fingerprint(Block())
    assert fingerprint(Block()) != fingerprint(Block(shift=1))
    with_processor = Block()
    with_processor.processor = object()  # type: ignore[assignment]
    assert fingerprint(with_processor) != fingerprint(Block())


def test_only_signed_requests_are_read() -> None:
    text = signed({"seed": 7}, "key")
    assert read_signed(text, "key") == {"seed": 7}
    for wrong in (text[:-4] + "AAAA", "0" + text[1:] if text[0] != "0" else "1" + text[1:], text.split(" ")[1]):
        with pytest.raises(RankError, match="not signed"):
            read_signed(wrong, "key")
    with pytest.raises(RankError, match="not signed"):
        read_signed(text, "another key")


def test_a_lambda_is_refused_and_the_engine_goes_on() -> None:
    config = parafuse.Config(parallel=parafuse.Parallel(ulysses=2))
    steps: dict[str, Any] = {"num_inference_steps": 1, "width": 32, "height": 32, "seed": 1}
    with parafuse.Engine.from_pretrained("emoji", config) as engine:
        with pytest.raises(ConfigError, match="callback_on_step_end: cannot be sent"):
            engine("x", callback_on_step_end=lambda *_: {}, **steps)
        assert engine("x", **steps).images[0].size == (32, 32)
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match="closed"):
        engine("x", **steps)


def refusals_of_other_libraries() -> dict[str, str]:
    """What `apply` says of a model that carries another library's hooks, and whether it works once they are off."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules
    from diffusers import FirstBlockCacheConfig

    from tests.models import ODD, build, call, error, inputs

    values = inputs("flux", ODD)
    model: Any = build("flux")
    plain = call(model, values)
    said: dict[str, str] = {}

    def attempt(name: str) -> None:
        try:
            parafuse.apply(model).remove()
            said[name] = "accepted"
        except ConfigError as refusal:
            said[name] = str(refusal)

    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    attempt("cache")
    model.disable_cache()
    attempt("cache off")
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    attempt("group offload")
    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            for name in list(module._diffusers_hook.hooks):
                module._diffusers_hook.remove_hook(name)
    attempt("group offload off")
    cpu_offload(model, torch.device("cpu"))
    attempt("accelerate")
    remove_hook_from_submodules(model)
    with parafuse.apply(model):
        said["error"] = f"{error(call(model, values), plain):.1e}"
    return said


def test_models_under_other_libraries_hooks_are_refused_until_these_are_off() -> None:
    for said in run_ranks(refusals_of_other_libraries, 2):
        assert "carries diffusers hooks" in said["cache"]
        assert "disable_cache()" in said["cache"]
        assert said["cache off"] == "accepted"
        assert "carries diffusers hooks" in said["group offload"]
        assert said["group offload off"] == "accepted"
        assert "offloaded or placed by accelerate" in said["accelerate"]
        assert float(said["error"]) <= 1e-5


def test_an_engine_starts_after_one_that_could_not(tmp_path: Path) -> None:
    config = parafuse.Config(parallel=parafuse.Parallel(ulysses=2))
    shutil.copytree(EMBEDDED / "emoji", tmp_path / "broken")
    file = tmp_path / "broken" / "vae" / "config.json"
    file.write_text(file.read_text().replace("DownEncoderBlock2D", "NoSuchBlock"))  # seen when it is loaded
    with pytest.raises(ConfigError, match="cannot be loaded"):
        parafuse.Engine.from_pretrained(str(tmp_path / "broken"), config)
    assert not dist.is_initialized()
    with parafuse.Engine.from_pretrained("emoji", config) as engine:
        assert engine("x", num_inference_steps=1, width=32, height=32, seed=1).images[0].size == (32, 32)


def test_dtypes_by_component_reach_the_loader() -> None:
    engine = parafuse.Engine.from_pretrained("emoji", dtype={"vae": torch.bfloat16, "default": torch.float32})
    assert engine.pipeline.vae.dtype == torch.bfloat16
    assert engine.pipeline.transformer.dtype == torch.float32
    assert facts({"dtype": torch.bfloat16}) != facts({"dtype": torch.float32})


def calls_another_method(rank_method: dict[int, str]) -> str:
    """What each rank hears where they do not call the same."""
    engine = parafuse.Engine.from_pipeline(plain("FluxPipeline"), parafuse.Config(timeout_s=30))
    try:
        getattr(engine, rank_method[engine.rank])(1)
    except RankError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def test_ranks_that_call_different_methods_are_told_at_once() -> None:
    methods = {0: "enable_attention_slicing", 1: "set_attention_slice"}
    for found in run_ranks(calls_another_method, 2, methods, timeout_s=25):
        assert 'method is "enable_attention_slicing" on rank 0, "set_attention_slice" on rank 1' in found
