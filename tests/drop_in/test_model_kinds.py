"""What a user may name as model, as a user runs it: hub ids, single files, video folders; and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from parafuse import Engine
from parafuse.errors import ModelError, ParafuseError
from parafuse.launch import cli, generate, quiet
from tests import pipelines

ROOT = Path(__file__).resolve().parents[2]
HUB_ID = "somebody/tiny-sd3"
SIZE = ("--width", "32", "--height", "24", "--steps", "2", "--seed", "7", "--set", "max_sequence_length=16")
SD3_CALL: dict[str, Any] = {"width": 32, "height": 24, "num_inference_steps": 2, "max_sequence_length": 16}
WAN_CALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2}
VIDEO = ("--width", "32", "--height", "32", "--steps", "2", "--seed", "7", "--set", "num_frames=5")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.sd3(tmp_path_factory.mktemp("sd3") / "folder")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.wan(tmp_path_factory.mktemp("wan") / "folder")


def parafuse(*argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line, offline unless the environment says otherwise."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", "parafuse", *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which a command ended."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("parafuse: error: ")
    return done.stderr


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def plain(folder: Path, call: dict[str, Any], seed: int = 7) -> np.ndarray:
    """Frames or pictures with plain diffusers."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(prompt="a red apple", **call, output_type="pil", generator=torch.Generator().manual_seed(seed))
    return np.stack([np.asarray(image) for image in getattr(output, "images", None) or output.frames[0]]).astype(int)


