"""Every keyword of diffusers' loaders has its place: it works, or is refused in a line before anything is loaded."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parafuse
from parafuse.engine import engine as engine_module
from parafuse.engine import node_loading
from parafuse.engine.loading_keywords import FROM_PRETRAINED, FROM_SINGLE_FILE, REFUSED, WORKS
from parafuse.engine.quantized import METHODS
from parafuse.engine.source import EMBEDDED
from parafuse.errors import ConfigError

load: Any = parafuse.Engine.from_pretrained
TWO = parafuse.Config(parallel=parafuse.Parallel(ulysses=2))


def asked_for(*functions: Any) -> set[str]:
    """The keywords that functions take out of their **kwargs, and those that their docstrings list."""
    names: set[str] = set()
    for function in functions:
        code = inspect.getsource(function)
        names |= set(re.findall(r"""kwargs\.(?:pop|get)\(["'](\w+)["']""", code))
        names |= set(re.findall(r"""["'](\w+)["'] in kwargs""", code))
        names |= set(re.findall(r"^ {12}(\w+) ?\([`']", code, re.MULTILINE))
    return names - {"pretrained_model_name_or_path", "pretrained_model_name", "pretrained_model_link_or_path", "kwargs"}


def test_every_keyword_of_diffusers_has_its_place() -> None:
    """One that a newer diffusers takes fails here until it is placed."""
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    found = asked_for(DiffusionPipeline.from_pretrained, DiffusionPipeline.download)
    assert {"variant", "trust_remote_code", "dduf_file", "mirror", "use_flashpack", "disable_mmap"} <= found
    assert found == set(FROM_PRETRAINED)
    single = asked_for(StableDiffusionPipeline.from_single_file)
    assert {"original_config", "disable_mmap", "load_safety_checker"} <= single
    assert single <= set(FROM_SINGLE_FILE)
    assert {word.verdict for word in (*FROM_PRETRAINED.values(), *FROM_SINGLE_FILE.values())} == {WORKS, REFUSED}


def test_every_quantization_method_of_diffusers_has_its_place() -> None:
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert set(METHODS) == set(AUTO_QUANTIZER_MAPPING)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting ranks and loading are failures."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("it came through the checks")

    monkeypatch.setattr(node_loading, "load_pipeline", forbidden)
    monkeypatch.setattr(engine_module.Workers, "start", forbidden)


def refusal(model: Any = "emoji", config: Any = None, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(str(model), config, **given)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", [name for name, word in FROM_PRETRAINED.items() if word.verdict == REFUSED])
def test_what_is_refused_says_why(name: str) -> None:
    assert refusal(**{name: "x"}) == f"{name}='x': {FROM_PRETRAINED[name].note}."
    with pytest.raises(AssertionError, match="it came through"):
        load("emoji", **{name: None})


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"text_encodr": None},
        "from_pretrained of model='emoji': unknown key 'text_encodr'; did you mean 'text_encoder'?",
    ),
    ({"low_cpu_mem": True}, "did you mean 'low_cpu_mem_usage'?"),
    ({"safety_checker": None}, "unknown key 'safety_checker'; allowed: cache_dir, custom_pipeline, "),
    ({"dtype": "float8"}, "dtype='float8': must be one of float32, bfloat16, float16 (or the torch.dtype)."),
    ({"dtype": torch.float16, "torch_dtype": torch.float16}, "dtype: given beside torch_dtype, its older name"),
    ({"dtype": {"transfromer": torch.float16}}, "dtype: unknown key 'transfromer'; did you mean 'transformer'?"),
    ({"dtype": {"vae": 8}}, "dtype['vae']=8: must be one of float32"),
    ({"device_map": "balance"}, "device_map: placement='balance': must be 'balanced', 'auto', 'rank', a map such as"),
    ({"device_map": {"": 99}}, "placement['']='99': "),
    ({"use_safetensors": False}, "use_safetensors=False: loads pickles, which can run code; leave it out, or Config("),
    ({"variant": "fp16"}, "has no weights of variant='fp16'; variants that it has: none."),
    ({"custom_pipeline": "gone.py"}, "custom_pipeline='gone.py': gone.py does not exist; give a .py file"),
    (
        {"custom_pipeline": "owner/name"},
        "custom_pipeline='owner/name': is code that would be run; read it, and give tr",
    ),
    ({"quantization_config": {"load_in_4bit": True}}, "quantization_config=dict: must be a diffusers.PipelineQuantiz"),
    ({"transformer": "folder"}, "transformer='folder': must be a loaded part, or None; load it with its class."),
]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("given", "message"), REFUSALS, ids=[next(iter(given)) for given, _ in REFUSALS])
def test_what_is_wrong_is_said_before_anything_is_loaded(given: dict[str, Any], message: str) -> None:
    assert message in refusal(**given)
    assert message in refusal(config=TWO, **given)


@pytest.mark.usefixtures("unloaded")
def test_what_only_several_ranks_refuse() -> None:
    hook = nn.Linear(2, 2)
    hook.register_forward_hook(lambda *_: None)
    assert "vae: cannot be sent to the ranks that are started (" in refusal(config=TWO, vae=hook)
    large = nn.Linear(1 << 14, 1 << 15, device="meta")
    assert "vae: 2 GB would be sent to every rank that is started; start all ranks with torch" in refusal(
        config=TWO, vae=large
    )
    with pytest.raises(AssertionError, match="it came through"):
        load("emoji", vae=hook)
    for config in (None, TWO):  # a stage of its own: text, or pictures
        with pytest.raises(AssertionError, match="it came through"):
            load("emoji", config, transformer=None)


