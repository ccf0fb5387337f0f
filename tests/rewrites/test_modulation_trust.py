"""The rewrite `modulation` where rows could be of something else: other roundings of the timestep, adapters set anew,
branches in new tensors, models whose code looks at the timestep or keeps something, requests that end early."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parafuse
from parafuse.engine.rewrites import step_tables, times
from parafuse.engine.rewrites.modulation import StepModulation
from parafuse.engine.verify import relative_error
from parafuse.errors import UnsupportedError
from parafuse.parallel.effects import Adapters, Parts, Watched
from tests.adapters import lora
from tests.guided.cells import seeded, tensors
from tests.guided.collect import cases
from tests.guided.flux import build
from tests.rewrites.test_modulation import CONFIG_ON, EXACT, Loop, odd_last, of

Change = Callable[[Any], Any]


@pytest.mark.parametrize("steps", [4, 20, 28, 50])
def test_bf16_as_on_a_gpu(steps: int) -> None:
    """Two forms of the timestep agree in the first steps there, and part later by a rounding."""
    call = cases()["FLUX.1"].call(1) | dict(true_cfg_scale=1.0, num_inference_steps=steps)
    pipeline = build("FluxPipeline").to(torch.bfloat16)
    want = tensors(pipeline(**seeded(call)))
    with parafuse.apply(pipeline, CONFIG_ON) as handle:
        of(handle).is_host_free = False
        assert relative_error(tensors(pipeline(**seeded(call))), want) <= 3e-2
        assert of(handle).seen == {"looked up": steps}


def test_one_form_alone_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the one above."""
    forms = times._forms

    def first(scheduler: Any, like: Tensor) -> Any:
        return list(forms(scheduler, like))[1:2]

    monkeypatch.setattr(times, "_forms", first)
    with pytest.raises(UnsupportedError, match=r"does not follow from the scheduler's"):
        test_bf16_as_on_a_gpu(20)


def load(name: str, seed: int) -> Change:
    return lambda one: one.load_lora_weights(lora(one, ["transformer"], rank=2, seed=seed), adapter_name=name)


def both_loaded(one: Any) -> None:
    load("a", 1)(one)
    load("b", 5)(one)
    one.set_adapters("a")


SETTINGS: dict[str, list[Change]] = {
    "scale": [load("a", 1), lambda one: one.set_adapters("a", 0.2), lambda one: one.set_adapters("a", 2.0)],
    "off and on": [load("a", 1), lambda one: one.disable_lora(), lambda one: one.enable_lora()],
    "another": [both_loaded, lambda one: one.set_adapters("b")],
    "fused": [
        load("a", 1),
        lambda one: (one.set_adapters("a", 0.5), one.fuse_lora()),
        lambda one: (one.unfuse_lora(), one.set_adapters("a", 1.5)),
    ],
}


def over_settings(name: str) -> list[float]:
    """Errors after each change between requests."""
    call, found = cases()["FLUX.1"].call(1) | dict(true_cfg_scale=1.0), list[list[list[Tensor]]]()
    for config in (parafuse.Config(), CONFIG_ON):
        pipeline = build("FluxPipeline")
        found.append([])
        with parafuse.apply(pipeline, config):
            for change in SETTINGS[name]:
                change(pipeline)
                found[-1].append(tensors(pipeline(**seeded(call))))
    plain, rewritten = found
    assert all(relative_error(b, a) > 1e-2 for a, b in pairwise(plain))
    return [relative_error(b, a) for a, b in zip(plain, rewritten, strict=True)]


@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_are_set_anew_between_requests(name: str) -> None:
    assert max(over_settings(name)) <= EXACT


def test_without_a_look_at_the_module_old_adapters_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parts, "have_changed", lambda _: False)
    assert max(over_settings("scale")) > 1e-2


