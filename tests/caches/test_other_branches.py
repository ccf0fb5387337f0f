"""Branches of guidance that are made from the leading one: which rows are computed, what the others are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers.hooks.faster_cache import _split_low_high_freq
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import parafuse
from parafuse.cache import FasterCache, cache_of
from parafuse.engine.caches.clock import Clock
from parafuse.engine.caches.guided import Guided, apart, together, weighed
from parafuse.engine.caches.schedules import SELF, schedule_of
from parafuse.engine.stack import block_stack
from parafuse.engine.verify import relative_error
from parafuse.errors import ConfigError
from parafuse.parallel.call_context import CallContext
from parafuse.parallel.leading_rows import LeadingRows
from tests.caches.painted import Stopped, painted, stop_at_4
from tests.dist.ranks import run_ranks
from tests.guided.cells import seeded, tensors
from tests.guided.collect import cases

EXACT = 1e-5
STEPS = 8
BRANCHES = FasterCache(1, unconditional=3, frequency_weight=0.0, warmup_steps=2, final_steps=0)
"""Attention is computed in every call; 8 steps are whole, whole, led, led, whole, led, led, whole."""
BOTH = FasterCache(2, unconditional=3, warmup_steps=2, final_steps=0)
LED = (2, 3, 5, 6)


@dataclass
class Calls:
    """Of a denoiser: what it was given and gave, and how many samples its first block computed for each."""

    given: list[tuple[Any, Any]] = field(default_factory=list[tuple[Any, Any]])
    gave: list[Tensor] = field(default_factory=list[Tensor])
    computed: list[int] = field(default_factory=list[int])


@contextmanager
def watched(denoiser: nn.Module, first_block: nn.Module) -> Iterator[Calls]:
    found = Calls()

    def before(_: Any, args: Any, kwargs: Any) -> None:
        found.given.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))
        found.computed.append(0)

    def after(_: Any, args: Any, kwargs: Any, result: Any) -> None:
        found.gave.append(next(x.clone() for x in tree_leaves(result) if isinstance(x, Tensor)))

    def count(_: Any, args: Any, kwargs: Any) -> None:
        found.computed[-1] += len(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

    hooks = [
        denoiser.register_forward_pre_hook(before, with_kwargs=True),
        denoiser.register_forward_hook(after, with_kwargs=True),
        first_block.register_forward_pre_hook(count, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def watched_calls(name: str, prompts: int = 2) -> tuple[nn.Module, Calls]:
    """(denoiser, the calls of its second request: in the first one it is learned how to cut a batch)."""
    pipeline = cases()[name].build()
    denoiser, calls = pipeline.transformer, Calls()
    with parafuse.apply(pipeline, parafuse.Config(cache=BRANCHES)):
        for _ in range(2):
            with watched(denoiser, block_stack(denoiser)[0]) as calls:
                pipeline(**seeded(cases()[name].call(prompts) | {"num_inference_steps": STEPS}))
    return denoiser, calls


def test_stacked_branches() -> None:
    """One call a step, the conditional rows last."""
    plain, calls = watched_calls("Stable Diffusion 3")
    assert calls.computed == [2 if step in LED else 4 for step in range(STEPS)]
    difference = torch.zeros(())
    for step, (result, (args, kwargs)) in enumerate(zip(calls.gave, calls.given, strict=True)):
        other, leading = result.chunk(2)
        want = next(x for x in tree_leaves(plain(*args, **kwargs)) if isinstance(x, Tensor))
        assert relative_error([leading], [want.chunk(2)[1]]) <= EXACT
        if step in LED:
            assert relative_error([other], [leading + difference]) <= EXACT
            assert relative_error([other], [want.chunk(2)[0]]) > 100 * EXACT
        else:
            assert relative_error([result], [want]) <= EXACT
            difference = other - leading


def test_branches_apart() -> None:
    """Two calls a step, the conditional one first."""
    plain, calls = watched_calls("Wan 2.1")
    assert calls.computed == [n for step in range(STEPS) for n in ((2, 0) if step in LED else (2, 2))]
    difference = torch.zeros(())
    for step in range(STEPS):
        leading, other = calls.gave[2 * step : 2 * step + 2]
        args, kwargs = calls.given[2 * step]
        want = next(x for x in tree_leaves(plain(*args, **kwargs)) if isinstance(x, Tensor))
        assert relative_error([leading], [want]) <= EXACT
        if step in LED:
            assert relative_error([other], [leading + difference]) <= EXACT
        difference = other - leading


@pytest.mark.parametrize(
    ("name", "degrees", "prompts"),
    [
        ("Stable Diffusion 3", dict(cfg=2, ulysses=1), 2),
        ("Stable Diffusion 3", dict(data=2, ulysses=1), 2),
        ("Stable Diffusion 3", dict(ulysses=2), 1),
        ("Stable Diffusion 3: skipped layers", dict(cfg=2, ulysses=1), 1),  # a third branch, in some steps
        ("Stable Diffusion 3: skipped layers", dict(cfg=2, ulysses=1), 3),
        ("Wan 2.1", dict(cfg=2, ulysses=1), 2),
        ("Wan 2.1", dict(cfg=2, ulysses=1), 3),
        ("Wan 2.1", dict(ring=2, ulysses=1), 1),
        ("Stable Diffusion XL", dict(cfg=2, ulysses=1), 1),
        ("LTX-2.3: four branches", dict(cfg=2, ulysses=1), 1),
    ],
)
def test_several_ranks_give_what_one_gives(name: str, degrees: dict[str, int], prompts: int) -> None:
    want, word = painted(name, BOTH, prompts=prompts)
    exact, _ = painted(name, None, prompts=prompts)
    assert relative_error(want, exact) > 100 * EXACT
    for found, said in run_ranks(painted, 2, name, BOTH, degrees, prompts, timeout_s=120):
        assert relative_error(found, want) <= EXACT
        assert said["decisions"] == word["decisions"]


def no_cut(self: Any, original: Any) -> Any:
    return original


def test_without_the_cut_all_rows_are_computed() -> None:
    with patch.object(LeadingRows, "_forward", no_cut):
        _, calls = watched_calls("Stable Diffusion 3")
    assert calls.computed == [4] * STEPS


def test_a_branch_that_is_not_told_apart_is_never_made_from_itself() -> None:
    """Without guidance there is one branch: only its attention is reused."""
    pipeline = cases()["Stable Diffusion 3"].build()
    call = seeded(cases()["Stable Diffusion 3"].call(2) | {"num_inference_steps": STEPS, "guidance_scale": 1.0})
    with parafuse.apply(pipeline, parafuse.Config(cache=BRANCHES)):
        found = tensors(pipeline(**call))
    want = tensors(pipeline(**seeded(call)))
    assert relative_error(found, want) == 0


def test_where_samples_are_not_told_all_branches_are_computed(capfd: pytest.CaptureFixture[str]) -> None:
    told = property(lambda self: None, lambda self, value: None)
    with patch.object(Clock, "samples", told, create=True):
        found, _ = painted("Stable Diffusion 3", BRANCHES)
    exact, _ = painted("Stable Diffusion 3", None)
    assert relative_error(found, exact) == 0
    assert "all of them are computed" in capfd.readouterr().err


def test_a_stopped_run_leaves_no_difference() -> None:
    pipeline = cases()["Wan 2.1"].build()
    call = cases()["Wan 2.1"].call(1) | {"num_inference_steps": STEPS}
    with parafuse.apply(pipeline, parafuse.Config(cache=BOTH)) as handle:
        want = tensors(pipeline(**seeded(call)))
        with pytest.raises(Stopped):
            pipeline(**seeded(call), callback_on_step_end=stop_at_4)
        (caching,) = handle.skipping.values()
        assert caching.memory.guided.nbytes  # it was in the middle of its steps
        assert relative_error(tensors(pipeline(**seeded(call))), want) == 0
        assert caching.memory.guided.nbytes == 0


def test_a_receipt_of_other_steps_is_refused() -> None:
    pipeline = cases()["Wan 2.1"].build()
    call = cases()["Wan 2.1"].call(1) | {"num_inference_steps": STEPS}
    with parafuse.Engine.from_pipeline(pipeline, parafuse.Config(cache=BRANCHES)) as engine:
        engine(**seeded(call))
        decisions = engine.receipt["cache"]["decisions"]
        engine.plan = replace(engine.plan, replay=decisions)
        engine(**seeded(call))
        engine.plan = replace(engine.plan, replay={"transformer": ["c"] * 2 * STEPS})
        with pytest.raises(ConfigError, match=r"plan\.replay: call 6 is decided otherwise by the schedule"):
            engine(**seeded(call))


def test_schedule() -> None:
    schedule = schedule_of(cache_of("fastercache:2,unconditional=5,warmup_steps=3,final_steps=1") or BOTH)
    assert "".join("w1"[schedule.leads_only(step, 15)] for step in range(15)) == "www1111w1111w1w"
    assert "".join("cs"[schedule.reuses(SELF, step, 15)] for step in range(15)) == "cccscsccscsccsc"
    apart_only = schedule_of(FasterCache(2, unconditional=1))
    assert not any(apart_only.leads_only(step, 15) for step in range(15))
    assert "".join("cs"[apart_only.reuses(SELF, step, None)] for step in range(7)) == "cccscsc"


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (5, 10)])
@pytest.mark.parametrize("passed", [0.25, 0.75])
def test_frequencies_are_weighed_as_in_diffusers(size: tuple[int, int], passed: float) -> None:
    """Its shift runs over all dims, which is none but over height and width where the others are of length 1."""
    x = torch.randn(1, 1, *size)
    low, high = _split_low_high_freq(x)
    summed = low * 1.3 + high if passed < 0.5 else low + high * 1.3
    assert relative_error([weighed(x, 0.3, passed)], [torch.fft.ifft2(torch.fft.ifftshift(summed)).real]) <= 1e-6
    assert relative_error([weighed(x, 0.3, passed)], [weighed(x, 0.3, 1 - passed)]) > 0.01
    assert weighed(x, 0.3, None) is x
    tokens = x[0]
    assert weighed(tokens, 0.3, passed) is tokens  # they have no height and width


def test_a_batch_is_taken_apart_and_put_together() -> None:
    x = torch.arange(12.0).view(6, 2)
    for result in ((x, None), ([*x], None)):
        parts = apart(result, 6, 3)
        assert len(parts) == 3
        joined = together(parts, 2)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(joined)[:1], tree_leaves(result)[:1], strict=True))


def test_ranks_wait_for_each_other_once_a_step() -> None:
    guided = Guided()
    for step, calls in enumerate((3, 3, 2, 2, 3)):
        guided.begin(step, keeps=False)
        last = [guided.is_last((n, 0, ()), None) for n in range(1, calls)]
        assert last == [[True, True], [False, True], [False], [True], [True, True]][step]
        if any(last):
            guided.waiting.clear()


def test_what_was_learned_before_guidance_paused_is_not_used_after_it() -> None:
    guided, x, one, other = Guided(), torch.ones(2), (0, 0, ()), (1, 0, ())
    guided.begin(1, keeps=False)
    guided.learn(1, one, x, other, 3 * x)
    guided.begin(1, keeps=False)  # another view of the same step
    guided.begin(2, keeps=True)
    assert guided.knows(one, [other])
    guided.begin(3, keeps=False)  # all are computed, and the other one is not there
    guided.begin(4, keeps=True)
    assert not guided.knows(one, [other])


def test_results_of_other_shapes_are_not_made_from_each_other() -> None:
    guided, one, other = Guided(), (0, 0, ()), (1, 0, ())
    guided.learn(1, one, torch.ones(2, 3), other, torch.ones(2, 1))
    assert not guided.knows(one, [other])


def test_channels_in_the_last_dim_are_no_width() -> None:
    x = torch.randn(2, 3, 8, 12, 4)  # (B, F, H, W, C)
    want = weighed(x.movedim(-1, 1), 0.3, 0.2).movedim(1, -1)
    assert relative_error([weighed(x, 0.3, 0.2, (4,))], [want]) == 0
    assert relative_error([weighed(x, 0.3, 0.2, (3,))], [want]) > 0.01


def test_pictures_of_several_sizes_one_after_another() -> None:
    """How a batch is cut holds for one size alone."""
    pipeline = cases()["Stable Diffusion 3"].build()
    call = cases()["Stable Diffusion 3"].call(2) | {"num_inference_steps": STEPS}
    sizes = [{}, {"height": 2 * call["height"]}, {}]
    with parafuse.apply(pipeline, parafuse.Config(cache=BOTH)):
        found = [tensors(pipeline(**seeded(call | more))) for more in sizes]
    for more, one in zip(sizes[:2], found, strict=False):
        alone = cases()["Stable Diffusion 3"].build()
        with parafuse.apply(alone, parafuse.Config(cache=BOTH)):
            assert relative_error(one, tensors(alone(**seeded(call | more)))) <= EXACT
    assert relative_error(found[2], found[0]) <= EXACT


def test_nothing_stands_in_the_way_of_caches_that_make_no_branches() -> None:
    context = CallContext()
    assert not context.leads_only
    with parafuse.apply(cases()["Wan 2.1"].build(), parafuse.Config(cache="pab:2")) as handle:
        (caching,) = handle.skipping.values()
        assert caching.context.leading is None
