"""Ranks that know different things choose one layout; what is loaded is followed without being touched."""

from __future__ import annotations

import dataclasses
import os
import time
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import nn

import parafuse
from parafuse.config import Config, Parallel
from parafuse.engine.engine import Engine
from parafuse.engine.memory.fake_pipeline import fake_mode
from parafuse.engine.planning import choose as choosing
from parafuse.engine.planning.choose import choose, choose_together, facts_of, fixed_of, plans, refusal_of
from parafuse.engine.planning.cost import Candidate
from parafuse.engine.planning.facts import DENOISE, Facts
from parafuse.engine.planning.follow import without_memory
from parafuse.engine.source import locate, source_of
from parafuse.errors import ConfigError, ModelError
from tests.dist.ranks import run_ranks
from tests.dist.test_sequence import attempt
from tests.planning.models import facts, guided, machine

CPU = ("cpu", "float32")
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}


def _chosen(found: Any) -> tuple[Parallel, str]:
    with patch.object(choosing, "facts_of", found):
        chosen = choose_together(Config(), locate("emoji"), 2, CPU, alone=False)
    return chosen.config.parallel, chosen.why


def _differently() -> tuple[Parallel, str]:
    """Rank 0 knows of guidance, which rank 1 does not."""
    return _chosen(lambda *_, **__: guided() if os.environ["RANK"] == "0" else facts())


def test_rank_0_decides_for_all() -> None:
    first, second = run_ranks(_differently, 2)
    assert first == second
    assert first[0] == Parallel(cfg=2, ulysses=1)
    assert "chosen by cost" in first[1]


def test_what_rank_0_refuses_all_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_ranks(_refused, 2)
    assert first == second == "ConfigError: model='emoji': its files are odd"


def _refused() -> str:
    def search(*_: object, **__: object) -> Any:
        raise ConfigError("model='emoji': its files are odd")

    with patch.object(choosing, "search", search), patch.object(choosing, "facts_of", lambda *_, **__: guided()):
        return attempt(partial(choose_together, alone=False), Config(), locate("emoji"), 2, CPU)


def _on_shared_components() -> tuple[dict[str, int], float]:
    """A second pipeline over components that a first one has been put on: nothing is followed for it."""
    from diffusers import FluxImg2ImgPipeline

    pipeline = Engine.from_pretrained("emoji", alone=True).pipeline
    first = parafuse.apply(pipeline, Config(parallel=Parallel(ulysses=2)))
    other = FluxImg2ImgPipeline.from_pipe(pipeline)
    begun = time.monotonic()
    with patch.object(choosing, "facts_of", None):
        second = parafuse.apply(other)
    degrees = {str(axis): group.size() for axis, group in second.mesh.groups.items()} if second.mesh else {}
    second.remove()
    first.remove()
    return degrees, time.monotonic() - begun


def test_a_pipeline_over_shared_components_runs_as_they_do() -> None:
    assert [found[0] for found in run_ranks(_on_shared_components, 2)] == [{"ulysses": 2}] * 2


