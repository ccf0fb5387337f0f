"""How ranks share an autoencoder: asked for, told, put on and taken off, beside everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import parafuse
from parafuse import Config, Engine, Parallel, Plan
from parafuse.config import Axis
from parafuse.engine.apply import Handle, apply
from parafuse.engine.vae import choice
from parafuse.errors import ConfigError
from tests.dist.ranks import run_ranks
from tests.vae import case as zoo
from tests.vae.hosts import video, wan_pipeline
from tests.vae.zoo import CASES

BY_NAME = {case.name: case for case in CASES}


def beside(degrees: dict[str, int], options: dict[str, Any], count: int) -> tuple[float, bool, list[str], bool]:
    """Largest difference of a video, whether a decode alone is bitwise, lines, and whether all is off at the end."""
    torch.set_num_threads(1)
    plain = wan_pipeline(tiled=True)
    want = video(plain, count)
    z = zoo.latents(BY_NAME["AutoencoderKLWan"], batch=count)
    alone = plain.vae.decode(z).sample
    pipeline = wan_pipeline(tiled=False)
    handle = apply(pipeline, Config(parallel=Parallel(**degrees), vae="tiled", **options))
    with handle.request():
        got = video(pipeline, count)
    lines = [line for line in handle.applied if line.startswith("vae:")]
    with handle.request():
        same = torch.equal(pipeline.vae.decode(z).sample, alone)
    handle.remove()
    is_off = not {"decode", "encode"} & set(vars(pipeline.vae)) and not pipeline.vae.use_tiling
    return float((got - want).abs().max() / want.abs().max()), same, lines, is_off


LAYOUTS: list[tuple[int, dict[str, int], dict[str, Any], int]] = [
    (2, {"ulysses": 2}, {}, 1),
    (2, {"ring": 2}, {}, 1),
    (2, {"cfg": 2}, {}, 2),
    (2, {"data": 2}, {}, 2),
    (4, {"cfg": 2, "ulysses": 2}, {}, 1),
    (2, {"ulysses": 2}, {"offload": "model:to=disk"}, 1),
    (2, {"ulysses": 2}, {"offload": "group:to=disk"}, 1),
    (2, {"ulysses": 2}, {"offload": "sequential:to=disk"}, 1),
    (2, {"ulysses": 2}, {"text_encoders": "one-rank:kept=2"}, 1),
    (2, {"ulysses": 2}, {"compile": True}, 1),
]


@pytest.mark.sweep(one_in=10)
@pytest.mark.parametrize(("num_ranks", "degrees", "options", "count"), LAYOUTS, ids=str)
def test_tiles_beside_other_options(
    num_ranks: int, degrees: dict[str, int], options: dict[str, Any], count: int
) -> None:
    share = {2: "6 of 12", 4: "3 of 12"}[num_ranks]
    for error, same, lines, is_off in run_ranks(beside, num_ranks, degrees, options, count):
        assert error <= 1e-5
        assert same
        assert lines == [f"vae: tiled, 1 calls spread over {num_ranks} ranks, {share} tiles here"]
        assert is_off


def bare(form: str) -> tuple[bool, bool, int]:
    """On an autoencoder by itself: whether both methods are bitwise, and bytes sent."""
    case = BY_NAME["AutoencoderKL"]
    module = zoo.tile(case, zoo.build(case))
    z, x = zoo.latents(case), zoo.picture(case)
    want = zoo.decode(case, module, z), zoo.encode(case, module, x)
    module.use_tiling = False
    with parafuse.apply(module, Config(vae=form)) as handle:
        same = torch.equal(zoo.decode(case, module, z), want[0]) and torch.equal(zoo.encode(case, module, x), want[1])
        sent = sum(count.bytes for count in handle.exchanged().values())
    return same, module.use_tiling, sent


def test_a_bare_autoencoder() -> None:
    for same, still, sent in run_ranks(bare, 3, "tiled"):
        assert same
        assert not still
        assert sent > 0
    assert run_ranks(bare, 2, "replicated") == [(False, False, 0)] * 2


def test_on_one_rank_tiles_are_diffusers_own() -> None:
    assert bare("tiled") == (True, False, 0)
    case = BY_NAME["AutoencoderKL"]
    module = zoo.build(case)
    for form in ("auto", "by-size", "replicated"):
        with parafuse.apply(module, Config(vae=form)) as handle:
            assert "decode" not in vars(module)
            assert handle.applied == []


def by_size(smallest: int, together: bool) -> tuple[bool, list[str]]:
    case = BY_NAME["AutoencoderKL"]
    module = zoo.tile(case, zoo.build(case))
    z = zoo.latents(case)
    want = zoo.decode(case, module, z)
    before = dict(choice.SMALLEST)
    choice.SMALLEST["decode"] = smallest
    try:
        handle: Handle = apply(module, Config(vae="by-size"))
        handle.agree(lambda: together)
        same = torch.equal(zoo.decode(case, module, z), want)
        (one,) = handle.autoencoders().values()
        lines = one.lines()
        handle.remove()
    finally:
        choice.SMALLEST.update(before)
    return same, lines


def test_a_large_call_that_all_make_is_shared_and_no_other() -> None:
    shared = (True, ["AutoencoderKL: tiled, 1 calls spread over 2 ranks, 3 of 6 tiles here"])
    assert run_ranks(by_size, 2, 16 * 12, True) == [shared] * 2
    assert run_ranks(by_size, 2, 16 * 12 + 1, True) == [(True, [])] * 2
    assert run_ranks(by_size, 2, 16 * 12, False) == [(True, [])] * 2
    assert all(lines for _, lines in run_ranks(by_size, 4, 16 * 12 * 3 // 2, True))  # more ranks save more
    assert run_ranks(by_size, 4, 16 * 12 * 3 // 2 + 1, True) == [(True, [])] * 4


def with_engine() -> tuple[bool, list[str]]:
    torch.set_num_threads(1)
    plain = wan_pipeline(tiled=True)
    want = video(plain)
    with Engine.from_pipeline(wan_pipeline(tiled=False), Config(parallel=Parallel(ulysses=2), vae="tiled")) as engine:
        got = video(engine)
        return bool((got - want).abs().max() <= 1e-5 * want.abs().max()), engine.receipt["vae"]


def test_an_engine_tells_it() -> None:
    for same, lines in run_ranks(with_engine, 2):
        assert same
        assert lines == ["vae: tiled, 1 calls spread over 2 ranks, 6 of 12 tiles here"]


@pytest.mark.whole
def test_ranks_that_an_engine_has_started_share_large_calls() -> None:
    config = Config(parallel=Parallel(ulysses=2), timeout_s=120.0)
    with Engine.from_pretrained("emoji", config) as engine:
        engine("a red apple", seed=1, num_inference_steps=1, width=256, height=256)  # latents of 64 x 64
        assert any("decode split along" in line for line in engine.receipt["vae"])


def without_autoencoder() -> Any:
    return apply(torch.nn.Linear(2, 2), Config(vae="tiled"))


def without_tiles() -> Any:
    return apply(zoo.build(BY_NAME["VQModel"]), Config(vae="tiled"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Config(vae="tile"), "vae='tile': must be one of auto, by-size, .*; did you mean 'tiled'"),
        (lambda: Config(vae=True), "vae=True: must be one of"),  # pyright: ignore[reportArgumentType]
        (without_autoencoder, "vae='tiled': there is none of vae, movq, vqgan, vqvae, audio_vae here; leave it out"),
        (without_tiles, "VQModel is VQModel, which has no tiling; use vae='sharded'"),
    ],
)
def test_faults_are_told(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_plan_is_explicit() -> None:
    values: dict[str, Any] = dict(
        model="x", model_id="0", world_size=1, degrees=dict.fromkeys(Axis, 1),
        device="cpu", dtype="float32", timeout_s=60.0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"plan\.vae='auto': a plan is explicit"):
        Plan(**values, vae="auto")
    plan = Plan(**values, vae="tiled")
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.config().vae == "tiled"
    assert not plan.changes_nothing
    assert "vae tiled" in plan.one_line()
    assert Plan(**values).changes_nothing
