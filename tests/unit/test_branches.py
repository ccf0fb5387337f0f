"""A branch keeps its number over the steps, whatever the order of calls; two branches never share one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parafuse.engine.targets import DENOISERS, denoisers
from parafuse.parallel.branches import Branches
from parafuse.parallel.hooks import Forward, override_forward
from tests.guided.cells import seeded
from tests.guided.collect import cases


class Denoiser(nn.Module):
    def forward(self, sample: Tensor, timestep: Any, words: Tensor, skip_layers: list[int] | None = None) -> Tensor:
        return sample


TEXT = {name: torch.full((1, 3), float(i)) for i, name in enumerate("pnq")}
"""Embeddings by the name of their branch."""


class Run:
    """Calls of a denoiser, step by step."""

    def __init__(self) -> None:
        self.branches, self.step = Branches(Denoiser()), 0

    def __call__(self, names: str, time: float | None = None, **more: Any) -> list[int]:
        """The numbers of one step's calls, a letter each."""
        self.step += 1
        latents = torch.full((1, 2), float(self.step))
        when = torch.tensor([float(self.step) if time is None else time])
        return [self.branches.of((latents, when), {"words": TEXT[name], **more}) for name in names]


def test_branches_keep_their_numbers_whatever_their_order() -> None:
    run = Run()
    run("pn")
    positive, negative = run("pn")
    assert positive != negative
    assert run("pn") == [positive, negative]
    assert run("np") == [negative, positive]
    assert run("n") == [negative]
    assert run("p") == [positive]


def test_guidance_that_starts_in_mid_run_is_another_branch_from_its_first_call() -> None:
    run = Run()
    (positive,) = [run("p") for _ in range(4)][-1]
    negative, again = run("np")
    assert again == positive
    assert negative != positive
    assert run("np") == [negative, positive]


def test_guidance_that_starts_at_the_second_step_with_the_other_branch() -> None:
    run = Run()
    run("p")
    first = run("np")
    assert len(set(first)) == 2
    found = run("np")
    assert len(set(found)) == 2
    assert run("np") == found


def test_a_branch_is_told_by_skipped_layers_alone() -> None:
    run = Run()
    run("p")
    run("p")
    (plain,) = run("p")
    (skipped,) = run("p", skip_layers=[1])
    assert skipped != plain
    assert run("p") == [plain]
    assert run("p", skip_layers=[1]) == [skipped]


def test_equal_contents_elsewhere_in_memory_are_the_same() -> None:
    run = Run()
    run("pn")
    found = run("pn")
    words = [TEXT[name].clone() for name in "pn"]
    latents, when = torch.zeros(1, 2), torch.tensor([99.0])
    assert [run.branches.of((latents, when), {"words": x}) for x in words] == found


def test_what_is_written_in_place_is_another_value() -> None:
    run = Run()
    words = TEXT["p"].clone()
    latents = torch.zeros(1, 2)

    def step(time: float) -> int:
        latents.add_(1)
        return run.branches.of((latents, torch.tensor([time])), {"words": words})

    numbers = [step(float(i)) for i in range(4)]
    words.add_(1)
    assert step(9.0) != numbers[-1]
    assert numbers[-1] == numbers[-2]


def test_a_step_may_call_twice_at_one_time() -> None:
    """As schedulers of second order do."""
    run = Run()
    times = [1.0, 2.0, 2.0, 3.0, 3.0, 4.0]
    numbers = [run("pn", time) for time in times]
    assert numbers[3] == numbers[4] == numbers[5]
    assert len(set(numbers[3])) == 2


def test_an_argument_that_was_left_out_counts_again_where_calls_differ_in_it() -> None:
    """A prompt that changes at every step looks like a matter of the step, until guidance starts."""
    run = Run()
    for name in "pnq":
        run(name)
    assert len(set(run("pn"))) == 2
    assert len(set(run("pn"))) == 2


def told(name: str) -> list[list[int]]:
    """Numbers of the branches of a whole pipeline, by calls on the same latents; its second model counts from 100."""
    pipeline = cases()[name].build()
    pipeline.set_progress_bar_config(disable=True)
    groups: list[list[int]] = []
    last: list[list[Tensor]] = []

    def watch(branches: Branches, names: list[str], first: int) -> Any:
        def make(original: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                latents = [x.clone() for x in tree_leaves(args[0] if args else kwargs[names[0]])]
                same = last and len(last[0]) == len(latents) and all(map(torch.equal, last[0], latents))
                if not same:
                    groups.append([])
                last[:] = [latents]
                groups[-1].append(first + branches.of(args, kwargs))
                return original(*args, **kwargs)

            return forward

        return make

    for number, (_, module) in enumerate(denoisers(pipeline, DENOISERS)):
        branches = Branches(module)
        override_forward(module, watch(branches, branches._parameters, 100 * number))
    pipeline(**seeded(cases()[name].call(1)))
    return groups


TOLD = {
    "Kandinsky 5": [[0, 1], [2, 3], [2, 3]],  # latents are written in place
    "LTX-2.3: four branches": [[0], [1, 2]] * 3,  # two of them stacked
    "Lumina-Image 2.0": [[0, 1], [2, 3], [2]],  # guidance ends
    "Qwen-Image": [[0, 1], [2, 3], [2, 3]],
    "Stable Diffusion 3: skipped layers": [[0], [1], [2], [1]],
    "Stable Diffusion XL: ControlNet": [[0], [1], [1]],  # residuals of each step
    "Stable Diffusion XL: Heun": [[0], [1], [1], [1], [1]],
    "Wan 2.2: two experts": [[0, 1], [100, 101], [102, 103]],
}
"""From the second change of step on, a branch has one number."""


@pytest.mark.parametrize("name", TOLD)
def test_the_branches_of_pipelines(name: str) -> None:
    assert told(name) == TOLD[name]
