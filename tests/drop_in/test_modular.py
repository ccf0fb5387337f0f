"""Modular pipelines: guiders, parts of the blocks, states; components that pipelines share, and a manager of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import parafuse
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import EXACT, attempt
from tests.guided import modular
from tests.models import ODD, build, call, error, inputs

MID = "mid_block.attentions.0.transformer_blocks"


def config(**degrees: int) -> parafuse.Config:
    return parafuse.Config(parallel=parafuse.Parallel(**{"ulysses": 1, **degrees}))


def seeded() -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(5)}


def skipped(fqn: str, **what: bool) -> diffusers.LayerSkipConfig:
    return diffusers.LayerSkipConfig(indices=[0], fqn=fqn, **what)


SKIP: dict[str, Any] = dict(skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
SCORES: dict[str, Any] = dict(skip_attention=False, skip_attention_scores=True, skip_ff=False)
GUIDERS: dict[str, Callable[[str], Any]] = {
    "classifier-free": lambda _: diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
    "ends early": lambda _: diffusers.ClassifierFreeGuidance(guidance_scale=5.0, stop=0.7),
    "zero star": lambda _: diffusers.ClassifierFreeZeroStarGuidance(),
    "tangential": lambda _: diffusers.TangentialClassifierFreeGuidance(),
    "projected": lambda _: diffusers.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
    "projected, mixed": lambda _: diffusers.AdaptiveProjectedMixGuidance(),
    "skipped layer": lambda fqn: diffusers.SkipLayerGuidance(skip_layer_config=skipped(fqn), **SKIP),
    "auto": lambda fqn: diffusers.AutoGuidance(auto_guidance_config=skipped(fqn, skip_attention=False)),
    "smoothed energy": lambda fqn: diffusers.SmoothedEnergyGuidance(
        seg_guidance_config=diffusers.SmoothedEnergyGuidanceConfig(indices=[0], fqn=fqn)
    ),
    "perturbed attention": lambda fqn: diffusers.PerturbedAttentionGuidance(
        perturbed_guidance_config=skipped(fqn, **SCORES), perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    ),
}
FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]], str]] = {
    "sdxl": (modular.build, modular.call, MID),
    "wan": (modular.build_wan, modular.call_wan, "blocks"),
}
NOT_PLAIN = {
    ("wan", "perturbed attention"): "its attention processor is not registered with diffusers",
    ("sdxl", "auto"): "diffusers asks for the unconditional embeddings of a step that has none",
    ("sdxl", "smoothed energy"): "its query projections are no plain linear layers of tokens in a square",
}
"""What plain diffusers fails in, with these models."""


FEWER = ("classifier-free", "projected", "skipped layer")
"""What differs in what it asks of a batch that is cut."""


def with_guiders(family: str, degrees: dict[str, int]) -> dict[str, tuple[float, list[str], float]]:
    """Guider -> (error, reports, how far it is from classifier-free guidance)."""
    logging.disable(logging.ERROR)
    make, ask, fqn = FAMILIES[family]
    pipeline, found = make(), dict[str, tuple[float, list[str], float]]()
    base: Tensor | None = None
    for name, guider in GUIDERS.items():
        if (family, name) in NOT_PLAIN or (degrees.get("data") and name not in FEWER):
            continue
        values = ask(2 if degrees.get("data") else 1)
        pipeline.update_components(guider=guider(fqn))
        want = pipeline(**values, **seeded())
        base = want if base is None else base
        assert base is not None
        pipeline.update_components(guider=guider(fqn))
        with parafuse.apply(pipeline, config(**degrees)) as handle:
            got = error(pipeline(**values, **seeded()), want)
            reports = [one.report() for one in handle.guidance.values()]
            assert any(count.calls for count in handle.exchanged().values()) == (dist.get_world_size() > 1)
        found[name] = (got, reports, error(base, want))
    logging.disable(logging.NOTSET)
    return found


@pytest.mark.parametrize(
    ("family", "degrees"),
    [("sdxl", {"cfg": 2}), ("wan", {"cfg": 2}), ("wan", {"ulysses": 2}), ("sdxl", {"data": 2})],
)
def test_every_guider_gives_what_one_rank_gives(family: str, degrees: dict[str, int]) -> None:
    for found in run_ranks(with_guiders, 2, family, degrees):
        left_out = sum(where == family for where, _ in NOT_PLAIN)
        assert len(found) == (len(FEWER) if "data" in degrees else len(GUIDERS) - left_out)
        for name, (wrong, reports, apart) in found.items():
            assert wrong <= EXACT, name
            assert all("side by side" in report for report in reports), name
            assert name == "classifier-free" or apart > 1e-3, name


def hooked(axes: dict[str, int]) -> list[float]:
    """Errors without a hook that blurs queries over tokens, with it, and without it again; what it does."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook as put_on

    def hook(model: Any) -> None:
        put_on(model, diffusers.SmoothedEnergyGuidanceConfig(indices=[0], fqn="blocks"), 9999999.0, name="blur")

    model, values = build("wan"), inputs("wan", ODD)
    base = call(model, values)
    hook(model)
    want = call(model, values)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.remove_hook("blur", recurse=True)
    with parafuse.apply(model, config(**axes)):
        found = [error(call(model, values), base)]
        hook(model)
        found.append(error(call(model, values), want))
        registry.remove_hook("blur", recurse=True)
        found.append(error(call(model, values), base))
    return [*found, error(base, want)]