def rescaled(pipeline: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    if step == 1:
        pipeline.set_adapters("a", 0.1)
    return values


def in_mid_request() -> tuple[float, list[str], dict[str, int]]:
    call, found, told = cases()["Stable Diffusion 3"].call(1), list[list[Tensor]](), list[Any]()
    for config in (parafuse.Config(), CONFIG_ON):
        pipeline = cases()["Stable Diffusion 3"].build()
        with parafuse.apply(pipeline, config) as handle:
            load("a", 1)(pipeline)
            found.append(tensors(pipeline(**seeded(call | dict(num_inference_steps=5)), callback_on_step_end=rescaled)))
            told = [list(of(handle).why), dict(of(handle).seen)] if config is CONFIG_ON else []
    return relative_error(found[1], found[0]), *told


def test_adapters_are_set_anew_in_mid_request(monkeypatch: pytest.MonkeyPatch) -> None:
    error, why, seen = in_mid_request()
    assert error <= EXACT
    assert why == ["adapters are set to something else in the middle of a request"]
    assert seen == {"looked up": 2, "as they are": 3}
    monkeypatch.setattr(Adapters, "have_changed", lambda _: False)  # negative control
    assert in_mid_request()[0] > 1e-2


@pytest.mark.parametrize("name", ["FLUX.1", "Stable Diffusion 3", "Stable Diffusion XL: Heun", "HunyuanVideo"])
def test_the_next_request_learns_nothing_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls, plain = cases()[name], list[int](), StepModulation._run
    monkeypatch.setattr(StepModulation, "_run", lambda self, *given: calls.append(1) or plain(self, *given))
    pipeline = case.build()
    with parafuse.apply(pipeline, CONFIG_ON):
        pipeline(**seeded(case.call(1)))
        made = len(calls)
        for _ in range(2):
            pipeline(**seeded(case.call(1)))
    assert len(calls) == made > 0


class Looks(nn.Module):
    """Its code decides by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(4, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        found = self.embed(timestep[:, None].expand(-1, 4))
        if float(timestep[0]) < 0.5:
            found = -found
        return self.blocks[0](hidden_states) * self.project(found)[:, None]


class Draws(nn.Module):
    """Draws noise in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.blocks = nn.Linear(4, 8), nn.ModuleList([nn.Linear(8, 8)])
        self.state: list[Tensor] = []
        self.register_buffer("sum", torch.zeros(8))

    def inner(self, x: Tensor, memory: Any) -> Tensor:
        return self.blocks[0](x + 0.1 * torch.randn_like(x))

    def forward(self, hidden_states: Tensor, timestep: Tensor, memory: Any = None) -> Tensor:
        return self.inner(hidden_states, memory) * self.project(timestep[:, None].expand(-1, 4))[:, None]


class Keeps(Draws):
    """Keeps what it was given, as caches of keys do."""

    def inner(self, x: Tensor, memory: Any) -> Tensor:
        self.state.append(x)
        return self.blocks[0](torch.cat(self.state, 1).mean(1, keepdim=True) + x)


class Adds(Draws):
    """Adds to a tensor of its own."""

    def inner(self, x: Tensor, memory: Any) -> Tensor:
        self.sum += x.mean((0, 1))
        return self.blocks[0](x + self.sum)


class Fills(Draws):
    """Writes into an object that it is given."""

    def inner(self, x: Tensor, memory: Any) -> Tensor:
        memory.items.append(x)
        return self.blocks[0](torch.cat(memory.items, 1).mean(1, keepdim=True) + x)


class Tables(Draws):
    """Makes a table when it is first called, which is no effect."""

    def inner(self, x: Tensor, memory: Any) -> Tensor:
        if not self.state:
            self.state.append(torch.arange(8.0))
        return self.blocks[0](x + self.state[0])


class Memory:
    def __init__(self) -> None:
        self.items: list[Tensor] = []


class Steps:
    """A pipeline of one's own around a small model."""

    def __init__(self, model: type[nn.Module]):
        import diffusers

        torch.manual_seed(0)
        self.transformer = model()
        self.scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        self.latents = torch.randn(1, 6, 8)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        torch.manual_seed(3)
        self.scheduler.set_timesteps(6)
        x, more = self.latents, dict(memory=Memory()) if isinstance(self.transformer, Fills) else {}
        for time in self.scheduler.timesteps:
            noise = self.transformer(hidden_states=x, timestep=time.expand(1) / 1000, **more)
            x = self.scheduler.step(noise, time, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Looks, "looks at the timestep"),
        (Draws, "do more than give a result"),
        (Keeps, "do more than give a result"),
        (Adds, "do more than give a result"),
        (Fills, "an argument is a Memory, which a call may write into"),
    ],
)
def test_models_that_do_more_are_left_as_they_are(model: type[nn.Module], why: str) -> None:
    want = Steps(model)()
    steps = Steps(model)
    with parafuse.apply(steps, CONFIG_ON) as handle:
        assert relative_error([steps()], [want]) == 0
        assert of(handle).seen == {"as they are": 6}
        assert [why in one for one in of(handle).why] == [True]


def test_a_table_made_at_the_first_call_is_no_effect() -> None:
    want = Steps(Tables)()
    steps = Steps(Tables)
    with parafuse.apply(steps, CONFIG_ON) as handle:
        assert relative_error([steps()], [want]) <= EXACT
        assert of(handle).seen == {"as they are": 1, "looked up": 5}


