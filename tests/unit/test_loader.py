"""Finding a model: what it is, what is refused and how, before torch is imported or a weight is read."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parafuse.engine.source import EMBEDDED, embedded_models, locate
from parafuse.errors import ModelError

ROOT = Path(__file__).resolve().parents[2]
FLUX_VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}


NO_TENSORS = "\2" + 7 * "\0" + "{}"
OTHER_HEADER = "\x14" + 7 * "\0" + '{"__metadata__":{} }'
"""Safetensors files of a header alone: its length in 8 bytes, then JSON."""


def write(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A diffusers folder as it lies on a disk, with empty weights."""
    model = tmp_path / "model"
    parts = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.0", "vae": ["diffusers", "X"],
             "transformer": ["diffusers", "FluxTransformer2DModel"], "scheduler": ["diffusers", "X"]}  # fmt: skip
    write(model / "model_index.json", parts)
    write(model / "vae" / "config.json", FLUX_VAE)
    write(model / "transformer" / "config.json", {"patch_size": 1, "in_channels": 64, "_diffusers_version": "0.42.0"})
    write(model / "scheduler" / "scheduler_config.json", {"shift": 3.0})
    for part in ("vae", "transformer"):
        write(model / part / "diffusion_pytorch_model.safetensors", NO_TENSORS)
    return model


def refusal(model: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        locate(str(model), **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder(folder: Path) -> None:
    source = locate(str(folder))
    assert (source.name, source.path, source.kind) == (str(folder), str(folder), "folder")
    assert source.pipeline_class == "FluxPipeline"
    assert (source.defaults, source.size_multiple) == ({}, 16)


def test_the_fingerprint_is_of_the_architecture(folder: Path, tmp_path: Path) -> None:
    before = locate(str(folder)).model_id
    moved = folder.rename(tmp_path / "moved")
    write(moved / "vae" / "diffusion_pytorch_model.safetensors", OTHER_HEADER)
    write(moved / "transformer" / "config.json", {"in_channels": 64, "patch_size": 1, "_diffusers_version": "9.0"})
    write(moved / "parafuse.json", {"call": {"width": 64}})
    assert locate(str(moved)).model_id == before
    write(moved / "transformer" / "config.json", {"in_channels": 64, "patch_size": 1, "num_layers": 3})
    assert locate(str(moved)).model_id != before
    write(moved / "transformer" / "config.json", {"in_channels": 64, "patch_size": 1})
    write(moved / "scheduler" / "scheduler_config.json", {"shift": 1.0})
    assert locate(str(moved)).model_id != before


def test_the_embedded_models_are_found_by_name() -> None:
    assert "emoji" in embedded_models()
    source = locate("emoji")
    assert (source.kind, source.path, source.pipeline_class) == ("folder", str(EMBEDDED / "emoji"), "FluxPipeline")
    assert source.size_multiple == 8
    assert source.defaults["num_inference_steps"] > 0


def test_what_does_not_exist(tmp_path: Path) -> None:
    found = refusal(tmp_path / "missing")
    assert found.startswith(f"model={str(tmp_path / 'missing')!r}: does not exist")
    assert "a diffusers folder, a .safetensors file, a hub id" in found
    assert "did you mean 'emoji'?" in refusal("emojy")
    assert "does not exist" in refusal("missing.safetensors")
    assert "does not exist" in refusal("owner/missing.safetensors")
    assert refusal("").startswith("model='': ")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    assert "is not a diffusers folder, it has no model_index.json. Give the folder that holds" in refusal(tmp_path)
    write(tmp_path / "model_index.json", "{")
    assert "model_index.json cannot be read as JSON" in refusal(tmp_path)
    write(tmp_path / "model_index.json", "[]")
    assert "model_index.json must hold one JSON object" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "a/b", "Wan-AI/Wan2.1_T2V-14B"])
def test_hub_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = locate(name)
    assert (source.kind, source.path, source.pipeline_class, source.size_multiple) == ("hub", name, None, None)
    assert locate(name).model_id == source.model_id != locate("other/name").model_id


