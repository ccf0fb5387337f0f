"""One option of `Config` in one setting, against one rank with nothing on but what loses something."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache as cached
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import parafuse
from parafuse.errors import ParafuseError
from parafuse.parallel import tiers
from tests import adapters
from tests.dist.ranks import RankFailure, run_ranks
from tests.guided import flux, hunyuan, sd3, sdxl, wan
from tests.guided.parts import legible, made, rows
from tests.zoo.collect import randomized
from tests.zoo.hunyuan import VIDEO
from tests.zoo.sd3 import SD3
from tests.zoo.wan import WAN

EXACT = 1e-5
STEPS = 4


@dataclass(frozen=True)
class Option:
    """What is asked for."""

    config: dict[str, Any]
    is_exact: bool = False
    """Whether the picture is to be what it is without it; otherwise: what one rank gives with it."""
    rounds: bool = False
    """Whether it rounds what layers are given, so that another order of sums may show (docs/quantize.md)."""


@dataclass(frozen=True)
class Setting:
    """What it stands beside."""

    ranks: int = 1
    parallel: dict[str, int] = field(default_factory=dict[str, int])
    cache: str | None = None
    lora: bool = False
    offload: str = ""


@dataclass
class Cell:
    """What came of it."""

    error: float | None = None
    """Largest difference over the largest value, of the worst rank; None where it was refused."""
    limit: float = EXACT
    refused: str = ""
    failed: str = ""
    applied: list[str] = field(default_factory=list[str])
    idle: str = ""
    """What a rewrite says that has nothing to do in this pipeline."""

    @property
    def fault(self) -> str:
        if self.failed:
            return self.failed
        if self.error is not None and not self.error <= self.limit:
            return f"{self.error:.1e}, allowed {self.limit:.1e}"
        return ""


SPARSE_ACTS = r"sparse attention .*: [1-9]\d* sparse calls"
SPARSE = "window:0,0,1,tile=1x1x2,dense_steps=1,dense_layers=0"
OFFLOAD = "group:to=disk"
FOLDER = str(Path(tempfile.gettempdir()) / "parafuse-options")
OPTIONS: dict[str, Option] = {
    "fp8": Option({"quantize": "fp8:reference=true,min_features=16"}, rounds=True),
    "fp8-weight": Option({"quantize": "fp8-weight:min_features=8"}),
    "int8": Option({"quantize": "int8:min_features=8,text_encoders=int8-weight"}, rounds=True),
    "int8-weight": Option({"quantize": "int8-weight:min_features=8"}),
    "compile": Option({"compile": True}, is_exact=True),
    "int8-weight and compile": Option({"quantize": "int8-weight:min_features=8", "compile": True}),
    "rewrites qkv": Option({"rewrites": "qkv"}, is_exact=True),
    "rewrites text": Option({"rewrites": "text"}, is_exact=True),
    "rewrites modulation": Option({"rewrites": "modulation"}, is_exact=True),
    "rewrites rope and compile": Option({"rewrites": "rope", "compile": True}, is_exact=True),
    "attention math": Option({"attention": "math"}, is_exact=True),
    "sparse": Option({"sparse": SPARSE}),
    "sparse and compile": Option({"sparse": SPARSE, "compile": True}),
    "offload group": Option({"offload": OFFLOAD}, is_exact=True),
    "offload model": Option({"offload": "model:to=disk"}, is_exact=True),
    "offload and compile": Option({"offload": OFFLOAD, "compile": True}, is_exact=True),
    "offload, quantize and compile": Option(
        {"offload": OFFLOAD, "quantize": "int8-weight:min_features=8", "compile": True},
    ),
    "offload and first-block cache": Option({"offload": OFFLOAD, "cache": "first-block:0.2"}),
    "placement on a disk": Option({"placement": {"": "disk"}, "offload_folder": FOLDER}, is_exact=True),
    "text encoders on one rank": Option({"text_encoders": "one-rank:kept=4"}, is_exact=True),
    "all of them": Option(
        {"quantize": "int8-weight:min_features=8", "compile": True, "rewrites": "modulation,rope"},
    ),
}
SETTINGS: dict[str, Setting] = {
    "one rank": Setting(),
    "Ulysses 2": Setting(2, {"ulysses": 2}),
    "ring 2": Setting(2, {"ring": 2}),
    "cfg 2": Setting(2, {"cfg": 2}),
    "data 2": Setting(2, {"data": 2}),
    "cache of stacks": Setting(cache="interval:2,warmup_steps=1,final_steps=0"),
    "cache of parts": Setting(cache="fora:2,warmup_steps=1,final_steps=0"),
    "LoRA": Setting(lora=True),
    "model offload": Setting(offload="model"),
    "group offload": Setting(offload="group"),
    "Ulysses 2, cache, LoRA": Setting(2, {"ulysses": 2}, cache="interval:2,warmup_steps=1,final_steps=0", lora=True),
}


ACTS = {
    "qkv": r"one product in [1-9]",
    "text": r"calls cut",
    "modulation": r"calls looked up",
    "rope": r"rope .*: ([1-9]\d* of|graphs are from torch's cache)",
}
"""What `applied` says of a rewrite that did something."""
NOTHING_TO_DO = {
    "text": ("Stable Diffusion XL",),  # it is called without a mask of its text
    "rope": ("Stable Diffusion 3", "Wan 2.1", "Stable Diffusion XL", "HunyuanVideo"),  # none, or on each stream
}


def _wider(pipeline: Any, name: str, config: dict[str, Any], **changes: Any) -> Any:
    """The same with a denoiser whose layers are multiples of 16 wide, as fp8 asks for."""
    model = made(name, config, **changes).eval().requires_grad_(False)
    pipeline.register_modules(transformer=randomized(model))
    return pipeline


def _padded(count: int) -> dict[str, Any]:
    """HunyuanVideo with prompts of about 20 and 10 tokens, padded to 40."""
    return hunyuan.call(count) | dict(
        prompt_embeds=rows(count, 40, 16, seed=1),
        prompt_attention_mask=legible(count, 40, missing=20),
        negative_prompt_embeds=rows(count, 40, 16, seed=3),
        negative_prompt_attention_mask=legible(count, 40, missing=30),
    )


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]], str]] = {
    "FLUX.1": (lambda: flux.build("FluxPipeline"), flux.call, "transformer"),
    "Stable Diffusion 3": (
        lambda: _wider(
            sd3.build(),
            "SD3Transformer2DModel",
            SD3,
            pooled_projection_dim=24,
            attention_head_dim=16,
            caption_projection_dim=48,
        ),
        sd3.call,
        "transformer",
    ),
    "Wan 2.1": (
        lambda: _wider(wan.build(), "WanTransformer3DModel", WAN, num_attention_heads=4, text_dim=32),
        wan.call,
        "transformer",
    ),
    "Stable Diffusion XL": (sdxl.build, sdxl.call_text, "unet"),
    "HunyuanVideo": (
        lambda: _wider(
            hunyuan.build(),
            "HunyuanVideoTransformer3DModel",
            VIDEO,
            attention_head_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        _padded,
        "transformer",
    ),
}


def painted(
    pipeline: str, config: dict[str, Any], setting: Setting, backend: str = "inductor"
) -> tuple[Tensor, list[str]]:
    """(latents of two prompts, what was applied), as one rank sees it."""
    build, call, denoiser = PIPELINES[pipeline]
    torch.compiler.reset()
    made = build()
    asked: dict[str, Any] = {
        "cache": setting.cache
    } | config  # an option that is a cache stands in the place of the setting's
    options = parafuse.Config(parallel=parafuse.Parallel(**setting.parallel), **asked)
    if setting.lora:
        made.load_lora_weights(adapters.lora(made, (denoiser,), rank=3, seed=1, every=2), adapter_name="a")
    with mock.patch.object(tiers, "BACKEND", backend), parafuse.Engine.from_pipeline(made, options) as engine:
        part, here = getattr(engine, denoiser), torch.device("cpu")
        if setting.offload == "model":
            engine.enable_model_cpu_offload(device="cpu")
        elif setting.offload == "group":
            part.enable_group_offload(onload_device=here, offload_device=here, offload_type="leaf_level")
        values = call(2) | {"num_inference_steps": STEPS}
        output = engine(**values, seed=[3, 4])
        latents: Tensor = output.frames if hasattr(output, "frames") else output.images
        engine(**values, seed=[3, 4])  # nothing of the first request is in the second one's way
        return latents.detach().clone(), engine.receipt["applied"]


@cached
def alone(pipeline: str, texts: tuple[tuple[str, Any], ...], cache: str | None, lora: bool) -> Tensor:
    """What one rank gives with no more than what loses something."""
    return painted(pipeline, dict(texts), Setting(cache=cache, lora=lora))[0]


def cell_of(pipeline: str, option: Option, setting: Setting, backend: str = "inductor") -> Cell:
    """The worst that ranks see. `backend`: what compiles, where that is asked for."""
    lossy = tuple((name, value) for name, value in option.config.items() if name in ("quantize", "sparse", "cache"))
    try:
        want = alone(pipeline, lossy, setting.cache, setting.lora)
        exact = alone(pipeline, (), setting.cache, setting.lora)
        found = run_ranks(_tried, setting.ranks, pipeline, option.config, setting, backend, timeout_s=300)
    except ParafuseError as refusal:
        return Cell(refused=f"{type(refusal).__name__}: {refusal}")
    except RankFailure as failure:
        return Cell(failed=str(failure).splitlines()[0][:200])
    refusals = {one for one in found if isinstance(one, str)}
    if refusals:
        same = len(refusals) == 1 and all(isinstance(one, str) for one in found)
        return Cell(refused=refusals.pop()) if same else Cell(failed="one rank refuses, another does not")
    cell = Cell(error=max(_off(one[0], want) for one in found), applied=found[0][1])
    changes_graph = option.config.get("compile") or option.config.get("rewrites")
    is_reordered = setting.parallel or setting.lora or changes_graph
    if option.rounds and is_reordered:
        cell.limit = max(EXACT, _off(want, exact))
    cell.failed = next(filter(None, (_idle(option.config, lines) for _, lines in found)), "")
    for name in filter(None, option.config.get("rewrites", "").split(",")):
        said = [line for _, lines in found for line in lines if line.startswith(f"rewrite {name} ")]
        if any(re.search(ACTS[name], line) for line in said):  # a rank may find what another has compiled
            continue
        if pipeline in NOTHING_TO_DO.get(name, ()):
            cell.idle = next(iter(said), f"rewrite {name}: nothing")
        else:
            cell.failed = f"rewrite {name} did nothing: {'; '.join(said)}"
    return cell


def _idle(config: dict[str, Any], applied: list[str]) -> str:
    """What was asked for and did nothing."""
    if "sparse" in config and not any(
        re.search(r"sparse attention .*: [1-9]\d* sparse calls", line) for line in applied
    ):
        return f"sparse attention did nothing: {'; '.join(applied)}"
    starts = {"offload": "offload ", "placement": "placement: weights on disk", "text_encoders": "text_encoder"}
    for name in starts.keys() & config.keys():
        if not any(line.startswith(starts[name]) for line in applied):
            return f"{name} did nothing: {'; '.join(applied)}"
    wanted = config.get("attention", "")
    if wanted and not any(re.search(rf"attention on .*: {wanted} in [1-9]", line) for line in applied):
        return f"attention {wanted} did nothing: {'; '.join(applied)}"
    return ""


def _tried(pipeline: str, config: dict[str, Any], setting: Setting, backend: str) -> tuple[Tensor, list[str]] | str:
    try:
        return painted(pipeline, config, setting, backend)
    except ParafuseError as refusal:
        return f"{type(refusal).__name__}: {refusal}"


def _off(found: Tensor, want: Tensor) -> float:
    if found.shape != want.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - want).abs().max() / want.abs().max())