def test_a_hub_id_from_the_local_cache(sd3: Path, tmp_path: Path) -> None:
    cache = pipelines.hub_cache(tmp_path / "cache", HUB_ID, sd3)
    done = parafuse("generate", "a red apple", "--model", HUB_ID, *SIZE, cwd=tmp_path, HF_HUB_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out.png  (")
    assert np.array_equal(picture(tmp_path / "out.png"), plain(sd3, SD3_CALL)[0])
    assert json.loads((tmp_path / "out.json").read_text())["plan"]["model"] == HUB_ID


@pytest.mark.whole
def test_a_single_file_on_two_ranks(tmp_path: Path) -> None:
    folder = pipelines.sd3(tmp_path / "folder", num_layers=pipelines.SD35_BLOCKS)
    cache = pipelines.hub_cache(tmp_path / "cache", pipelines.SD35_HUB_ID, folder, weights=False)
    file = pipelines.single_file(folder, tmp_path / "x.safetensors")
    argv = ("generate", "a red apple", "--model", str(file), "--ranks", "2", "--quiet", *SIZE)
    done = parafuse(*argv, cwd=tmp_path, HF_HUB_CACHE=str(cache))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert np.abs(picture(tmp_path / "out.png") - plain(folder, SD3_CALL)[0]).max() <= 1
    assert np.abs(picture(tmp_path / "out.png") - plain(folder, SD3_CALL, seed=8)[0]).max() > 1  # negative control


REASONS = {"gated": (401, "GatedRepo"), "broken": (500, ""), "missing": (404, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """A hub that has nothing to give, for a reason that the owner's name says."""

    def do_GET(self) -> None:
        code, reason = next(REASONS[owner] for owner in REASONS if owner in self.path)
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Not on stderr."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_id_that_is_not_in_the_cache_offline(tmp_path: Path) -> None:
    done = parafuse("generate", "x", "--model", "owner/name", cwd=tmp_path, HF_HUB_CACHE=str(tmp_path))
    expected = (
        "model='owner/name': is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it; unset it, or give"
    )
    assert expected in refusal(done)


def test_a_hub_that_refuses_says_why(tmp_path: Path, hub: str) -> None:
    code = (
        "import parafuse\n"
        "for model in ('missing/name', 'gated/name', 'broken/name'):\n"
        "    try:\n"
        "        parafuse.Engine.from_pretrained(model)\n"
        "    except parafuse.errors.ModelError as error:\n"
        "        print(error)\n"
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub,
        "HF_HUB_CACHE": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=300
    )
    missing, gated, broken = done.stdout.splitlines()
    assert missing.startswith("model='missing/name': the hub has no such repository, or it is private; check the name")
    assert gated.startswith("model='gated/name': its terms must be accepted on its page on the hub; do that, then")
    assert broken.startswith("model='broken/name': is not in the local cache, and the hub cannot be reached (")
    assert "500" in broken
    assert all(line.endswith(", or give a folder.") for line in (missing, gated, broken))


@pytest.mark.whole
def test_wan_on_two_ranks(wan: Path, tmp_path: Path) -> None:
    argv = ("generate", "a red apple", "--model", str(wan), "--ranks", "2", "--ulysses", "2", *VIDEO)
    done = parafuse(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out-0000.png to out-0004.png  (")
    names = [f"out-{number:04d}.png" for number in range(5)]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    frames = np.stack([picture(tmp_path / name) for name in names])
    expected = plain(wan, WAN_CALL)
    assert expected.std() > 5, "flat pictures would compare equal to many"
    assert np.abs(np.diff(expected, axis=0)).max() > 1, "so would five times the same"
    assert np.abs(frames - expected).max() <= 1
    assert np.abs(frames - plain(wan, WAN_CALL, seed=8)).max() > 1  # negative control


def test_unets_on_several_ranks_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """The folder holds no weights: loading it would be another error."""
    folder = pipelines.unet(tmp_path / "folder")
    assert not list(folder.rglob("*.safetensors"))
    assert not list(folder.rglob("*.bin"))
    done = parafuse("generate", "x", "--model", str(folder), "--ranks", "2", "--ulysses", "2", cwd=tmp_path)
    assert f"model={str(folder)!r}: has no transformer to split over ranks (UNets" in refusal(done)
    with pytest.raises(ModelError, match=r"cannot be loaded \("):  # control: one rank comes as far as the weights
        Engine.from_pretrained(str(folder))


def test_frames_are_numbered_and_a_single_one_is_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine: Any = SimpleNamespace(receipt={"seed": 7})
    colours = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    output = SimpleNamespace(frames=[colours, colours[:1]], audio=None)
    assert generate.save(engine, output, paths) == [f"{tmp_path}/a-0000.png to {tmp_path}/a-0002.png", str(paths[1])]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a-0000.png", "a-0001.png", "a-0002.png", "b.png"]
    assert picture(tmp_path / "a-0002.png")[0, 0].tolist() == [0, 0, 255]
    assert capsys.readouterr().err == ""
    generate.save(engine, SimpleNamespace(frames=[colours], audio=torch.zeros(2)), paths[:1])
    assert "the sound is not written" in capsys.readouterr().err
    with pytest.raises(ParafuseError, match="holds no pictures"):
        generate.save(engine, output, paths[:1])


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*argv) -> (exit code, stdout, stderr) of this process, where painting and starting ranks are failures."""

    def forbidden(*_: Any) -> Any:
        raise AssertionError("the request came through the checks")

    for module, name in ((generate, "paint"), (cli, "start_ranks")):
        monkeypatch.setattr(module, name, forbidden)
    for name in ("silence_libraries", "silence_notes"):
        monkeypatch.setattr(quiet, name, lambda: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str, str]:
        code = cli.run(cli.Launch(argv, supervised=False))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


BAD = [
    ("--ranks 3 --ring 2 --ulysses 2", "ulysses=2", "4 ranks, but there are 3"),
    ("--ranks 4 --ring 3", "ring=3", "4"),
    ("--model gone", "model='gone': does not exist"),
    ("--model emojy", "did you mean 'emoji'?"),
    ("--model no-pipeline", "is not a diffusers folder, it has no model_index.json"),
    ("--model pickles", "vae/diffusion_pytorch_model.bin is a pickle", "--allow-pickle"),
    ("--model weights.ckpt", ".ckpt is a pickle", "--allow-pickle"),
    ("--model lfs.safetensors", "cannot be read as safetensors"),
    ("--witdh 64", "unknown option '--witdh'; did you mean '--width'?"),
    ("--config typo.json", "unknown key 'timeout'; did you mean 'timeout_s'?"),
    ("--set max_sequence_lenght=3", "did you mean 'max_sequence_length'?"),
    ("--width 63", "--width 63: must be a multiple of 8 for this model's VAE and patches; use 56 or 64."),
    ("--height 0", "--height 0: must be a whole number of pixels, at least 1."),
    ("--model ltx --width 72", "--width 72: must be a multiple of 32 for this model's VAE and patches; use 64 or 96."),
    ("--steps 0", "--steps 0: must be a whole number of at least 1."),
    ("--set num_images_per_prompt=0", "num_images_per_prompt=0: must be a whole number of at least 1."),
    ("--out /proc/x.png", "--out '/proc/x.png': cannot be written"),
    ("--out gone/x.png", "the folder 'gone' does not exist; create it first"),
    ("--plan plan.json --model ltx", "plan.model_id=", "made for 'emoji', not for this model"),
    ("--plan plan.json --ranks 3", "plan.world_size=1: there are 3 ranks."),
    ("--plan broken.json", "plan.degrees={", "'auto'", "must give a degree for each of"),
]


@pytest.mark.parametrize(("arguments", "messages"), [(bad[0], bad[1:]) for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_input_ends_before_anything_is_loaded_or_started(
    tmp_path: Path, run: Run, arguments: str, messages: tuple[str, ...]
) -> None:
    from parafuse.config import Config
    from parafuse.engine.planner import resolve
    from parafuse.engine.source import locate

    (tmp_path / "no-pipeline").mkdir()
    write(tmp_path / "pickles" / "model_index.json", {"_class_name": "FluxPipeline", "vae": ["diffusers", "X"]})
    write(tmp_path / "pickles" / "vae" / "diffusion_pytorch_model.bin", "")
    write(tmp_path / "weights.ckpt", "")
    write(tmp_path / "lfs.safetensors", "version https://git-lfs.github.com/spec/v1")
    write(tmp_path / "typo.json", {"timeout": 5})
    write(tmp_path / "ltx" / "model_index.json", {"_class_name": "LTXPipeline", "vae": ["diffusers", "X"]})
    write(tmp_path / "ltx" / "vae" / "config.json", {"spatial_compression_ratio": 32})
    plan = resolve(Config(device="cpu"), locate("emoji"), 1)
    plan.save(tmp_path / "plan.json")
    write(tmp_path / "broken.json", plan.to_dict() | {"degrees": plan.degrees | {"ulysses": "auto"}})
    code, out, err = run("generate", "a", *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("parafuse: error: ")
    assert err.count("\n") == 1
    for message in messages:
        assert message in err


def test_control_of_the_table(run: Run) -> None:
    """Without a fault, the request does come through."""
    code, _, err = run("generate", "a", "--width", "64")
    assert (code, err.splitlines()[-1]) == (1, "AssertionError: the request came through the checks")
