"""What a model's folder lacks is said before anything is loaded, with a way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from parafuse.engine.folder import check_folder
from parafuse.engine.source import EMBEDDED, locate
from parafuse.errors import ModelError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED / "emoji", tmp_path / "model"))


def edit_index(folder: Path, **values: object) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def half_a_file(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def a_lost_part(folder: Path) -> None:
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).rename(folder / "transformer" / "part-1.safetensors")


def not_fetched(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: shutil.rmtree(f / "vae"), "has no folder 'vae', which model_index.json names. Download"),
    "no such pipeline": (
        lambda f: edit_index(f, _class_name="FooPipeline"),
        "names the pipeline 'FooPipeline', which this version of diffusers has not. Install",
    ),
    "half a file": (half_a_file, f"{WEIGHTS}': has "),
    "a lost part": (a_lost_part, "transformer/part-2.safetensors is missing. Download"),
    "not fetched": (not_fetched, "cannot be read as safetensors"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_missing_is_named(folder: Path, name: str) -> None:
    locate(str(folder))
    spoil, message = FAULTS[name]
    spoil(folder)
    with pytest.raises(ModelError) as refusal:
        locate(str(folder))
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("model='")


def test_what_the_caller_brings_need_not_be_there(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    assert locate(str(folder), given={"vae": None}).pipeline_class == "FluxPipeline"


def test_what_model_index_does_not_ask_for(folder: Path) -> None:
    """Optional parts stand there as nulls, settings as values; a pipeline of the folder's own needs no known name."""
    edit_index(folder, safety_checker=[None, None], requires_safety_checker=True)
    locate(str(folder))
    edit_index(folder, _class_name="FooPipeline")
    (folder / "pipeline.py").write_text("")
    check_folder("x", folder, json.loads((folder / "model_index.json").read_text()), ())
