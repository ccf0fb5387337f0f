"""Plans that are kept between processes: used where they hold, found again where they do not, never in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from parafuse.engine import derive as derive_module
from parafuse.engine import plan_store
from parafuse.engine.derive import derive
from parafuse.engine.kept import FOLDER_ENV
from parafuse.engine.probe import probe
from parafuse.parallel.block_plan import BlockPlan, Site, TokenDim
from tests.unit.test_probe_refusals import D, Good, Mean

OF_ANOTHER = '{"arguments": {"7": [1, [0]]}, "sites": [[[0], [0]]], "results": {"9": [1, [0]]}, "why_not_local": ""}'


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_ENV, str(tmp_path))
    return tmp_path / "plans"


def arguments(tokens: int = 7) -> Any:
    return tree_flatten(((torch.randn(2, tokens, D, generator=torch.Generator().manual_seed(0)),), {}))


def derived(block: Good, tokens: int = 7) -> BlockPlan:
    return derive(block, block.forward, *arguments(tokens))


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes that are probed."""
    seen: list[str] = []

    def counting(block: Any, *args: Any) -> BlockPlan:
        seen.append(type(block).__name__)
        return probe(block, *args)

    monkeypatch.setattr(derive_module, "probe", counting)
    return seen


def test_a_plan_is_found_once(kept: Path, probes: list[str]) -> None:
    first = derived(Good())
    assert first.splits
    assert derived(Good(), tokens=11) == first
    assert probes == ["Good"]
    assert [json.loads(file.read_text())["block"] for file in kept.iterdir()] == ["Good"]


def test_a_plan_that_does_not_hold_is_found_again(kept: Path, probes: list[str]) -> None:
    right = derived(Good())
    key = plan_store.key_of(Good(), *arguments())
    plan_store.save_plan(key, "Good", BlockPlan({0: TokenDim(2, (0,))}, (Site((0,), (0,)),), {0: TokenDim(2, (0,))}))
    assert derived(Good()) == right == plan_store.load_plan(key)
    assert probes == ["Good", "Good"]


def test_whole_shapes_are_not_kept(kept: Path, probes: list[str]) -> None:
    for _ in range(2):
        assert derived(Mean()).why_not_local
    assert probes == ["Mean", "Mean"]
    assert not kept.exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"arguments": 1}', '{"arguments": {"0": [1]}}', OF_ANOTHER])
def test_a_file_that_cannot_be_read_is_written_again(kept: Path, probes: list[str], text: str) -> None:
    derived(Good())
    (file,) = kept.iterdir()
    file.write_text(text)
    assert derived(Good()).splits
    assert probes == ["Good", "Good"]
    assert json.loads(file.read_text())["block"] == "Good"


def test_no_folder_and_a_folder_that_cannot_be_made(
    probes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for named in ("", str(tmp_path / "file")):
        monkeypatch.setenv(FOLDER_ENV, named)
        assert derived(Good()).splits
    assert probes == ["Good", "Good"]
    monkeypatch.delenv(FOLDER_ENV)
    assert plan_store.folder() is not None


def test_other_settings_are_another_key() -> None:
    changed = Good()
    changed.size = 3  # type: ignore[assignment]
    keys = {plan_store.key_of(block, *arguments()) for block in (Good(), changed, Mean())}
    assert len(keys) == 3
    assert plan_store.key_of(Good(), *arguments(7)) == plan_store.key_of(Good(), *arguments(11))
    assert plan_store.key_of(Good(), *arguments(1)) != plan_store.key_of(Good(), *arguments(7))
