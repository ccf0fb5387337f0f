"""The record that travels with a picture: in the PNG and beside it, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import parafuse
from parafuse.config import Axis
from parafuse.engine.plan import Plan
from parafuse.engine.receipt import plain, read_receipt, save_image, versions

PLAN = Plan(model="emoji", model_id="0", world_size=1, degrees={str(axis): 1 for axis in Axis}, device="cpu",
            dtype="float32", timeout_s=60.0)  # fmt: skip
RECEIPT: dict[str, Any] = {"seed": 7, "call": {"prompt": 'ein Apfel — 🍎 "red"\n'}, "plan": PLAN.to_dict()}


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (8, 4), colour)


def test_a_png_carries_its_receipt_and_another_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "apple.png"
    save_image(picture(), path, RECEIPT)
    assert read_receipt(path) == RECEIPT
    assert json.loads((tmp_path / "apple.json").read_text()) == RECEIPT
    assert sorted(file.name for file in tmp_path.iterdir()) == ["apple.json", "apple.png"]
    with Image.open(path) as image:
        assert image.convert("RGB").tobytes() == picture().tobytes()
    assert Plan.load(tmp_path / "apple.json") == PLAN


def test_a_receipt_changes_no_pixel(tmp_path: Path) -> None:
    noise = Image.effect_noise((32, 32), 80).convert("RGB")
    save_image(noise, str(tmp_path / "a.PNG"), RECEIPT)
    with Image.open(tmp_path / "a.PNG") as image:
        assert image.tobytes() == noise.tobytes()
    assert read_receipt(tmp_path / "a.PNG") == RECEIPT


def test_other_formats_have_the_receipt_beside_them(tmp_path: Path) -> None:
    save_image(picture(), tmp_path / "apple.jpg", RECEIPT)
    assert json.loads((tmp_path / "apple.json").read_text()) == RECEIPT
    with pytest.raises(KeyError):
        read_receipt(tmp_path / "apple.jpg")


def test_a_png_without_a_receipt(tmp_path: Path) -> None:
    picture().save(tmp_path / "plain.png")
    with pytest.raises(KeyError):
        read_receipt(tmp_path / "plain.png")


def test_an_older_picture_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "apple.png"
    save_image(picture(), path, {"seed": 1})
    save_image(picture("blue"), path, {"seed": 2})
    assert read_receipt(path) == {"seed": 2}
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)


def test_a_failure_leaves_the_older_picture_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "apple.png"
    save_image(picture(), path, {"seed": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def half(self: Image.Image, target: Any, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_image(picture("blue"), path, {"seed": 2})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_picture_appears_only_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "apple.png", []
    save = Image.Image.save

    def watch(self: Image.Image, target: Any, **options: Any) -> None:
        save(self, target, **options)
        seen.append((Path(target).parent == tmp_path, path.exists()))

    monkeypatch.setattr(Image.Image, "save", watch)
    save_image(picture(), path, RECEIPT)
    assert seen == [(True, False)]  # in the same folder, so that the last step is one rename
    assert path.exists()


def test_what_json_cannot_hold_is_named_by_its_type() -> None:
    values = {"a": [1, 2.5, None, True, "x"], 3: (1, {"b": picture()}), "c": object(), "d": Path("/x")}
    assert plain(values) == {
        "a": [1, 2.5, None, True, "x"],
        "3": [1, {"b": "<Image>"}],
        "c": "<object>",
        "d": f"<{type(Path('/x')).__name__}>",
    }
    assert json.loads(json.dumps(plain(values))) == plain(values)


def test_versions_are_those_that_decide_the_picture() -> None:
    import diffusers
    import torch
    import transformers

    assert versions() == {
        "parafuse": parafuse.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