def test_without_the_watch_an_effect_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(Watched, "has_changed", lambda _: False)
    for model in (Draws, Keeps):
        steps = Steps(model)
        with parafuse.apply(steps, CONFIG_ON):
            assert relative_error([steps()], [Steps(model)()]) > EXACT


class Two(Loop):
    """Two branches, each with a pooled prompt of its own; `fresh`: in a new tensor each time."""

    def __init__(self, shift: Any = None, *, fresh: bool = False, turn: int = 99):
        super().__init__()
        self.second, self.fresh, self.turn = shift or (lambda step, time: time), fresh, turn

    @torch.no_grad()
    def __call__(self, steps: int = 5) -> Tensor:
        self.scheduler.set_timesteps(steps)
        latents, pooled = self.latents.clone(), self.given["pooled_projections"].clone()
        branches = (pooled, -2 * pooled)
        for step, time in enumerate(self.scheduler.timesteps):
            found = []
            for place, own in enumerate(branches):
                given = (time.expand(1) / 1000, self.second(step, time.expand(1) / 1000))[place]
                scaled = own * 3 if step == self.turn else own.clone() if self.fresh else own
                more = self.given | dict(pooled_projections=scaled)
                found.append(self.transformer(hidden_states=latents, timestep=given, **more)[0])
            noise = found[1] + 2 * (found[0] - found[1])
            latents = self.scheduler.step(noise, time, latents, return_dict=False)[0]
        return latents


def test_a_time_in_the_second_branch_that_was_not_foreseen() -> None:
    loop = Two(odd_last)
    want = loop()
    with parafuse.apply(loop, CONFIG_ON):
        assert relative_error([loop()], [want]) <= EXACT


@pytest.mark.parametrize("mode", ["new tensors", "inference mode"])
def test_two_branches_that_are_not_known_by_their_place(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: from some step on nobody waits, and the device finds out whose row it is."""
    loop = Two(fresh=mode == "new tensors")
    want = loop(12)
    looks = list[int]()
    holds = step_tables.Table.holds
    monkeypatch.setattr(step_tables.torch, "equal", lambda a, b: looks.append(1) or bool((a == b).all()))
    with parafuse.apply(loop, CONFIG_ON) as handle:
        of(handle).is_host_free = False
        with torch.inference_mode(mode == "inference mode"):
            assert relative_error([loop(12)], [want]) <= EXACT
        assert of(handle).seen == {"looked up": 24}
        assert len(looks) <= 4 * step_tables.MAX_LOOKS
    monkeypatch.setattr(  # negative control: the first table that may be it
        step_tables.Table, "holds", lambda *a, **k: True if isinstance(holds(*a, **k), Tensor) else holds(*a, **k)
    )
    with parafuse.apply(loop, CONFIG_ON) as handle, torch.inference_mode(mode == "inference mode"):
        of(handle).is_host_free = False
        assert relative_error([loop(12)], [want]) > 1e-3


def test_a_prompt_that_changes_where_nobody_looks_is_an_error_of_its_own() -> None:
    loop = Two(fresh=True, turn=10)
    want = Two(fresh=True)(12)
    with parafuse.apply(loop, CONFIG_ON) as handle:
        of(handle).is_host_free = False
        with pytest.raises(UnsupportedError, match=r"pooled prompt, guidance\) changed in the middle"):
            loop(12)
        loop.turn = 99
        assert relative_error([loop(12)], [want]) <= EXACT


def test_a_request_that_was_stopped_is_not_the_next_ones_fault(capsys: pytest.CaptureFixture[str]) -> None:
    loop, good, told = Loop(odd_last), Loop(), list[str]()
    want = good()
    with parafuse.apply(loop, CONFIG_ON) as handle:
        handle.clock.on_start.append(lambda: told.append("told"))
        of(handle).is_host_free = False
        step = loop.scheduler.step

        def stopping(*args: Any, **kwargs: Any) -> Any:
            if loop.scheduler.step_index == 3:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        loop.scheduler.step = stopping
        with pytest.raises(KeyboardInterrupt), handle.request():
            loop()
        loop.scheduler.step, loop.shift = step, good.shift
        with handle.request():
            assert relative_error([loop()], [want]) <= EXACT
        assert "the last request, which did not end, has no result" in capsys.readouterr().err
        told.clear()
        loop.shift = odd_last
        with pytest.raises(UnsupportedError):
            loop()
        assert told == ["told"] * 2  # at its start and at its end, though another raised