def test_a_path_under_a_folder_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refusal("models/flux")
    assert "does not exist" in refusal("../flux")
    assert "does not exist" in refusal("a/b/c")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_pickles_are_refused_unless_allowed(folder: Path, tmp_path: Path, suffix: str) -> None:
    single = write(tmp_path / f"model{suffix}", "x")
    assert f"{suffix} is a pickle, which can run code when it is loaded" in refusal(single)
    assert locate(str(single), allow_pickle=True).kind == "file"
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / f"weights{suffix}")
    assert f"vae/weights{suffix} is a pickle" in refusal(folder)
    assert locate(str(folder), allow_pickle=True).kind == "folder"


def test_a_pickle_beside_safetensors_is_not_loaded_and_not_refused(folder: Path) -> None:
    write(folder / "vae" / "diffusion_pytorch_model.bin", "x")
    assert locate(str(folder)).kind == "folder"


def safetensors(path: Path, shapes: dict[str, list[int]], *, cut: int = 0) -> Path:
    """A file of zeros of one byte each; `cut` bytes of its end are missing."""
    end = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end := end + math.prod(shape)]}
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(end)
    path.write_bytes(whole[: len(whole) - cut])
    return path


def test_single_files(tmp_path: Path) -> None:
    file = safetensors(tmp_path / "flux.safetensors", {"a": [2, 3], "b": [4]})
    source = locate(str(file))
    assert (source.kind, source.path, source.size_multiple) == ("file", str(file), None)
    assert "must be a folder, or a .safetensors file; '.npz' is neither" in refusal(write(tmp_path / "a.npz", "x"))
    gguf = write(tmp_path / "a.gguf", "x")
    assert "holds one part of a model. In Python, give it beside a folder or hub id" in refusal(gguf)
    assert f"transformer=X.from_single_file({str(gguf)!r}, quantization_config=" in refusal(gguf)
    assert "'' is neither" in refusal(write(tmp_path / "noname", "x"))


def test_the_fingerprint_of_a_file_is_of_its_shapes(tmp_path: Path) -> None:
    one = locate(str(safetensors(tmp_path / "1.safetensors", {"a": [2, 3], "b": [4]}))).model_id
    assert locate(str(safetensors(tmp_path / "2.safetensors", {"b": [4], "a": [2, 3]}))).model_id == one
    assert locate(str(safetensors(tmp_path / "3.safetensors", {"a": [3, 2], "b": [4]}))).model_id != one
    assert locate(str(safetensors(tmp_path / "4.safetensors", {"c": [2, 3], "b": [4]}))).model_id != one


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    cut = safetensors(tmp_path / "cut.safetensors", {"a": [200]}, cut=7)
    size = cut.stat().st_size
    assert refusal(cut).endswith(f"has {size} bytes instead of {size + 7}. Download it again.")
    pointer = write(tmp_path / "pointer.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for content in ("", "x", "[" * 99, "\x02\0\0\0\0\0\0\0[]", '\x07\0\0\0\0\0\0\0{"a":1}'):
        file = write(tmp_path / "other.safetensors", content)
        assert "cannot be read as safetensors" in refusal(file)
    assert "cannot be read as safetensors" in refusal(pointer)


def test_a_models_own_defaults(folder: Path) -> None:
    write(folder / "parafuse.json", {"call": {"width": 64, "negative_prompt": "blurry"}})
    assert locate(str(folder)).defaults == {"width": 64, "negative_prompt": "blurry"}
    write(folder / "parafuse.json", {})
    assert locate(str(folder)).defaults == {}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"calls": {}}, "parafuse.json must hold one object 'call'; found ['calls']"),
        ({"call": [1]}, "parafuse.json must hold one object 'call'"),
        ("{", "parafuse.json cannot be read as JSON"),
    ],
)
def test_defaults_that_say_something_else(folder: Path, values: Any, found: str) -> None:
    write(folder / "parafuse.json", values)
    assert found in refusal(folder)


