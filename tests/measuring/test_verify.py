"""`verify`: what it calls exact is, what is broken it finds, and it leaves the weights as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import parafuse
from parafuse.engine import standing as standing_module
from parafuse.engine import verify as verifying
from parafuse.engine.verify import EXACT, Verdict, verify
from parafuse.errors import UnsupportedError
from tests.dist.ranks import run_ranks
from tests.dist.test_negative import heads_come_back_in_another_order

ROOT = Path(__file__).resolve().parents[2]
CALL: dict[str, Any] = {
    "prompt": "a red apple", "num_inference_steps": 1, "width": 56, "height": 40, "output_type": "latent",
}  # fmt: skip


def verdicts(dtype: str = "float32") -> list[Verdict]:
    with parafuse.Engine.from_pretrained("emoji", parafuse.Config(dtype=dtype)) as engine:
        before = {name: p.clone() for name, p in engine.pipeline.transformer.named_parameters()}
        found = verify(engine, **CALL)
        after = dict(engine.pipeline.transformer.named_parameters())
        assert all(torch.equal(p, after[name]) and p.dtype == after[name].dtype for name, p in before.items())
        assert "forward" not in vars(engine.pipeline.transformer)
    return found


def test_every_layout_of_four_ranks() -> None:
    for found in run_ranks(verdicts, 4):
        assert [v.name for v in found] == ["ulysses 4", "ring 2 x ulysses 2", "ring 4"]
        assert all(v.exact and v.limit == EXACT for v in found), found


def test_16_bits_are_held_against_fp32() -> None:
    for found in run_ranks(verdicts, 2, "bfloat16"):
        assert [v.name for v in found] == ["ulysses 2", "ring 2"]
        assert all(v.exact and v.error and 100 * EXACT < v.error < v.limit < 0.1 for v in found), found


def broken() -> list[Verdict]:
    (target, name, replacement), = heads_come_back_in_another_order()  # fmt: skip
    with patch.object(target, name, replacement):
        return verdicts()


def test_what_is_broken_is_found() -> None:
    for found in run_ranks(broken, 2):
        assert not found[0].exact
        assert found[0].error is not None
        assert found[0].error > 0.01
        assert found[1].exact, "ring does not move heads"


def one_rank_wrong() -> list[Verdict]:
    """Only rank 1 sees a difference: all ranks must hear of it."""
    original = verifying.relative_error
    worse = (lambda got, want: original(got, want) + 1.0) if int(os.environ["RANK"]) == 1 else original
    with patch.object(verifying, "relative_error", worse):
        return verdicts()


def test_a_difference_on_one_rank_is_told_by_all() -> None:
    for found in run_ranks(one_rank_wrong, 2):
        assert [v.exact for v in found] == [False, False]


def refused() -> list[Verdict]:
    def refuse(*_: Any) -> Any:
        raise UnsupportedError("Block: cannot be split")

    with patch.object(standing_module, "derive", refuse):
        return verdicts()


def test_a_refusal_is_no_mismatch() -> None:
    for found in run_ranks(refused, 2):
        assert [(v.error, v.refused) for v in found] == [(None, "Block: cannot be split")] * 2


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    argv = [sys.executable, "-m", "parafuse", "verify", *arguments]
    return subprocess.run(
        argv, env=env | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )


def test_the_command(tmp_path: Path) -> None:
    done = command(tmp_path, "--ranks", "2", "--width", "64", "--height", "64", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["model"], said["ranks"]) == ("emoji", 2)
    assert [(row["layout"], row["exact"]) for row in said["layouts"]] == [({"ulysses": 2}, True), ({"ring": 2}, True)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 1", "--ranks 1: one rank has nothing to be compared with; give --ranks 2 or more."),
        ("--ranks 2 --steps 0", "--steps 0: must be a whole number of at least 1."),
        ("--ranks 2 --width 63", "--width 63: must be a multiple of 8"),
        ("--ranks 2 --model gone", "model='gone': does not exist"),
        ("--ranks 2 --cache interval:2", "--cache interval:2: changes what verify holds to be the same; leave it out"),
        (
            "--ranks 2 --ulysses 2",
            "verify: got parallel degrees, but every layout is tried",
        ),
    ],
)
def test_bad_input(tmp_path: Path, arguments: str, message: str) -> None:
    done = command(tmp_path, *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
