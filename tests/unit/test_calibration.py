"""Calibration files: what is written is read again, what is none is refused, and another model's is not used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parafuse
from parafuse import Config, Plan, TeaCache
from parafuse.cache import calibration_of, with_calibration
from parafuse.calibration import Calibration
from parafuse.engine.caches.choose import architecture_of
from parafuse.engine.calibrate import WATCHING, Point, by_step, calibrate, polynomial
from parafuse.engine.planner import resolve
from parafuse.engine.source import ModelSource, locate
from parafuse.errors import ConfigError
from parafuse.launch.calibrate import Calibrate, prepare, run
from parafuse.launch.cli import CONFIG_OPTIONS
from tests.models import build
from tests.pipelines import sd3

SOURCE = ModelSource(name="emoji", path="/nowhere", kind="folder", model_id="0123")
CALL: dict[str, Any] = dict(height=16, width=24, num_inference_steps=8, output_type="latent", prompt="a cat")


def values(**changes: Any) -> dict[str, Any]:
    one = dict(architecture="Net 01", polynomial=[0.0, 1.0], between=[0.1, 0.5], ratios=[[1.0, 0.9, 0.8]])
    whole = dict(
        schema=1, model="emoji", model_id="0123", steps=3, prompts=2, versions={}, denoisers={"transformer": one}
    )
    return whole | changes


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def denoiser(**changes: Any) -> dict[str, Any]:
    return {"denoisers": {"transformer": values()["denoisers"]["transformer"] | changes}}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = Calibration.read(written(tmp_path / "x.json", values()))
    found.write(str(tmp_path / "y.json"), {"transformer": {"input_changes": [[None, 0.1]]}})
    again = Calibration.read(str(tmp_path / "y.json"))
    assert again == found
    assert again.file == str(tmp_path / "y.json")
    assert again.to_dict() == values()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold one JSON object"),
        (values(schema=2), "schema 2; this version reads 1"),
        (values(steps="3"), "steps is '3', which it cannot be"),
        (values(stepz=3), "stepz"),
        (values(denoisers={}), "has no denoiser"),
        (values(**denoiser(ratios=[[1.0, 0.9]])), "must have a number for each of 3 steps"),
        (values(**denoiser(ratios=[[1.0, 0.0, 1.0]])), "ratios: 0.0 is no number that it can have"),
        (values(**denoiser(ratios=[])), "must have a list for each branch"),
        (values(**denoiser(polynomial=[])), "polynomial: None is no number"),
        (values(**denoiser(polynomial=["1"])), "polynomial: '1' is no number"),
        (values(**denoiser(between=[0.5, 0.1])), "must be the least and the largest change"),
        (values(**denoiser(architecture=None)), "architecture: must be a text"),
        (values(**denoiser(ratio=[])), "ratio"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: Any, fault: str) -> None:
    file = written(tmp_path / "x.json", content)
    with pytest.raises(ConfigError, match=fault) as caught:
        with_calibration(TeaCache(calibration=file))
    assert file in str(caught.value)
    with pytest.raises(ConfigError, match="does not exist"):
        with_calibration(TeaCache(calibration=str(tmp_path / "none.json")))


def test_the_plan_holds_what_the_file_holds(tmp_path: Path) -> None:
    file = written(tmp_path / "x.json", values())
    plan = resolve(Config(cache=f"teacache:0.2,calibration={file}"), SOURCE, 1)
    Path(file).unlink()
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    cache = again.cache_with_calibration()
    assert calibration_of(cache) == Calibration.from_dict(values())
    assert str(cache) == plan.cache
    with pytest.raises(ConfigError, match=r"plan\.calibration: does not fit .*; make the plan anew"):
        Plan.from_dict(plan.to_dict() | {"calibration": None})
    with pytest.raises(ConfigError, match=r"plan\.calibration: does not fit .*; leave it out"):
        Plan.from_dict(plan.to_dict() | {"cache": "teacache:0.2"})


def test_another_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    file = written(tmp_path / "x.json", values(model_id="4567", model="other"))
    with pytest.raises(ConfigError, match=r"was measured on 'other' \(model_id '4567'\), not on 'emoji'"):
        parafuse.Engine.from_pretrained("emoji", Config(cache=f"magcache:0.1,calibration={file}"))


def test_apply_looks_at_the_denoiser(tmp_path: Path) -> None:
    model = build("flux")
    file = written(tmp_path / "x.json", values())
    with pytest.raises(ConfigError, match=r"with transformer \(Net 01\); FluxTransformer2DModel \(FluxTransformer2D"):
        parafuse.apply(model, Config(cache=f"magcache:0.1,calibration={file}"))
    assert "forward" not in vars(model)
    fits = written(tmp_path / "x.json", values(**denoiser(architecture=architecture_of(model))))
    with parafuse.apply(model, Config(cache=f"magcache:0.1,calibration={fits}")) as handle:
        assert handle.applied == [f"cache {handle.cache} on FluxTransformer2DModel"]


def test_the_fit_gives_back_a_polynomial() -> None:
    inputs = list(np.linspace(0.05, 0.4, 30))
    true = [0.02, 1.5, -3.0, 4.0, 2.0]
    found = polynomial(inputs, [sum(c * x**k for k, c in enumerate(true)) for x in inputs])
    assert found == pytest.approx(true, rel=1e-6)
    assert polynomial([0.1, 0.2], [0.2, 0.4]) == pytest.approx((0.0, 2.0), abs=1e-9)
    assert polynomial([0.1], [0.3]) == pytest.approx((0.0, 3.0))


def test_means_by_branch_and_step() -> None:
    points = [Point(2, 0, 0.1, 0.2, 0.9), Point(2, 0, 0.3, 0.2, 0.7), Point(3, 1, 0.5, 0.1, 2.0)]
    assert by_step(points, 4, lambda p: p.size) == [[None, None, pytest.approx(0.8), None], [None, None, None, 2.0]]


def test_a_model_is_measured_saved_and_loaded_with_what_was_measured(tmp_path: Path) -> None:
    folder = str(sd3(tmp_path / "sd3", num_layers=3))
    with parafuse.Engine.from_pretrained(folder, Config(cache=WATCHING)) as engine:
        found = calibrate(engine, [CALL | {"seed": seed} for seed in (0, 1)])
        assert all("s" not in letters for letters in engine.receipt["cache"]["decisions"]["transformer"])
    file = tmp_path / "x.json"
    found.write(str(file))
    ratios = Calibration.read(str(file)).denoisers["transformer"].ratios
    assert found.calibration.steps == 8
    assert len(ratios[0]) == 8
    assert len(set(ratios[0])) > 3
    changes = found.curves["transformer"]["input_changes"][0]
    least, most = found.calibration.denoisers["transformer"].between
    assert all(least <= change <= most for change in changes if change is not None)
    with parafuse.Engine.from_pretrained(folder, Config(cache=f"magcache:1e9,calibration={file}")) as engine:
        want = engine(**CALL, seed=3).images
        decisions = engine.receipt["cache"]["decisions"]
        engine.save(tmp_path / "saved")
    file.unlink()
    assert any("s" in letters for letters in decisions["transformer"])
    with parafuse.Engine.load(tmp_path / "saved") as engine:
        assert engine.loaded["plan"] == "used"
        assert engine.plan.calibration is not None
        assert torch.equal(engine(**CALL, seed=3).images, want)
        assert engine.receipt["cache"]["decisions"] == decisions


def test_the_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(sd3(tmp_path / "sd3", num_layers=3)), str(tmp_path / "x.json")
    asked = Calibrate(model=folder, out=out, steps=6, height=16, width=24, guidance=5.0, first=2, quiet=False)
    job = prepare(None, asked, CONFIG_OPTIONS, {})
    assert len(job.prompts) == 2
    run(job)
    assert capsys.readouterr().out == f"{out}  (transformer: 2 prompts, 6 steps)\n"
    found = Calibration.read(out)
    assert (found.model, found.prompts, found.steps) == (folder, 2, 6)
    assert found.versions.keys() == {"parafuse", "torch", "diffusers", "transformers"}
    plan = resolve(Config(cache=f"teacache:0.2,calibration={out}"), locate(folder), 1)
    assert plan.calibration == found.to_dict()


def test_too_few_steps_tell_nothing(tmp_path: Path) -> None:
    folder = str(sd3(tmp_path / "sd3", num_layers=3))
    with (
        parafuse.Engine.from_pretrained(folder, Config(cache=WATCHING)) as engine,
        pytest.raises(ConfigError, match="transformer told nothing: the first steps have nothing"),
    ):
        calibrate(engine, [CALL | {"num_inference_steps": 2, "seed": 0}])


@pytest.mark.parametrize(
    ("asked", "typed", "fault"),
    [
        (dict(), {"cache": "teacache:0.2"}, "everything is computed while a model is measured; leave it out"),
        (dict(out="x.txt"), {}, "--out 'x.txt': the file name must end in .json"),
        (dict(prompts="none.txt"), {}, "--prompts 'none.txt': a prompt is given too"),
        (dict(model="emojy"), {}, "emoji"),
    ],
)
def test_what_cannot_be_measured_is_refused(asked: dict[str, Any], typed: dict[str, Any], fault: str) -> None:
    with pytest.raises(parafuse.ParafuseError, match=fault):
        prepare("a cat", Calibrate(**asked), CONFIG_OPTIONS, typed)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="--steps 4: must be at least 5"):
        Calibrate(steps=4)
    with pytest.raises(ConfigError, match="--first 0: must be at least 1"):
        Calibrate(first=0)
