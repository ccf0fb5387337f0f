"""A quantized model on a disk: loaded in a fresh process without the original, here and by plain diffusers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parafuse
from parafuse.engine.quantize.saved import RECORD
from parafuse.errors import ConfigError
from tests import pipelines

CALL: dict[str, Any] = {
    "prompt": "a red apple", "negative_prompt": "cat", "width": 32, "height": 24, "num_inference_steps": 2,
    "max_sequence_length": 16, "output_type": "latent",
}  # fmt: skip
METHODS = {
    "fp8": "fp8:reference=true,min_features=16",
    "fp8-weight": "fp8-weight:min_features=8,text_encoders=int8-weight",
    "int8": "int8:min_features=8",
    "int8-weight": "int8-weight:min_features=8",
}
FRESH = """
import json, sys, torch
call = json.loads(sys.argv[3])
if sys.argv[1] == "diffusers":
    import diffusers
    run = diffusers.DiffusionPipeline.from_pretrained(sys.argv[2], dtype=torch.float32)
    latents = run(**call, generator=torch.Generator().manual_seed(7)).images
    kept = type(run.transformer.transformer_blocks[0].attn.to_q.weight).__name__
else:
    import parafuse
    with parafuse.Engine.from_pretrained(sys.argv[2], parafuse.Config(quantize=sys.argv[5] or None)) as engine:
        latents = engine(**call, seed=7).images
        kept = type(engine.pipeline.transformer.transformer_blocks[0].attn.to_q.weight).__name__
        assert engine.receipt["weights"]["transformer"] == "float32, torchao", engine.receipt["weights"]
torch.save((latents, kept), sys.argv[4])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.sd3(tmp_path_factory.mktemp("quantize") / "sd3")


def fresh(where: str, folder: Path, out: Path, quantize: str = "") -> tuple[Tensor, str]:
    command = [sys.executable, "-c", FRESH, where, str(folder), json.dumps(CALL), str(out), quantize]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("name", METHODS)
def test_a_saved_engine_is_loaded_without_the_original(name: str, model: Path, tmp_path: Path) -> None:
    folder, text = tmp_path / "packed", METHODS[name]
    with parafuse.Engine.from_pretrained(str(model), parafuse.Config(quantize=text)) as engine:
        want = engine(**CALL, seed=7).images
        engine.save(folder)
    exact, _ = fresh("diffusers", model, tmp_path / "exact.pt")
    assert 1e-4 < (exact - want).abs().max() < 0.5, "control: something was quantized, and is near"
    size = (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < (model / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    for where in ("diffusers", "parafuse"):
        again = "fp8:reference=true,min_features=16" if name == "fp8" else ""
        found, kept = fresh(where, folder, tmp_path / f"{where}.pt", again)
        apart = (found - want).abs().max() / want.abs().max()
        assert apart <= 1e-5, where  # where a tensor lies in memory may choose another kernel of the CPU
        assert kept == ("Float8Tensor" if name.startswith("fp8") else "Int8Tensor")
    record = json.loads((folder / RECORD).read_text())
    assert record["transformer"].startswith(f"{name}:")
    assert "reference=true" not in record["transformer"], "what a CPU may compute is no property of weights"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "parafuse", *arguments], check=False, capture_output=True, text=True, timeout=240
    )


SMALL = ("--steps", "1", "--width", "32", "--height", "24", "--set", "max_sequence_length=16")


