"""The demo's own judgement: it must see a difference that is too large, and show it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "silence_libraries", lambda: None)
    return module


def pictures(demo: Any, off_by: int) -> list[tuple[Image.Image, float]]:
    """One grey picture per prompt; one pixel of the last is `off_by` brighter in blue."""
    images = [Image.new("RGB", (8, 8), (100, 100, 100)) for _ in demo.PROMPTS]
    images[-1].putpixel((3, 4), (100, 100, 100 + off_by))
    return [(image, 1.0) for image in images]


@pytest.mark.parametrize(("off_by", "too_much"), [(0, False), (1, False), (2, True), (155, True)])
def test_differences_are_seen(demo: Any, tmp_path: Path, monkeypatch: Any, off_by: int, too_much: bool) -> None:
    monkeypatch.setattr(demo, "by_plain_diffusers", lambda _device, _seed: pictures(demo, 0))
    plan = type("Plan", (), {"device": "cpu", "one_line": lambda _self: "2 ranks"})()
    monkeypatch.setattr(demo, "by_all_ranks", lambda _ranks, _seed: (pictures(demo, off_by), plan, "nothing"))
    monkeypatch.setenv("RANK", "0")
    out = tmp_path / "new" / "demo.png"
    if too_much:
        with pytest.raises(SystemExit) as caught:
            demo.main(out, 7)
        assert caught.value.code == 1
    else:
        demo.main(out, 7)
    with Image.open(out) as sheet:
        assert sheet.size == (816, 1206)


def test_other_ranks_write_nothing(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "by_all_ranks", lambda _ranks, _seed: ([], None, ""))
    monkeypatch.setattr(demo, "by_plain_diffusers", None)
    monkeypatch.setenv("RANK", "1")
    demo.main(tmp_path / "demo.png", 7)
    assert list(tmp_path.iterdir()) == []
