"""TeaCache, MagCache and DeepCache decide on several ranks as on one, and so does a measurement of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from torch import Tensor

import parafuse
from parafuse.calibration import Calibration
from parafuse.engine.caches import measure
from parafuse.engine.calibrate import WATCHING, calibrate
from tests.dist.ranks import run_ranks
from tests.guided import sd3, stable_diffusion
from tests.guided.parts import prompts

MARGIN = 1e-3
"""Of every level to its threshold: nearer ones may fall on either side."""
CALL: dict[str, Any] = prompts(2) | dict(
    height=20, width=28, num_inference_steps=10, guidance_scale=5.0, output_type="latent"
)
FREE = "warmup_steps=2,final_steps=1"
Painted = tuple[Tensor, dict[str, Any]]


def paint(cache: Any, degrees: dict[str, int], kind: str = "sd3", call: dict[str, Any] | None = None) -> Painted:
    """(latents, what the cache did) of a tiny pipeline."""
    pipeline = sd3.build() if kind == "sd3" else stable_diffusion.build(diffusers.DDIMScheduler())
    config = parafuse.Config(cache=cache, parallel=parafuse.Parallel(**degrees))
    engine = parafuse.Engine.from_pipeline(pipeline, config, alone=not degrees)
    try:
        output = engine(**(call or CALL), seed=[3, 4]).images
        return output, engine.receipt["cache"]
    finally:
        engine.close()


def measured(degrees: dict[str, int]) -> Calibration:
    config = parafuse.Config(cache=WATCHING, parallel=parafuse.Parallel(**degrees))
    engine = parafuse.Engine.from_pipeline(sd3.build(), config, alone=not degrees)
    try:
        return calibrate(engine, [CALL | {"seed": 5}]).calibration
    finally:
        engine.close()


def without_exchange(cache: Any, degrees: dict[str, int]) -> Painted:
    with patch.object(measure, "all_reduce", lambda sums, _: sums):
        return paint(cache, degrees)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("calibration") / "x.json"
    measured({}).write(str(file), {})
    return str(file)


def cache_text(method: str, file: str) -> str:
    return {
        "teacache": f"teacache:0.8,{FREE}",
        "calibrated": f"teacache:1.73,calibration={file},{FREE}",
        "magcache": f"magcache:0.3,calibration={file},{FREE}",
    }[method]


def levels(done: dict[str, Any]) -> list[float]:
    return [one for calls in done["changes"].values() for samples in calls for one in samples if one is not None]


@pytest.mark.parametrize("method", ["teacache", "calibrated", "magcache"])
@pytest.mark.parametrize(
    ("size", "degrees"), [(2, {"ulysses": 2}), (3, {"ring": 3}), (2, {"cfg": 2}), (2, {"data": 2})]
)
def test_decisions_are_those_of_one_rank(method: str, size: int, degrees: dict[str, int], calibration: str) -> None:
    cache = cache_text(method, calibration)
    alone, one = paint(cache, {})
    letters = "".join(one["decisions"]["transformer"])
    assert set(letters) == {"c", "s"}
    threshold = parafuse.Config(cache=cache).cache.threshold  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    assert all(abs(level - threshold) > MARGIN for level in levels(one)), sorted(levels(one))
    for output, done in run_ranks(paint, size, cache, degrees):
        assert done["decisions"] == one["decisions"]
        assert levels(done) == pytest.approx(levels(one), rel=1e-3)
        assert float((output - alone).abs().max() / alone.abs().max()) < 1e-4


def test_a_rank_that_decided_by_itself_would_be_seen() -> None:
    """Negative control: the changes of a rank's own tokens alone."""
    cache = f"teacache:1e9,{FREE}"  # so that they do not wait for each other
    _, one = paint(cache, {})
    for _, done in run_ranks(without_exchange, 3, cache, {"ring": 3}):
        assert done["decisions"] == one["decisions"]
        assert levels(done) != pytest.approx(levels(one), rel=1e-3)


@pytest.mark.parametrize(("size", "degrees"), [(2, {"ulysses": 2}), (2, {"cfg": 2}), (3, {"ring": 3})])
def test_a_model_is_measured_alike_on_several_ranks(size: int, degrees: dict[str, int]) -> None:
    want = measured({}).denoisers["transformer"]
    for found in run_ranks(measured, size, degrees):
        mine = found.denoisers["transformer"]
        assert mine.architecture == want.architecture
        assert mine.between == pytest.approx(want.between, rel=1e-3)
        for row, expected in zip(mine.ratios, want.ratios, strict=True):
            assert row == pytest.approx(expected, rel=1e-3)
    assert len(set(want.ratios[0])) > 5


@pytest.mark.parametrize(("size", "degrees"), [(2, {"cfg": 2}), (2, {"data": 2})])
@pytest.mark.parametrize("cache", ["deepcache:3,warmup_steps=2", "deepcache:2,branch=1,warmup_steps=2"])
def test_deepcache_gives_one_ranks_picture(cache: str, size: int, degrees: dict[str, int]) -> None:
    call = stable_diffusion.call(2) | {"num_inference_steps": 8}
    alone, one = paint(cache, {}, "unet", call)
    exact, _ = paint(None, {}, "unet", call)
    assert set("".join(one["decisions"]["unet"])) == {"c", "s"}
    assert not torch.equal(alone, exact)
    for output, done in run_ranks(paint, size, cache, degrees, "unet", call):
        assert done["decisions"] == one["decisions"]
        assert float((output - alone).abs().max() / alone.abs().max()) < 1e-4


def test_every_rank_must_have_been_given_the_same_file(tmp_path: Path, calibration: str) -> None:
    want = Calibration.read(calibration)
    texts = []
    for rank in range(2):
        file = str(tmp_path / f"{rank}.json")
        changed = want.to_dict() | {"prompts": 1 + rank}
        Calibration.from_dict(changed).write(file, {})
        texts.append(file)
    for said in run_ranks(with_own_file, 2, texts):
        assert "other than rank 0's" in said


def with_own_file(files: list[str]) -> str:
    """The error of ranks whose files differ under one name."""
    shared = Path(files[0]).with_name("shared.json")
    rank = torch.distributed.get_rank()
    with patch.object(Calibration, "read", classmethod(lambda cls, _: _read(files[rank], str(shared)))):
        try:
            paint(f"magcache:0.1,calibration={shared}", {"ulysses": 2})
        except parafuse.ParafuseError as error:
            return str(error)
    return ""


def _read(file: str, name: str) -> Calibration:
    return Calibration.from_dict(json.loads(Path(file).read_text()), name)
