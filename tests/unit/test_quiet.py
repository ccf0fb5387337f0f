"""What the command line imports and prints in a process of its own: no torch for --help, no noise of libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def fresh(code: str, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`code` in a new Python."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def parafuse_without_torch(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The command line where importing torch ends the process."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code = f"from parafuse.launch.cli import main; main({list(argv)!r})"
    return fresh(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")


def test_help_and_usage_errors_import_no_torch(tmp_path: Path) -> None:
    assert parafuse_without_torch(tmp_path, "--help").returncode == 0
    assert parafuse_without_torch(tmp_path, "generate", "--help").returncode == 0
    done = parafuse_without_torch(tmp_path, "generate", "a", "--stepz", "3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    control = parafuse_without_torch(tmp_path, "info")
    assert control.stderr == "torch was imported\n"


def test_libraries_are_silent_only_when_asked() -> None:
    noisy = "import logging, warnings; logging.getLogger('library').warning('advice'); warnings.warn('more advice')"
    loud = fresh("import parafuse, parafuse.launch.cli; " + noisy)
    assert loud.stderr.count("advice") >= 2
    silence = "from parafuse.launch.quiet import silence_libraries; silence_libraries(); "
    assert fresh(silence + noisy).stderr == ""
    assert "error" in fresh(silence + "import logging; logging.error('error')").stderr
    assert "more advice" in fresh(silence + noisy, "-W", "default").stderr


def test_diffusers_and_torchao_import_in_silence() -> None:
    code = """
from parafuse.launch import quiet
quiet.silence_libraries()
import diffusers, torchao
from diffusers import FluxPipeline
quiet.hide_loading_bars()
"""
    done = fresh(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_notes_can_be_silenced() -> None:
    note = "from parafuse import log; log.note('hello')"
    assert fresh(note).stderr == "parafuse: hello\n"
    assert fresh("from parafuse.launch.quiet import silence_notes; silence_notes(); " + note).stderr == ""


def test_keywords_of_a_pipeline_are_those_that_python_sees() -> None:
    code = """
import inspect, sys
from parafuse.launch.keywords import accepted_keywords
names = ["FluxPipeline", "StableDiffusion3Pipeline", "WanPipeline", "Flux2Pipeline"]
read = {name: accepted_keywords(name) for name in names}
assert "torch" not in sys.modules and "diffusers" not in sys.modules
assert accepted_keywords("NoSuchPipeline") is accepted_keywords("StableDiffusionXLPipeline") is None  # it takes any
import diffusers
for name in names:
    assert read[name] == list(inspect.signature(getattr(diffusers, name).__call__).parameters)[1:], name
"""
    done = fresh(code)
    assert done.returncode == 0, done.stderr
