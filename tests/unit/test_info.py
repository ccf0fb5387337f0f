"""`parafuse info`: what is missing is said with what it prevents; both forms hold all facts."""

from __future__ import annotations

import builtins
import dataclasses
import json
from typing import Any

import pytest

from parafuse.hardware import PACKAGES, Gpu, Hardware
from parafuse.launch import survey as surveying
from parafuse.launch.info import show_info, table

BARE = Hardware(
    platform="Linux", python="3.11.0", cpu="some CPU", cpu_flags=[], cores=2, machine_cores=4, memory_bytes=2**34
)
H200 = Gpu(name="NVIDIA H200", memory_bytes=141 * 2**30, capability="9.0", nvlinks=18)
ALL: dict[str, str | None] = dict.fromkeys(PACKAGES, "1.0")


@pytest.mark.parametrize(
    ("facts", "lacking", "cuda_build", "compiler", "first_words"),
    [
        (dataclasses.replace(BARE, gpus=[H200]), (), "13.0", "g++", []),
        (BARE, (), None, "g++", ["NVIDIA GPU"]),
        (dataclasses.replace(BARE, gpus=[H200]), ("triton",), None, "g++", ["CUDA build of torch", "triton"]),
        (dataclasses.replace(BARE, gpus=[H200]), ("flash-attn",), "13.0", "g++", []),
        (dataclasses.replace(BARE, gpus=[H200]), ("flash-attn", "flash-attn-3"), "13.0", "g++", ["flash-attn"]),
        (BARE, ("torch", "nvidia-ml-py", "torchao"), None, None, ["torch", "nvidia-ml-py", "torchao", "C++ compiler"]),
    ],
)
def test_missing_says_what_for(
    facts: Hardware, lacking: tuple[str, ...], cuda_build: str | None, compiler: str | None, first_words: list[str]
) -> None:
    lines = surveying.missing(facts, ALL | dict.fromkeys(lacking), cuda_build, compiler=compiler)
    assert len(lines) == len(first_words)
    assert all(line.startswith(word) for line, word in zip(lines, first_words, strict=True))
    assert all(": " in line for line in lines)


def test_info_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    show_info(as_json=False)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("cores", "memory", "torch", "diffusers", "gloo", "nccl"))
    show_info(as_json=True)
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(facts) == {
        "parafuse",
        "hardware",
        "versions",
        "cuda_build",
        "collectives",
        "attention",
        "tuned",
        "missing",
    }
    assert facts["collectives"]["gloo"] is True


def test_info_shows_each_gpu() -> None:
    facts = dataclasses.replace(surveying.survey(), hardware=dataclasses.replace(BARE, gpus=[H200], driver="580.1"))
    cells = [str(cell) for column in table(facts).columns for cell in column.cells]
    assert "NVIDIA H200, 141 GiB, compute capability 9.0, 18 NVLinks" in cells
    assert "580.1" in cells


def test_survey_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = surveying.importlib.util.find_spec
    monkeypatch.setattr(surveying.importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    imported = builtins.__import__

    def no_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith("torch")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    facts = surveying.survey()
    assert (facts.cuda_build, facts.collectives, facts.attention) == (None, {}, [])
