"""Whole pipelines under guidance and data parallel: the pictures of one rank, and what is said of bad input."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

import parafuse
from parafuse.parallel import batch_cut, bundle
from parafuse.parallel.placeholder import Placeholder
from tests.dist.ranks import run_ranks
from tests.dist.test_guidance import Denoiser, values
from tests.dist.test_sequence import EXACT, attempt
from tests.guided.cells import cell_of, seeded, tensors
from tests.guided.collect import cases
from tests.models import error


def config(**degrees: int) -> parafuse.Config:
    return parafuse.Config(parallel=parafuse.Parallel(ulysses=1, **degrees))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("Stable Diffusion 3: skipped layers", "cfg 2"),
        ("Stable Diffusion XL: Euler ancestral", "data 2"),
        ("CogView 4", "data 2"),  # text is padded to the longest prompt
        ("LTX-Video: image to video", "data 2"),  # pictures are encoded one by one, with noise
        ("Qwen-Image", "data 2 x cfg 2"),  # a call for each branch, each with a batch
        ("Wan 2.1", "cfg 2 x ulysses 2"),
        ("Z-Image", "cfg 2"),
    ],
)
def test_pipelines(name: str, column: str) -> None:
    cell = cell_of(name, column)
    assert (cell.faults, cell.refused) == ([], "")
    if "cfg" in column:
        assert cell.apart > 0


def four_pictures() -> tuple[float, tuple[int, ...], float]:
    """(error of the pictures, their shape, how much the prompts differ)."""
    case = cases()["Stable Diffusion XL"]
    call = case.call(4) | {"output_type": "np"}
    (want,) = tensors(case.build()(**seeded(call)))
    with parafuse.Engine.from_pipeline(case.build(), config(data=2, cfg=2)) as engine:
        (got,) = tensors(engine(**seeded(call)))
        assert isinstance(engine(**case.call(4) | {"output_type": "pil"}, seed=1).images, list)
    return error(got, want), tuple(got.shape), error(want[0], want[1])


def test_four_pictures_of_one_rank_on_four() -> None:
    for wrong, shape, apart in run_ranks(four_pictures, 4):
        assert wrong <= EXACT
        assert (shape[0], shape[-1]) == (4, 3)
        assert apart > 1e-2


def with_rows_swapped() -> list[float]:
    """Errors of two pictures: right, with each replica's share in the other one's place, and with a share left out."""
    case = cases()["Stable Diffusion XL: Euler ancestral"]
    call, found = case.call(2), []
    (want,) = tensors(case.build()(**seeded(call)))

    def swapped(*args: Any) -> Any:
        return bundle.exchange(*args)[::-1]

    def own_only(mine: list[torch.Tensor], shapes: Any, *_: Any) -> Any:
        return [[torch.zeros(x.shape, dtype=x.dtype) for x in each] for each in shapes]

    for replacement in (bundle.exchange, swapped, own_only):
        with (
            patch.object(batch_cut, "exchange", replacement),
            patch.object(batch_cut, "_is_same", lambda *_: True),
            parafuse.Engine.from_pipeline(case.build(), config(data=2)) as engine,
        ):
            found.append(error(tensors(engine(**seeded(call)))[0], want))
    return found


def test_swapped_and_dropped_shares_show() -> None:
    for right, swapped, dropped in run_ranks(with_rows_swapped, 2):
        assert right <= EXACT
        assert swapped > 1e-2
        assert dropped > 1e-2


def with_noise_of_nobody() -> tuple[float, float]:
    """A scheduler that draws from torch's own generator, which the ranks have seeded differently: (error, and how far
    another seed is)."""
    case = cases()["FLUX.1"]

    def painted(seed: int, run: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        return tensors(run(**seeded(case.call(1))))[0]

    def build() -> Any:
        pipeline = case.build()
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, stochastic_sampling=True)
        return pipeline

    want, other = painted(0, build()), painted(1, build())
    with parafuse.Engine.from_pipeline(build(), config(cfg=2)) as engine:
        return error(painted(engine.rank, engine), want), error(other, want)


def test_noise_that_has_no_generator_is_that_of_rank_0() -> None:
    for wrong, apart in run_ranks(with_noise_of_nobody, 2):
        assert wrong <= EXACT
        assert apart > 1e-2


def two_by_two(seeds: tuple[int, ...]) -> tuple[list[float], int]:
    """(errors of pictures with a seed each, calls in which the batch was cut)."""
    case, plain = cases()["Stable Diffusion XL"], cases()["Stable Diffusion XL"].build()
    call = case.call(len(seeds))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    (want,) = tensors(plain(**call, generator=generators))
    with parafuse.Engine.from_pipeline(case.build(), config(data=2)) as engine:
        (got,) = tensors(engine(**call, seed=seeds))
        return [error(a, b) for a, b in zip(got, want, strict=True)], engine.handle.data["unet"].seen["cut"]


def test_a_seed_for_each_picture() -> None:
    for found, cut in run_ranks(two_by_two, 2, (3, 3, 5)):
        assert max(found) <= EXACT
        assert cut > 0


def generators_again() -> list[float]:
    """Errors of two requests with the same generators, for one prompt on two replicas too."""
    case = cases()["Stable Diffusion XL"]
    found: list[float] = []
    for count in (2, 1):
        given = [[torch.Generator().manual_seed(i) for i in range(count)] for _ in range(2)]
        plain = case.build()
        wants = [tensors(plain(**case.call(count), generator=given[0]))[0] for _ in range(2)]
        with parafuse.Engine.from_pipeline(case.build(), config(data=2)) as engine:
            found += [error(tensors(engine(**case.call(count), generator=given[1]))[0], want) for want in wants]
    return found


def test_generators_go_on_as_on_one_rank() -> None:
    for found in run_ranks(generators_again, 2):
        assert max(found) <= EXACT


def bad_input() -> list[str]:
    case = cases()["Stable Diffusion XL"]
    call, found = case.call(2), []
    with parafuse.Engine.from_pipeline(case.build(), config(cfg=2)) as engine:
        found.append(attempt(lambda: engine(**call | {"guidance_scale": 1.0}, seed=1)))
        found.append(attempt(lambda: engine(**call | {"prompt": ["a cat", 5]}, seed=1)))
    found.append(
        attempt(parafuse.Engine.from_pipeline, case.build(), parafuse.Config(parallel=parafuse.Parallel(ulysses=2)))
    )
    with parafuse.Engine.from_pipeline(case.build(), config(data=2)) as engine:
        found.append(attempt(lambda: engine(**call | {"negative_prompt": ["x"] * 3}, seed=1)))
        found.append(attempt(lambda: engine(**call | {"prompt": ["a cat", None]}, seed=1)))
        found.append(str(len(engine(**case.call(1) | {"output_type": "pil"}, seed=1).images)))
    return found


def test_bad_input_is_said_before_anything_runs() -> None:
    for guidance, prompt, unet, lengths, index, idle in run_ranks(bad_input, 2):
        assert "parallel.cfg=2: this call of StableDiffusionXLPipeline has no guidance branches" in guidance
        assert prompt == "ConfigError: prompt[1]=5: must be a text."
        assert "UNets are not split" in unet
        assert "use cfg=2 for its guidance branches, data=N" in unet
        assert lengths == "ConfigError: negative_prompt: 3 given for 2 prompts; give one for each."
        assert index == "ConfigError: prompt[1]=None: must be a text."
        assert idle == "1"


class Direct:
    """A pipeline that gives the denoiser's result as it is, as models of one step do."""

    def __init__(self) -> None:
        self.transformer = Denoiser()
        self.device, self.components = torch.device("cpu"), {"transformer": self.transformer}

    def set_progress_bar_config(self, **_: Any) -> None: ...

    def __call__(self, guidance_scale: float = 2.0, generator: Any = None) -> dict[str, Any]:
        x, a, b = values()
        self.transformer(x, a)
        return {"images": [self.transformer(x, a)[0], self.transformer(x, b)[0]]}


def given_directly() -> tuple[list[bool], float]:
    pipeline = Direct()
    x, _, b = values()
    with torch.no_grad(), parafuse.Engine.from_pipeline(pipeline, config(cfg=2)) as engine:
        images = engine(seed=1)["images"]
        return [isinstance(image, Placeholder) for image in images], error(images[1], Denoiser()(x, b)[0])


def test_what_a_pipeline_returns_needs_no_other_rank() -> None:
    """Rank 0 alone may look at it."""
    for still_open, wrong in run_ranks(given_directly, 2):
        assert still_open == [False, False]
        assert wrong <= EXACT
