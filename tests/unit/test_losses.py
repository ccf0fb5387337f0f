"""What lossy options cost is measured, and quoted where they are offered."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from parafuse.config import LOSSY, Config, Parallel
from parafuse.launch import losses
from parafuse.launch.options import options_of
from tools.losses import figures

ROOT = Path(__file__).parents[2]
LOSSLESS = {
    "parallel", "device", "timeout_s", "allow_pickle", "data", "cfg", "pipe", "ring", "ulysses", "tensor",
    "compile", "cuda_graphs", "rewrites", "text_encoders", "vae", "offload", "placement", "max_memory",
    "offload_folder",
}  # fmt: skip
"""Options that leave pictures as they are; the tests of each show it."""
FIELDS = {field.name: field for cls in (Config, Parallel) for field in dataclasses.fields(cls)}
LOSSY_FIELDS = {name: field for name, field in FIELDS.items() if LOSSY in field.metadata}


def test_every_option_is_lossless_or_says_what_it_loses() -> None:
    """A new option belongs to LOSSLESS, with a test that it is, or names its lossy values in its field's metadata."""
    assert set(FIELDS) == LOSSLESS | set(LOSSY_FIELDS)
    assert not LOSSLESS & set(LOSSY_FIELDS)
    assert "dtype" in LOSSY_FIELDS


@pytest.mark.parametrize("name", LOSSY_FIELDS)
def test_a_lossy_option_quotes_its_measured_loss(name: str) -> None:
    (option,) = [option for option in options_of(Config) if option.name == name]
    for value in losses.lossy_values(LOSSY_FIELDS[name]):
        found = losses.measured()[f"{name}={value}"]
        assert f"{value} PSNR {found['psnr_db']:.0f} dB" in option.help
        assert f"{found['right']} of {found['prompts']} pictures of the right thing" in option.help
    assert "Lossy. On emoji, against the exact run:" in option.help
    assert "a regression anchor, not a promise for another model" in option.help


@pytest.mark.parametrize("key", losses.measured())
def test_what_is_quoted_is_in_the_record(key: str) -> None:
    name, _, value = key.partition("=")
    assert value in losses.lossy_values(LOSSY_FIELDS[name])
    quoted = losses.measured()[key]
    record: dict[str, Any] = json.loads((ROOT / quoted["record"]).read_text())
    assert figures(record, quoted["record"]) == quoted
    assert (record[name], record["model"], record["dirty"]) == (value, "emoji", False)


def test_what_is_not_lossy_says_nothing() -> None:
    assert losses.said(FIELDS["ulysses"]) == ""
    assert all("Lossy" not in option.help for option in options_of(Config) if option.name not in LOSSY_FIELDS)
