"""A part of the table of options, which leaves nothing out; a rewrite that does nothing is no success."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.options import cells
from tests.options.cells import OPTIONS, PIPELINES, SETTINGS, cell_of
from tests.options.table import page

FIXED_PART = {
    ("FLUX.1", "fp8"): ("Ulysses 2", "ring 2", "model offload"),
    ("FLUX.1", "fp8-weight"): ("one rank",),
    ("FLUX.1", "int8-weight"): ("group offload",),
    ("FLUX.1", "rewrites rope and compile"): ("one rank",),
    ("FLUX.1", "offload group"): ("Ulysses 2", "LoRA"),
    ("FLUX.1", "offload, quantize and compile"): ("one rank",),
    ("Wan 2.1", "offload and first-block cache"): ("Ulysses 2",),
    ("FLUX.1", "placement on a disk"): ("data 2",),
    ("Stable Diffusion XL", "text encoders on one rank"): ("data 2",),
    ("Stable Diffusion XL", "offload model"): ("cfg 2",),
    ("HunyuanVideo", "offload and compile"): ("one rank",),
    ("FLUX.1", "all of them"): ("Ulysses 2, cache, LoRA",),
    ("Wan 2.1", "int8"): ("cfg 2", "cache of stacks"),
    ("Wan 2.1", "int8-weight and compile"): ("one rank",),
    ("Wan 2.1", "sparse"): ("Ulysses 2, cache, LoRA", "cfg 2"),
    ("HunyuanVideo", "sparse and compile"): ("one rank",),
    ("Stable Diffusion XL", "attention math"): ("group offload",),
    ("Wan 2.1", "rewrites modulation"): ("group offload",),
    ("Stable Diffusion 3", "compile"): ("cfg 2",),
    ("Stable Diffusion XL", "rewrites qkv"): ("cfg 2", "data 2"),
    ("HunyuanVideo", "rewrites text"): ("one rank", "ring 2", "data 2", "LoRA", "cache of parts"),
}
"""Every option and every setting at least once."""
WITH_INDUCTOR = ("all of them", "rewrites rope and compile")
"""What torch's own compiler makes: half a minute each. The others are compiled with a backend that is quick:
what parafuse adds is in the graphs, not in their kernels. `make options` has inductor in all."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cells keep what they have found of blocks."""
    return tmp_path_factory.mktemp("kept")


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize(
    ("pipeline", "option", "setting"), [(*key, setting) for key, settings in FIXED_PART.items() for setting in settings]
)
def test_a_cell_is_right(
    pipeline: str, option: str, setting: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAFUSE_CACHE", str(folder))
    backend = "inductor" if option in WITH_INDUCTOR else "aot_eager"
    cell = cell_of(pipeline, OPTIONS[option], SETTINGS[setting], backend)
    assert (cell.fault, cell.refused) == ("", "")


def test_the_fixed_part_has_every_option_setting_and_pipeline() -> None:
    assert {option for _, option in FIXED_PART} == set(OPTIONS)
    assert {name for names in FIXED_PART.values() for name in names} == set(SETTINGS)
    assert {pipeline for pipeline, _ in FIXED_PART} == set(PIPELINES)


def test_a_rewrite_must_say_that_it_acted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("Stable Diffusion XL", OPTIONS["rewrites text"], SETTINGS["one rank"])
    cell = cell_of(*given)
    assert (cell.fault, cell.error) == ("", 0)
    assert "left whole" in cell.idle
    shown = page({"Stable Diffusion XL": {"rewrites text": {"one rank": cell}}})
    assert "| rewrites text | 0, idle (1) |" in shown
    assert f"1. {cell.idle}" in shown
    monkeypatch.setattr(cells, "NOTHING_TO_DO", {})
    assert "rewrite text did nothing" in cell_of(*given).fault