LTX_VAE = {
    "block_out_channels": [128, 256, 512, 512], "spatio_temporal_scaling": [True, True, True, False], "patch_size": 4,
    "latent_channels": 128,
}  # fmt: skip
SIZES: dict[str, tuple[dict[str, Any] | None, str, dict[str, Any], int | None]] = {
    "FLUX.1": (FLUX_VAE, "transformer", {"patch_size": 1, "in_channels": 64}, 16),
    "FLUX.2": (FLUX_VAE | {"latent_channels": 32}, "transformer", {"patch_size": 1, "in_channels": 128}, 16),
    "SD3": (FLUX_VAE, "transformer", {"patch_size": 2, "in_channels": 16}, 16),
    "SDXL": (FLUX_VAE | {"latent_channels": 4}, "unet", {"in_channels": 4}, 8),
    "Wan 2.1": ({"temperal_downsample": [False, True, True]}, "transformer", {"patch_size": [1, 2, 2]}, 16),
    "Wan 2.2": ({"scale_factor_spatial": 16, "temperal_downsample": [False, True, True]}, "transformer",
                {"patch_size": [1, 2, 2], "in_channels": 48}, 32),
    "LTX": (LTX_VAE, "transformer", {"patch_size": 1, "in_channels": 128}, 32),
    "LTX that says it": (LTX_VAE | {"spatial_compression_ratio": 16}, "transformer", {"patch_size": 1}, 16),
    "LTX that does not say it": (LTX_VAE | {"spatial_compression_ratio": None}, "transformer", {"patch_size": 1}, 32),
    "HunyuanVideo": (FLUX_VAE | {"spatial_compression_ratio": 8}, "transformer", {"patch_size": 2}, 16),
    "Mochi": ({"encoder_block_out_channels": [64, 128, 256, 384], "spatial_expansions": [2, 2, 2]}, "transformer",
              {"patch_size": 2}, 16),
    "Sana": ({"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024], "latent_channels": 32}, "transformer",
             {"patch_size": 1, "in_channels": 32}, 32),
    "no transformer": (FLUX_VAE, "other", {}, 8),
    "unknown VAE": ({"something": 1}, "transformer", {"patch_size": 2}, None),
    "no VAE": (None, "transformer", {"patch_size": 2}, None),
}  # fmt: skip


@pytest.mark.parametrize(("vae", "part", "config", "multiple"), SIZES.values(), ids=SIZES)
def test_the_multiple_that_sizes_must_be(
    tmp_path: Path, vae: dict[str, Any] | None, part: str, config: dict[str, Any], multiple: int | None
) -> None:
    write(tmp_path / "model_index.json", {"_class_name": "FluxPipeline"})
    if vae is not None:
        write(tmp_path / "vae" / "config.json", vae)
    write(tmp_path / part / "config.json", config)
    assert locate(str(tmp_path)).size_multiple == multiple


def test_nothing_of_this_imports_torch(folder: Path, tmp_path: Path) -> None:
    """A torch that ends the process lies in the way; the control imports it."""
    trap = tmp_path / "trap"
    for name in ("torch", "diffusers", "transformers"):
        write(trap / f"{name}.py", f"raise SystemExit('{name} was imported')  # \"FluxPipeline\"")
    code = (
        "import parafuse.engine.source, parafuse.engine.planner, parafuse.engine.request\n"
        "from parafuse.engine.source import locate\n"
        "from parafuse.engine.planner import resolve\n"
        "from parafuse.engine.request import check_call\n"
        f"source = locate({str(folder)!r})\n"
        "plan = resolve(__import__('parafuse').Config(device='cpu'), source, 2)\n"
        "plan.check(model_id=source.model_id, world_size=2)\n"
        "assert [locate(f'{form}:qwen-image-edit').size_multiple for form in ('random', 'tiny')] == [16, 64]\n"
        "print(check_call(source, {'prompt': 'x', 'width': 64}))\n"
    )
    done = _python(code, trap)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{'prompt': 'x', 'width': 64}\n", "")
    assert _python("import parafuse.engine.engine", trap).stderr == "torch was imported\n"


def _python(code: str, first: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{first}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