@pytest.mark.usefixtures("unloaded")
def test_a_keyword_and_the_config_say_the_same() -> None:
    assert "dtype=float16: the Config says dtype='float32'" in refusal(
        config=parafuse.Config(dtype="float32"), torch_dtype=torch.float16
    )
    assert "device_map='cuda': the Config says device='cpu'" in refusal(
        config=parafuse.Config(device="cpu"), device_map="cuda"
    )
    with pytest.raises(AssertionError, match="it came through"):
        load("emoji", parafuse.Config(dtype="float16", device="cpu"), torch_dtype="float16", device_map="cpu")


def test_diffusers_own_config_is_told_from_ours() -> None:
    assert "config='x': must be a parafuse.Config; diffusers reads the configuration" in refusal(config="x")
    assert "config=dict: must be a parafuse.Config, or, for a single file, the folder" in refusal(config={})


@pytest.mark.usefixtures("unloaded")
def test_a_single_file_takes_fewer(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    for name, word in FROM_SINGLE_FILE.items():
        if word.verdict == REFUSED:
            assert refusal(tmp_path / "x.safetensors", **{name: "x"}) == f"{name}='x': {word.note}."


def folder_with(tmp_path: Path, part: str, **config: Any) -> Path:
    """emoji, with more in the configuration of one part."""
    folder = Path(shutil.copytree(EMBEDDED / "emoji", tmp_path / "model"))
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "modelopt",
            "transformer is quantized with modelopt, which needs nvidia-modelopt: pip install nvidia-modelopt.",
        ),
        ("auto-round", "transformer is quantized with auto-round, which needs auto-round: pip install auto-round."),
        ("bitsandbytes", "transformer is quantized with bitsandbytes_4bit"),
    ],
)
def test_a_quantized_folder_that_cannot_be_had(tmp_path: Path, method: str, message: str) -> None:
    folder = folder_with(tmp_path, "transformer", quantization_config={"quant_method": method, "load_in_4bit": True})
    if method != "bitsandbytes":
        folder = folder_with(tmp_path / "2", "transformer", quantization_config={"quant_method": method})
    assert message in refusal(folder, parafuse.Config(device="cpu"))
    with pytest.raises(AssertionError, match="it came through"):
        load(str(folder), transformer=nn.Linear(2, 2))


@pytest.mark.usefixtures("unloaded")
def test_a_wish_for_quantization_that_cannot_be_had(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from torchao.quantization import Int8WeightOnlyConfig

    int8 = diffusers.TorchAoConfig(Int8WeightOnlyConfig())

    def wish(**mapping: Any) -> Any:
        return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)

    assert "quantization_config: unknown key 'transfromer'; did you mean" in refusal(
        quantization_config=wish(transfromer=int8)
    )
    assert "low_cpu_mem_usage=False: diffusers quantizes only without it" in refusal(
        quantization_config=wish(transformer=int8), low_cpu_mem_usage=False
    )
    assert "quantization_config: transformer is given as an object" in refusal(
        quantization_config=wish(transformer=int8), transformer=nn.Linear(2, 2)
    )
    gguf = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    assert "quantization_config: transformer with gguf" in refusal(quantization_config=wish(transformer=gguf))
    folder = folder_with(tmp_path, "transformer", quantization_config={"quant_method": "torchao"})
    assert "quantization_config: transformer is saved as torchao, and stays so; leave it out." in refusal(
        folder, quantization_config=wish(transformer=int8)
    )


def variants(tmp_path: Path) -> Path:
    """emoji with weights of the variant fp16 alone."""
    folder = Path(shutil.copytree(EMBEDDED / "emoji", tmp_path / "model"))
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    return folder


@pytest.mark.usefixtures("unloaded")
def test_variants_are_known_before_loading(tmp_path: Path) -> None:
    folder = variants(tmp_path)
    assert "has weights of variant 'fp16' alone; give variant='fp16'." in refusal(folder)
    assert "has weights of variant 'fp16' alone; give variant='fp16'." in refusal(folder, variant="bf16")
    with pytest.raises(AssertionError, match="it came through"):
        load(str(folder), variant="fp16")
    weights = folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
    shard = weights.rename(weights.with_name("diffusion_pytorch_model.fp16-00001-of-00002.safetensors"))
    lost = shard.name.replace("00001-of", "00002-of")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": lost}}))
    assert f"transformer/{lost} is missing. Download the model again" in refusal(folder, variant="fp16")
    plain = weights.with_name("diffusion_pytorch_model.safetensors")
    shutil.copy(shard, plain)
    assert "has weights of variant 'fp16' alone" in refusal(folder), "of the other parts"
    shutil.rmtree(folder)
    shutil.copytree(EMBEDDED / "emoji", folder)
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_text("half a file")
    with pytest.raises(AssertionError, match="it came through"):  # what is not asked for is not read
        load(str(folder))


@pytest.mark.usefixtures("unloaded")
def test_arguments_of_a_pipeline_of_ones_own_are_read_from_its_code(tmp_path: Path) -> None:
    """Before it is run, which needs a word of trust."""
    (tmp_path / "pipeline.py").write_text(
        "raise SystemExit('it was run')\n"
        "class Mine:\n"
        "    def __init__(self, transformer, vae, extra_scale=1.0):\n"
        "        pass\n"
    )
    given: dict[str, Any] = {"custom_pipeline": str(tmp_path), "extra_scale": 2.0}
    assert f"custom_pipeline={str(tmp_path / 'pipeline.py')!r}: is code that would be run; read it" in refusal(**given)
    trusted = given | {"trust_remote_code": True}
    assert "did you mean 'extra_scale'?" in refusal(**trusted, extra_scal=2.0)
    with pytest.raises(AssertionError, match="it came through"):
        load("emoji", **trusted)
