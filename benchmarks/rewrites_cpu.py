"""What each rewrite gains alone: models of real classes on one CPU thread, each rewrite by itself against none.

`python -m benchmarks.rewrites_cpu [name ...]`: without names, all that there are. Each case is a small pipeline of a
denoiser and a scheduler; copies of the denoiser over the same weights take turns, step by step in random order.
Medians over the steps of 4 requests after one in which things are learned; what the first step of a request takes
longer is shown apart. Also counted: attention calls with a mask, and the weights that linear layers read.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import parafuse

ROUNDS = 4


@dataclass
class Case:
    """A denoiser and what a pipeline calls it with."""

    name: str
    build: Callable[[], Any]
    given: Callable[[], dict[str, Any]]
    steps: int
    rewrites: tuple[str, ...]
    """Those that may act on it."""
    divisor: float = 1.0
    """Of the scheduler's timesteps, as the pipeline gives them."""


class Loop:
    """The least that is a pipeline: a denoiser, a scheduler, and a loop."""

    def __init__(self, case: Case, transformer: Any):
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer, self.case = transformer, case
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.given = case.given()

    def steps(self) -> Iterator[Tensor]:
        self.scheduler.set_timesteps(self.case.steps)
        given = dict(self.given)
        latents: Tensor = given.pop("hidden_states")
        for t in self.scheduler.timesteps:
            with torch.no_grad():
                timestep = t.expand(len(latents)) / self.case.divisor
                noise = self.transformer(hidden_states=latents, timestep=timestep, return_dict=False, **given)[0]
                latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
            yield latents

    def __call__(self) -> Tensor:
        return list(self.steps())[-1]


@dataclass
class Reads(TorchFunctionMode):
    """Attention calls with and without a mask, and bytes of weights that linear layers read."""

    masked: int = 0
    attentions: int = 0
    bytes: int = 0
    seen: set[int] = field(default_factory=set[int])

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is F.linear:
            weight = args[1] if len(args) > 1 else named["weight"]
            self.bytes += weight.numel() * weight.element_size()
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else named.get("attn_mask")
            self.attentions, self.masked = self.attentions + 1, self.masked + (mask is not None)
        return func(*args, **named)


def flux(layers: int, tokens: int, text: int) -> tuple[Callable[[], Any], Callable[[], dict[str, Any]]]:
    """FLUX.1's proportions, 512 wide: modulation has a quarter of the weights."""
    from diffusers import FluxTransformer2DModel

    def build() -> Any:
        return FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=layers, num_single_layers=2 * layers, attention_head_dim=64,
            num_attention_heads=8, joint_attention_dim=256, pooled_projection_dim=128, axes_dims_rope=(16, 24, 24),
        )  # fmt: skip

    def given() -> dict[str, Any]:
        return dict(
            hidden_states=torch.randn(1, tokens, 16), encoder_hidden_states=torch.randn(1, text, 256),
            pooled_projections=torch.randn(1, 128), img_ids=torch.rand(tokens, 3), txt_ids=torch.zeros(text, 3),
        )  # fmt: skip

    return build, given


def hunyuan(valid: tuple[int, ...]) -> tuple[Callable[[], Any], Callable[[], dict[str, Any]]]:
    """HunyuanVideo with 256 text tokens, of which these are valid, and 320 of video."""
    from diffusers import HunyuanVideoTransformer3DModel

    def build() -> Any:
        return HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=32, num_layers=2,
            num_single_layers=4, num_refiner_layers=2, patch_size=2, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=128, pooled_projection_dim=64, rope_axes_dim=(8, 12, 12), image_condition_type=None,
        )  # fmt: skip

    def given() -> dict[str, Any]:
        batch = len(valid)
        return dict(
            hidden_states=torch.randn(batch, 4, 5, 16, 16), encoder_hidden_states=torch.randn(batch, 256, 128),
            encoder_attention_mask=(torch.arange(256) < torch.tensor(valid)[:, None]).long(),
            pooled_projections=torch.randn(batch, 64), guidance=torch.full((batch,), 6000.0),
        )  # fmt: skip

    return build, given


def cases() -> list[Case]:
    return [
        Case("HunyuanVideo, 20 of 256 text tokens", *hunyuan((20,)), steps=6, rewrites=("text", "modulation")),
        Case("HunyuanVideo, 20 and 60 of 256", *hunyuan((20, 60)), steps=6, rewrites=("text",)),
        Case("FLUX, 16 + 8 tokens", *flux(2, 16, 8), steps=28, rewrites=("modulation", "qkv", "rope"), divisor=1000),
        Case("FLUX, 64 + 32 tokens", *flux(2, 64, 32), steps=28, rewrites=("modulation", "qkv", "rope"), divisor=1000),
        Case("FLUX, 256 + 64 tokens", *flux(2, 256, 64), steps=8, rewrites=("modulation", "qkv", "rope"), divisor=1000),
    ]


def copy_of(model: Any) -> Any:
    """Another module over the same weights."""
    with torch.device("meta"):
        other = type(model).from_config(model.config).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    for (_, mine), (_, theirs) in zip(other.named_buffers(), model.named_buffers(), strict=True):
        mine.data = theirs.data
    return other


def measured(case: Case, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = case.build().eval().requires_grad_(False)
    ways = ("none", *names)
    with ExitStack() as stack:
        loops: dict[str, Loop] = {}
        handles: dict[str, Any] = {}
        for way in ways:
            torch.manual_seed(1)
            loops[way] = Loop(case, copy_of(model))
            if way != "none":
                handles[way] = stack.enter_context(parafuse.apply(loops[way], parafuse.Config(rewrites=way)))
        times: dict[str, list[float]] = {way: [] for way in ways}
        firsts: dict[str, list[float]] = {way: [] for way in ways}
        found: dict[str, Tensor] = {}
        for turn in range(1 + ROUNDS):
            running = {way: loops[way].steps() for way in ways}
            for step in range(case.steps):
                for way in random.sample(ways, len(ways)):
                    began = time.perf_counter()
                    found[way] = next(running[way])
                    seconds = time.perf_counter() - began
                    if turn:
                        (times if step else firsts)[way].append(seconds)
            for one in running.values():
                list(one)
        plain = statistics.median(times["none"])
        for way in ways:
            with Reads() as reads:
                last = loops[way]()
            if way != "none" and not torch.equal(last, found[way]):
                raise SystemExit(f"{way}: two requests differ")
            error = float((found[way] - found["none"]).abs().max() / found["none"].abs().max())
            middle = statistics.median(times[way])
            first = 1000 * (statistics.median(firsts[way]) - middle)
            read = reads.bytes / case.steps / 1e6
            print(
                f"{case.name:36} {way:11} {1000 * middle:8.2f} ms a step, x{plain / middle:.3f}, "
                f"first {first:+.2f} ms, error {error:.0e}, {read:7.2f} MB of weights a step in linear layers, "
                f"{reads.masked} of {reads.attentions} attentions with a mask"
            )
        for way, handle in handles.items():
            with handle.request():
                loops[way]()
            print("   ", *[line for line in handle.applied if "rewrite" in line])


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    asked = tuple(sys.argv[1:])
    for case in cases():
        names = [name for name in case.rewrites if not asked or name in asked]
        there: list[str] = []
        for name in names:
            try:
                parafuse.apply(Loop(case, case.build()), parafuse.Config(rewrites=name)).remove()
                there.append(name)
            except ValueError as refusal:  # ConfigError is one
                print(f"{case.name:36} {name:11} {refusal}")
        if there:
            measured(case, tuple(there))


if __name__ == "__main__":
    main()
