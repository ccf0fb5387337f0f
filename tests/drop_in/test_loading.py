"""What diffusers' loaders take works on one and on two ranks: the picture is that of plain diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parafuse
from tests import pipelines
from tests.dist.ranks import run_ranks

CALL: dict[str, Any] = {
    "prompt": "a red apple", "negative_prompt": "cat", "width": 32, "height": 24, "num_inference_steps": 2,
    "max_sequence_length": 16, "output_type": "latent",
}  # fmt: skip
HUB_ID = "somebody/tiny-sd3"
CODE = """
from diffusers import StableDiffusion3Pipeline


class Twice(StableDiffusion3Pipeline):
    def __init__(self, transformer, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2,
                 text_encoder_3, tokenizer_3, image_encoder=None, feature_extractor=None, factor: float = 1.0):
        super().__init__(transformer, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2,
                         text_encoder_3, tokenizer_3, image_encoder, feature_extractor)
        self.factor = factor

    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        out.images = out.images * self.factor
        return out
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny model: whole, in shards, as a variant, in a hub cache, as pickles, and as a single file."""
    here = tmp_path_factory.mktemp("loading")
    import diffusers

    folder = pipelines.sd3(here / "folder")
    pipeline: Any = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.save_pretrained(here / "shards", max_shard_size="4KB")
    pipeline.save_pretrained(here / "variant", variant="fp16")
    pipeline.save_pretrained(here / "variant-shards", variant="fp16", max_shard_size="4KB")
    pipeline.save_pretrained(here / "pickles", safe_serialization=False)
    for weights in (here / "pickles").glob("text_encoder*/*.safetensors"):  # transformers writes no others
        (here / "pickles" / weights.parent.name / weights.name).unlink()
        torch.save(getattr(pipeline, weights.parent.name).state_dict(), weights.parent / "pytorch_model.bin")
    pipelines.hub_cache(here / "cache", HUB_ID, folder)
    large = pipelines.sd3(here / "large", num_layers=pipelines.SD35_BLOCKS)
    pipelines.single_file(large, here / "x.safetensors")
    shutil.copytree(large, here / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    (here / "code").mkdir()
    (here / "code" / "pipeline.py").write_text(CODE)
    return here


def scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def transformer(folder: Path) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")


Given = Callable[[Path], dict[str, Any]]
KEYWORDS: dict[str, tuple[str, Given]] = {
    "nothing": ("folder", lambda _: {}),
    "values that are diffusers' own": (
        "folder",
        lambda _: {"use_safetensors": None, "device_map": None, "max_memory": None, "quantization_config": None,
                   "low_cpu_mem_usage": True, "disable_mmap": False, "dtype": None, "provider": None, "use_onnx": False,
                   "token": None, "revision": None, "proxies": None, "load_connected_pipeline": False},
    ),
    "loading": ("folder", lambda _: {"use_safetensors": True, "low_cpu_mem_usage": False, "disable_mmap": True}),
    "device_map": ("folder", lambda _: {"device_map": "cpu", "torch_dtype": torch.float32}),
    "connected": ("folder", lambda _: {"load_connected_pipeline": True}),
    "dtype by part": ("folder", lambda _: {"dtype": {"text_encoder_3": torch.bfloat16}}),
    "without a part": ("folder", lambda _: {"text_encoder_3": None, "tokenizer_3": None}),
    "a part as object": (
        "folder", lambda here: {"scheduler": scheduler(), "transformer": transformer(here / "folder")}
    ),
    "custom pipeline": (
        "folder", lambda here: {"custom_pipeline": str(here / "code"), "trust_remote_code": True, "factor": 2.0}
    ),
    "shards": ("shards", lambda _: {}),
    "variant": ("variant", lambda _: {"variant": "fp16"}),
    "shards of a variant": ("variant-shards", lambda _: {"variant": "fp16"}),
    "pickles": ("pickles", lambda _: {"use_safetensors": False}),
    "hub": (
        HUB_ID,
        lambda here: {"cache_dir": str(here / "cache"), "revision": "main", "local_files_only": True, "token": False,
                      "force_download": False, "image_encoder": None},
    ),
    "single file": (
        "x.safetensors",
        lambda here: {"single_file_config": str(here / "config"), "scheduler": scheduler(), "text_encoder_3": None,
                      "tokenizer_3": None, "torch_dtype": "float32", "disable_mmap": True},
    ),
}  # fmt: skip


def model_of(here: Path, name: str) -> str:
    where = KEYWORDS[name][0]
    return where if where == HUB_ID else str(here / where)


def painted(here: Path, names: list[str], parallel: dict[str, int]) -> dict[str, Tensor]:
    """Latents by case."""
    found: dict[str, Tensor] = {}
    config = parafuse.Config(parallel=parafuse.Parallel(**parallel), allow_pickle=True)
    for name in names:
        with parafuse.Engine.from_pretrained(model_of(here, name), config, **KEYWORDS[name][1](here)) as engine:
            found[name] = engine(**CALL, seed=7).images
    return found


def plain(here: Path, name: str) -> Tensor:
    from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

    given = KEYWORDS[name][1](here)
    if name.startswith("single"):
        config = given.pop("single_file_config")
        given.pop("torch_dtype", None)
        pipeline: Any = StableDiffusion3Pipeline.from_single_file(model_of(here, name), config=config, **given)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
    else:
        pipeline = DiffusionPipeline.from_pretrained(model_of(here, name), **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**CALL, generator=torch.Generator().manual_seed(7)).images


def test_the_picture_is_that_of_plain_diffusers(here: Path) -> None:
    names = list(KEYWORDS)
    expected = {name: plain(here, name) for name in names}
    alone = painted(here, names, {})
    together = run_ranks(painted, 2, here, names, {"ulysses": 2})
    for name, whole in expected.items():
        assert torch.equal(alone[name], whole), name
        for rank in together:
            assert (rank[name] - whole).abs().max() <= 1e-5 * whole.abs().max(), name
    same = {"nothing", "loading", "shards", "variant", "hub", "pickles"}
    for name in same:
        assert torch.allclose(expected[name], expected["nothing"], atol=1e-5), name
    for name in ("without a part", "a part as object", "custom pipeline", "dtype by part"):
        assert not torch.equal(expected[name], expected["nothing"]), f"{name} would change nothing"


def dtypes(here: Path) -> dict[str, Any]:
    """Latents in bfloat16, and what plan and receipt say."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    config = parafuse.Config(parallel=parafuse.Parallel(ulysses=ranks))
    found: dict[str, Any] = {}
    cases = {"one": torch.bfloat16, "by component": {"vae": torch.float32, "default": torch.bfloat16}}
    for name, dtype in cases.items():
        with parafuse.Engine.from_pretrained(str(here / "folder"), config, torch_dtype=dtype) as engine:
            found[name] = engine(**CALL, seed=7).images
            found[f"{name}: plan"], found[f"{name}: weights"] = engine.plan.dtype, engine.receipt["weights"]
    return found