def test_the_command_measures_and_writes(model: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "packed", ("quantize", "a red apple", "--model", str(model), *SMALL)
    done = command(*given, "--quantize", METHODS["fp8"], "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    errors = {f"{one['component']}.{one['pattern']}": one["error"] for one in told["groups"]}
    number = told["quantized"]["transformer"]["num_quantized"]
    assert (len(errors), number, told["over_the_limit"]) == (12, 21, [])
    assert all(1e-6 < error < 0.1 for error in errors.values())
    assert max(errors.values()) < 1.5 * told["errors"]["transformer"] < 6 * sum(errors.values())
    assert told["weight_bytes"]["after"] < told["weight_bytes"]["before"]
    again = command(*given, "--quantize", METHODS["int8"], "--out", str(out))
    assert (again.returncode, "is there already; give a new folder" in again.stderr) == (2, True)
    limit = sorted(errors.values())[-4] * 1.0001
    left = command(*given, "--quantize", METHODS["fp8"], "--json", "--limit", str(limit))
    over = json.loads(left.stdout)
    assert set(over["over_the_limit"]) == {name for name, error in errors.items() if error > limit}
    assert len(over["over_the_limit"]) == 3
    assert over["errors"]["transformer"] < told["errors"]["transformer"]
    assert over["quantized"]["transformer"]["num_quantized"] < number
    for name in over["over_the_limit"]:
        assert f"{name}" in over["method"]


def test_what_is_saved_is_told_before_it_is_loaded(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    with parafuse.Engine.from_pretrained(str(model), parafuse.Config(quantize=METHODS["fp8"])) as engine:
        engine.save(out)
    with pytest.raises(ConfigError, match="is saved in fp8: a CPU has no fp8"):
        parafuse.Engine.from_pretrained(str(out))
    with pytest.raises(ConfigError, match=r"is saved in fp8:.*, and stays so"):
        parafuse.Engine.from_pretrained(str(out), parafuse.Config(quantize="int8"))
    weights = tmp_path / "weights"
    with parafuse.Engine.from_pretrained(str(model), parafuse.Config(quantize=METHODS["fp8-weight"])) as engine:
        engine.save(weights)
    with pytest.raises(ConfigError, match="from float32, and is computed in that: give dtype=float32"):
        parafuse.Engine.from_pretrained(str(weights), parafuse.Config(dtype="bfloat16"))
    two = parafuse.Config(parallel=parafuse.Parallel(ulysses=2))
    with parafuse.Engine.from_pretrained(str(weights), two) as engine:  # text encoders in 8 bits are alike on all ranks
        assert engine(**CALL, seed=7).images.isfinite().all()
    packed = command("quantize", "--model", str(out), "--quantize", "int8")
    assert (packed.returncode, "is saved in fp8 already; give it as it was" in packed.stderr) == (2, True)


def test_calibrated_scales_are_measured_and_kept(model: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "packed", "fp8:scale=calibrated,reference=true,min_features=16"
    given = ("--model", str(model), "--first", "2", *SMALL, "--json", "--out", str(out))
    done = command("quantize", "--quantize", text, *given)
    assert done.returncode == 0, done.stderr
    largest = {one["pattern"]: one["largest"] for one in json.loads(done.stdout)["groups"]}
    config = parafuse.Config(quantize=text)
    with parafuse.Engine.from_pretrained(str(out), config) as engine:
        layers = [block.ff.net[2] for block in engine.pipeline.transformer.transformer_blocks]
        maxima = [layer.weight.act_quant_kwargs for layer in layers]
        assert engine(**CALL, seed=7).images.isfinite().all()
    assert {one.hp_value_lb == one.hp_value_ub for one in maxima} == {True}
    assert len({one.hp_value_ub for one in maxima}) == len(layers), "each layer has its own"
    assert max(one.hp_value_ub for one in maxima) == largest["transformer_blocks.*.ff.net.*"]
    with pytest.raises(ConfigError, match="scale=calibrated: must be measured; parafuse quantize"):
        parafuse.Engine.from_pretrained(str(model), config)


def test_what_cannot_be_measured_is_refused_in_one_line() -> None:
    for arguments, words in (
        ((), "say what to quantize with: fp8, fp8-weight, int8 or int8-weight"),
        (("--quantize", "fp8"), "a CPU has no fp8 matrix products"),
        (("--quantize", "int8", "--limit", "0"), "--limit 0.0: must be a number above 0"),
        (("--quantize", "int8:keep_originals=true"), "is for a model in memory; leave it out"),
    ):
        done = command("quantize", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