def test_a_hook_that_comes_to_a_block_that_is_known_is_seen() -> None:
    for *wrong, effect in run_ranks(hooked, 2, {"ring": 2}):
        assert max(wrong) <= EXACT
        assert effect > 1e-2


def in_parts() -> dict[str, Any]:
    """Text, denoising and decoding apart, with states passed between; applied, and as engines."""
    logging.disable(logging.ERROR)
    values = modular.call(1)
    del values["output"], values["output_type"]
    found: dict[str, Any] = {}

    def parts(pipeline: Any) -> tuple[Any, Any, Any]:
        blocks, components = modular.diffusers.StableDiffusionXLAutoBlocks(), pipeline.components
        modular._hush(blocks)
        text = blocks.sub_blocks.pop("text_encoder").init_pipeline()
        decode = blocks.sub_blocks.pop("decode").init_pipeline()
        rest = blocks.get_execution_blocks(prompt_embeds=True).init_pipeline()
        for one in (text, decode, rest):
            one.update_components(**{name: components[name] for name in one.components if name in components})
        return text, rest, decode

    def run(text: Any, rest: Any, decode: Any) -> list[Tensor]:
        state = text(prompt=values["prompt"], negative_prompt=values["negative_prompt"])
        sizes = {name: values[name] for name in ("height", "width", "num_inference_steps")}
        state = rest(state=state, **sizes, **seeded())
        again = rest(state=state, **seeded())
        return [state.values["latents"], again.latents, decode(state=state, output="images", output_type="pt")]

    text, rest, decode = parts(modular.build())
    want = run(text, rest, decode)
    with parafuse.apply(rest, config(cfg=dist.get_world_size())) as handle:
        got = run(text, rest, decode)
        found["applied"] = [error(x, y) for x, y in zip(got, want, strict=True)]
        found["report"] = [one.report() for one in handle.guidance.values()]
    found["removed"] = all(map(torch.equal, run(text, rest, decode), want))
    engines = [parafuse.Engine.from_pipeline(one, config(cfg=dist.get_world_size())) for one in (text, rest, decode)]
    found["engines"] = [error(x, y) for x, y in zip(run(*engines), want, strict=True)]
    engine = engines[1]
    found["receipt"] = engine.receipt
    state = text(prompt=values["prompt"], negative_prompt=values["negative_prompt"])
    sizes = {name: values[name] for name in ("height", "width", "num_inference_steps")}
    whole = engine(state, seed=5, **sizes)
    found["seed"] = error(engine(state, "latents", seed=5, **sizes), whole.latents)
    found["as plain"] = error(whole.latents, want[0])
    found["list"] = sorted(engine(state=state, output=["latents", "timesteps"], seed=5, **sizes))
    found["going on"] = error(engine(state=whole, output="latents"), rest(state=whole, output="latents"))
    found["wrong"] = attempt(lambda: engine(state=state, num_inference_steps=0))
    if dist.get_rank() == 1:
        state.values["prompt_embeds"] = state.values["prompt_embeds"] + 1
    found["apart"] = attempt(lambda: engine(state=state, seed=5, **sizes))
    for one in reversed(engines):
        one.close()
    logging.disable(logging.NOTSET)
    return found


def test_parts_of_the_blocks_and_states() -> None:
    for ranks in (1, 2):
        for found in run_ranks(in_parts, ranks):
            assert max(*found["applied"], *found["engines"], found["as plain"]) <= (EXACT if ranks > 1 else 0.0)
            assert found["removed"]
            assert (found["seed"], found["going on"]) == (0.0, 0.0)
            assert found["list"] == ["latents", "timesteps"]
            assert "num_inference_steps=0" in found["wrong"]
            assert ranks == 1 or "side by side in" in found["report"][0]
            assert ranks == 1 or found["receipt"]["guidance"]["unet"].startswith("branches side by side")
            assert found["receipt"]["call"]["state"] == "<PipelineState>"
            assert ranks == 1 or "was given a request other than rank 0's: state" in found["apart"]
