"""The folder of a batch: a line's result is there whole or not at all, and one batch at a time writes to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parafuse.errors import ConfigError
from parafuse.launch.batch.lines import Place
from parafuse.launch.batch.results import Results

PLACES = [Place(number, 0, f"{number:012x}") for number in (1, 2, 1500)]


def test_a_line_is_done_once_its_result_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path)
    written: list[Path] = []
    replace = Path.replace

    def cut_off(self: Path, target: Path) -> Path:
        if len(written) == 2:
            raise OSError("the power failed")
        written.append(Path(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut_off)
    with pytest.raises(OSError, match="power"):
        results.write(PLACES[0], [(".png", b"a"), (".png", b"b")], {"seed": 1})
    monkeypatch.undo()
    assert [one.suffix for one in written] == [".png", ".png"], "outputs come first"
    assert not results.is_done(PLACES[0])
    assert results.done() == set()
    results.write(PLACES[0], [(".png", b"a"), (".png", b"b")], {"seed": 1})
    assert results.is_done(PLACES[0])
    assert results.done() == {PLACES[0].stem}


def test_results_are_gathered_in_the_order_of_lines(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for place in (PLACES[2], PLACES[0]):
        results.write(place, [(".webp", b"x")], {"id": None, "seed": place.number, "receipt": {"prompt": "p"}})
    assert results.gather(iter(PLACES)) == 2
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(one["line"], one["seed"]) for one in found] == [(1, 1), (1500, 1500)]
    assert all((tmp_path / name).read_bytes() == b"x" for one in found for name in one["files"])
    assert not any("receipt" in one for one in found)
    assert json.loads((tmp_path / "000001" / f"{PLACES[2].stem}.json").read_text())["receipt"] == {"prompt": "p"}


def test_a_folder_belongs_to_one_batch(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "out")
    other = Results(results.folder).held({"model": "x"})
    with results.held({"model": "emoji"}), pytest.raises(ConfigError, match="another batch is writing"), other:
        raise AssertionError("two at once")
    with results.held({"model": "emoji"}):
        pass
    with pytest.raises(ConfigError, match="begun with another model"), results.held({"model": "other"}):
        raise AssertionError("mixed")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), Results(tmp_path / "file").held({}):
        raise AssertionError("no folder")