class Watched(nn.Module):
    """Says when it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


def test_a_copy_runs_nothing_that_stands_on_the_module() -> None:
    module, ran = Watched(), []
    plain = module.forward
    module.forward = lambda x: (
        ran.append("forward") or plain(x)
    )  # as torch.compile, accelerate or parafuse put it there
    module.inner.register_forward_hook(lambda *_: ran.append("hook"))
    mode = fake_mode()
    compiled: Any = torch.compile(module, backend="eager")
    for copied in (without_memory(module, mode), without_memory(compiled, mode)):
        with torch.no_grad():
            out = copied(torch.ones(2, 4))
        assert out.shape == (2, 4)
        assert ran == []
        assert isinstance(copied, Watched)
        assert copied.scale is not module.scale
    module(torch.ones(2, 4))
    assert sorted(ran) == ["forward", "hook"]


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler])
def test_calls_beside_the_steps_are_not_branches(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Engine.from_pretrained("tiny:sdxl", alone=True).pipeline
    pipeline.scheduler = kind.from_config(
        pipeline.scheduler.config, **({"skip_prk_steps": True} if kind is PNDMScheduler else {})
    )
    pipeline.scheduler.set_timesteps(20)
    calls = len(pipeline.scheduler.timesteps)
    for scale, branches in ((5.0, 2), (1.0, 1)):
        call = {**SMALL, "num_inference_steps": 20, "guidance_scale": scale}
        found = facts_of(source_of(pipeline), Config(), CPU, call, pipeline=pipeline)
        assert found.branches == branches
        assert found.of(DENOISE)[0].calls == pytest.approx(calls)


def test_an_autoencoder_that_is_given_another_dtype_is_followed() -> None:
    found = facts_of(locate("tiny:sdxl"), Config(), ("cpu", "float16"), SMALL)
    assert {one.dtype for part in found.parts for one in part.alone if part.phase == "decode" and one.flops.whole} == {
        "float32"
    }


def test_what_is_given_in_the_place_of_a_part_counts() -> None:
    from diffusers import FluxTransformer2DModel

    pipeline = Engine.from_pretrained("tiny:flux.1-dev", alone=True).pipeline
    config = dict(pipeline.transformer.config) | {"num_layers": 3}
    other = FluxTransformer2DModel.from_config(config)
    source = locate("tiny:flux.1-dev")
    own, given = (facts_of(source, Config(), CPU, SMALL, given=parts) for parts in ({}, {"transformer": other}))
    kind = "FluxTransformerBlock"
    assert (own.of(DENOISE)[0].blocks[kind], given.of(DENOISE)[0].blocks[kind]) == (
        pipeline.transformer.config.num_layers,
        3,
    )


def test_kept_facts_are_those_of_the_sizes_of_tiles(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAFUSE_CACHE", str(tmp_path))
    pipeline = Engine.from_pretrained("tiny:flux.1-dev", alone=True).pipeline
    pipeline.vae.enable_tiling()
    call = {**SMALL, "width": 192, "height": 192}
    before = facts_of(source_of(pipeline), Config(), CPU, call, pipeline=pipeline)
    pipeline.vae.tile_latent_min_size //= 2
    pipeline.vae.tile_sample_min_size //= 2
    assert facts_of(source_of(pipeline), Config(), CPU, call, pipeline=pipeline).tiles > before.tiles


def test_named_degrees_stay_beside_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "facts_of", lambda *_, **__: guided())
    parallel = Parallel(cfg="auto", ulysses=2)
    assert fixed_of(Config(parallel=parallel), options=False)["ulysses"] == 2
    assert choose(Config(parallel=parallel), locate("emoji"), 4, CPU).config.parallel == Parallel(cfg=2, ulysses=2)


def test_an_attention_that_a_ring_cannot_have_rules_rings_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(attention="fp8-reference")
    why = refusal_of(config, "cpu")
    assert "ring" in why(Candidate(ring=2))
    assert why(Candidate(ulysses=2)) == ""
    slow = machine(2)
    slow = dataclasses.replace(slow, inside=dataclasses.replace(slow.inside, bytes_per_s=1e9))
    monkeypatch.setattr(choosing, "machine_at_hand", lambda *_: slow)
    monkeypatch.setattr(choosing, "facts_of", lambda *_, **__: facts())
    assert choose(Config(), locate("emoji"), 2, CPU).config.parallel.ring == 2
    assert choose(config, locate("emoji"), 2, CPU).config.parallel.ulysses == 2


def test_a_call_that_is_expected_is_checked() -> None:
    with pytest.raises(ConfigError, match="widht"):
        choose(Config(), locate("emoji"), 2, CPU, {"widht": 64})
    for parallel in (Parallel(ulysses=2), Parallel(cfg=2)):
        with pytest.raises(ConfigError, match=r"expect: .* leave one out"):
            Engine.from_pretrained("emoji", Config(parallel=parallel), expect={"width": 64})


def test_words_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="objective='speed': must be one of latency, throughput, memory"):
        plans("emoji", "2xh100", objective="speed")
    with pytest.raises(ConfigError, match=r"fidelity='exakt': must be one of .* did you mean 'exact'"):
        plans("emoji", "2xh100", fidelity="exakt")
    with pytest.raises(ConfigError, match="sparse"):
        plans("emoji", "2xh100", SMALL, Config(sparse="window:0,4,4,tile=1x4x4"))
    with pytest.raises(ConfigError, match="attention"):
        plans("emoji", "2xh100", SMALL, Config(attention="fp8-reference"))


def test_without_facts_the_reason_is_told() -> None:
    def none(*_: object, **__: object) -> Facts:
        raise ModelError("no files")

    with patch.object(choosing, "facts_of", none):
        for call in (None, SMALL):
            assert "no files" in choose(Config(), locate("emoji"), 2, CPU, call).why