def test_one_dtype_and_one_for_each_component(here: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(here / "folder", torch_dtype=torch.bfloat16)
    expected = pipeline(**CALL, generator=torch.Generator().manual_seed(7)).images
    exact = plain(here, "nothing")
    loss = (expected - exact).abs().max()
    for found in (dtypes(here), *run_ranks(dtypes, 2, here)):
        for name in ("one", "by component"):
            assert found[f"{name}: plan"] == "bfloat16"
            assert (found[name] - exact).abs().max() <= 2 * loss
        assert set(found["one: weights"].values()) == {"bfloat16"}
        assert found["by component: weights"]["vae"] == "float32"
        assert found["by component: weights"]["transformer"] == "bfloat16"


def refused_later(here: Path) -> list[str]:
    """What is known only from the hub, or from code: refused on all ranks."""
    wrong: list[tuple[str, dict[str, Any]]] = [
        (HUB_ID, {"cache_dir": str(here / "cache"), "safety_cheker": None}),
        (str(here / "x.safetensors"), {"config": str(here / "config"), "text_encodr": None}),
        (str(here / "x.safetensors"), {"config": "owner/gone", "cache_dir": str(here / "cache")}),
    ]
    found: list[str] = []
    for model, given in wrong:
        with pytest.raises(parafuse.errors.ConfigError) as caught:
            parafuse.Engine.from_pretrained(model, **given)
        found.append(str(caught.value))
    return found


def test_unknown_names_of_a_hub_model_or_a_file(here: Path) -> None:
    for found in (refused_later(here), *run_ranks(refused_later, 2, here)):
        assert "model='somebody/tiny-sd3': unknown key 'safety_cheker'; allowed: cache_dir, " in found[0]
        assert "unknown key 'text_encodr'; did you mean 'text_encoder'?" in found[1]
        assert "a single file of type 'given by config'; its configuration 'owner/gone' is not in the local" in found[2]
