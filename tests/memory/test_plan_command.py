"""`parafuse plan`, and the refusal of what cannot fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parafuse.config import Config
from parafuse.engine.engine import Engine
from parafuse.engine.loading_checks import check_loading
from parafuse.engine.memory import check
from parafuse.engine.memory.fake_pipeline import bytes_by_path, fake_mode, fake_pipeline, nbytes
from parafuse.engine.planner import resolve
from parafuse.engine.source import ModelSource, embedded_models, locate
from parafuse.errors import ConfigError
from parafuse.launch import cli
from tests.pipelines import unet


def plan(*words: str) -> int:
    return cli.run(cli.Launch(["plan", *words], supervised=False))


def test_a_plan_needs_no_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("random:flux.1-dev", "--device", "cuda", "--ranks", "8") == 0
    assert "8 ranks: ulysses 8, bfloat16 on cuda" in capsys.readouterr().out


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("emoji", "--ranks", "2", "--ring", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["degrees"]["ring"] == 2


def test_memory_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("emoji", "--memory", "--json", "--steps", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["weights"]) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert found["nbytes"] == max(one["nbytes"] for one in found["first"].values())
    one = found["first"]["denoise"]
    parts = ("weights", "activations", "exchange", "kept", "pipeline", "libraries")
    assert one["nbytes"] == sum(one[name] for name in parts)
    assert plan("emoji", "--memory", "--steps", "2") == 0
    assert "most at a time: 57.77 MB (decode, in vae: aten.convolution.default" in capsys.readouterr().out


@pytest.mark.whole
def test_what_is_elsewhere_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    there = ("--device", "cuda", "--steps", "2", "--placement", "balanced", "--max-memory")
    assert plan("emoji", "--memory", *there, "0=10MB,1=10MB,cpu=1GB") == 0
    said = capsys.readouterr().out
    there = next(line for line in said.splitlines() if line.startswith("of these at home on "))
    assert "device 1 " in there
    assert "cpu " in there
    assert "\ndenoise, device 1  first" in said
    assert plan("emoji", "--memory", "--device", "cuda", "--steps", "2", "--offload", "group") == 0
    assert "of these at home on cpu 23.06" in capsys.readouterr().out


@pytest.mark.whole
def test_a_larger_picture_takes_more(capsys: pytest.CaptureFixture[str]) -> None:
    sizes: list[int] = []
    for side in ("64", "128"):
        assert plan("emoji", "--memory", "--json", "--width", side, "--height", side) == 0
        sizes.append(json.loads(capsys.readouterr().out)["first"]["decode"]["activations"])
    assert sizes[1] > 3 * sizes[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("emojy", "--memory"), "does not exist"),
        (("random:flux.1-def", "--memory"), "is no known architecture"),
        (("emoji", "--width", "100"), "--width 100: must be a multiple of"),
        (("emoji", "--set", "num_frames=5"), "has no 'num_frames'"),
        (("emoji", "--ranks", "3", "--ring", "2"), "makes 2 ranks"),
        (("emoji", "--memory", "--offload", "model"), "to=disk"),
        (("emoji", "--device", "cuda", "--placement", "balanced"), "max_memory, such as 0=80GiB"),
        (("no/such-model", "--memory"), "is not in the local cache"),
    ],
)
def test_what_is_wrong_is_one_line(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert plan("emoji") == 2
    assert "leave the launcher out" in capsys.readouterr().err


def test_a_folder_without_weights_will_do(tmp_path: Path) -> None:
    folder = unet(tmp_path / "sd")
    assert not list(folder.glob("*/*.safetensors"))
    source = ModelSource(name="sd", path=str(folder), kind="folder", model_id="")
    made = fake_pipeline(source, torch.float32, fake_mode())
    config = made.unet.config
    assert nbytes(made.unet) == sum(x.numel() * 4 for x in type(made.unet)(**config).parameters())
    by_path = bytes_by_path(made.unet)
    assert sum(by_path.values()) == nbytes(made.unet)
    assert by_path["conv_in"] == 4 * (8 * 4 * 9 + 8)


def test_headers_tell_what_weights_take() -> None:
    source = locate("emoji")
    whole = check.weight_bytes(source, "float32")
    assert whole == {name: 2 * size for name, size in check.weight_bytes(source, "bfloat16").items()}
    assert sum(check.weight_bytes(source, "float32", quantized=True).values()) < 0.5 * sum(whole.values())
    assert "vae" not in check.weight_bytes(source, "float32", given={"vae": None})


def test_a_folder_that_cannot_fit_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "emoji" in embedded_models()
    monkeypatch.setattr(check, "memory_bytes", lambda: 30_000_000)
    with pytest.raises(ConfigError, match=r"model='emoji': its weights take 0 GB in float32, and this machine"):
        Engine.from_pretrained("emoji", Config(device="cpu"))
    source = locate("emoji")
    made = resolve(Config(device="cpu"), source, 1)
    check_loading(source, made, {"transformer": None}, sent=False)  # what is not loaded takes nothing
    on_disk = resolve(Config(device="cpu", offload="group:to=disk"), source, 1)
    check_loading(source, on_disk, {}, sent=False)  # they are never there at once
    monkeypatch.setattr(check, "memory_bytes", lambda: 60_000_000)
    check_loading(source, made, {}, sent=False)
    check_loading(source, resolve(Config(device="cpu"), source, 4), {}, sent=False)  # ranks share them
