"""Single-file checkpoints: the picture is diffusers' own, and what is no whole model is refused in one line."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import parafuse
from parafuse.errors import ConfigError, ModelError
from tests import pipelines

CALL: dict[str, Any] = {
    "prompt": "a red apple", "negative_prompt": "cat", "width": 32, "height": 24, "num_inference_steps": 2,
    "max_sequence_length": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Stable Diffusion 3.5 large, beside the folder that it was made of and a hub cache."""
    here = tmp_path_factory.mktemp("single")
    folder = pipelines.sd3(here / "folder", num_layers=pipelines.SD35_BLOCKS)
    pipelines.hub_cache(here / "cache", pipelines.SD35_HUB_ID, folder, weights=False)
    return pipelines.single_file(folder, here / "sd35.safetensors")


def cache_of(checkpoint: Path) -> str:
    return str(checkpoint.parent / "cache")


def paint(pipeline: Any, seed: int = 7) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return np.asarray(pipeline(**CALL, generator=torch.Generator().manual_seed(seed)).images[0]).astype(int)


def refusal(file: Path, error: type[Exception] = ModelError, **keywords: Any) -> str:
    with pytest.raises(error) as caught:
        parafuse.Engine.from_pretrained(str(file), **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(checkpoint: Path, file: Path, drop: str, **more: Tensor) -> Path:
    """The checkpoint without the tensors whose names match `drop`."""
    state = {name: x for name, x in load_file(checkpoint).items() if not re.match(drop, name)}
    save_file(state | more, file)
    return file


def test_the_picture_is_that_of_plain_diffusers(checkpoint: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    cache = cache_of(checkpoint)
    plain = StableDiffusion3Pipeline.from_single_file(str(checkpoint), cache_dir=cache)
    plain.text_encoder_3.eval()  # diffusers leaves its dropout on
    expected = paint(plain)
    engine = parafuse.Engine.from_pretrained(str(checkpoint), cache_dir=cache)
    assert type(engine.pipeline) is StableDiffusion3Pipeline
    image = engine(**CALL, seed=7).images[0]
    assert np.array_equal(np.asarray(image).astype(int), expected)
    assert expected.shape == (24, 32, 3)
    assert expected.std() > 5, "a flat picture would compare equal to many"
    folder = StableDiffusion3Pipeline.from_pretrained(checkpoint.parent / "folder")
    assert np.array_equal(paint(folder), expected), "every weight of the file has found its place"
    assert np.abs(paint(folder, seed=8) - expected).max() > 1  # negative control


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_reaches_every_part(checkpoint: Path, dtype: str) -> None:
    config = parafuse.Config(dtype=dtype)
    engine = parafuse.Engine.from_pretrained(str(checkpoint), config, cache_dir=cache_of(checkpoint))
    parts = {name: part for name, part in engine.pipeline.components.items() if isinstance(part, nn.Module)}
    assert len(parts) == 5
    assert {str(p.dtype) for part in parts.values() for p in part.parameters()} == {f"torch.{dtype}"}
    assert not any(part.training for part in parts.values()), "dropout"


def test_a_dtype_for_each_part_is_refused(checkpoint: Path) -> None:
    """diffusers would take float32 for all, with a warning."""
    found = refusal(checkpoint, ConfigError, torch_dtype={"vae": torch.float16}, cache_dir=cache_of(checkpoint))
    assert found.startswith("torch_dtype={'vae': torch.float16}: a single file has one dtype")


def test_without_its_configuration(checkpoint: Path, tmp_path: Path) -> None:
    found = refusal(checkpoint, cache_dir=str(tmp_path))
    assert found.startswith(f"model={str(checkpoint)!r}: a single file of type 'sd35_large'; its configuration ")
    assert f"{pipelines.SD35_HUB_ID!r} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it" in found
    assert found.endswith("unset it, or convert the file to a diffusers folder.")


def test_the_embedding_that_two_modules_of_t5_share_may_be_written_once(checkpoint: Path, tmp_path: Path) -> None:
    file = changed(checkpoint, tmp_path / "x.safetensors", r".*t5xxl.*\.embed_tokens\.weight")
    cache = cache_of(checkpoint)
    image = parafuse.Engine.from_pretrained(str(file), cache_dir=cache)(**CALL, seed=7).images[0]
    whole = parafuse.Engine.from_pretrained(str(checkpoint), cache_dir=cache)(**CALL, seed=7).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(whole))


def test_a_weight_that_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    """diffusers leaves it empty; what is painted then is chance, or fails far away."""
    file = changed(checkpoint, tmp_path / "x.safetensors", r"text_encoders\.t5xxl\..*block\.1\..*\.q\.weight")
    found = refusal(file, cache_dir=cache_of(checkpoint))
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert f"lacks weights of text_encoder_3: {name}. Give a checkpoint of a whole model" in found


def test_a_transformer_alone_is_told_how_to_get_the_rest(checkpoint: Path, tmp_path: Path) -> None:
    """And the way out works, given the other parts."""
    file = changed(checkpoint, tmp_path / "x.safetensors", "text_encoders|first_stage_model")
    found = refusal(file, cache_dir=cache_of(checkpoint))
    assert f"model={str(file)!r}: Failed to load " in found
    call = f"({pipelines.SD35_HUB_ID!r}, transformer=SD3Transformer2DModel.from_single_file({str(file)!r}))."
    assert found.endswith(f"In Python, load the other parts from the hub: Engine.from_pretrained{call}")

    from diffusers import SD3Transformer2DModel

    folder = checkpoint.parent / "folder"
    cache = str(pipelines.hub_cache(tmp_path / "cache", pipelines.SD35_HUB_ID, folder))
    transformer = SD3Transformer2DModel.from_single_file(str(file), cache_dir=cache, config=str(folder / "transformer"))
    engine = parafuse.Engine.from_pretrained(pipelines.SD35_HUB_ID, transformer=transformer, cache_dir=cache)
    assert engine.pipeline.transformer is transformer
    assert engine(**CALL, seed=7).images[0].size == (32, 24)


def test_a_type_that_is_no_pipeline(tmp_path: Path) -> None:
    """Wan's files hold a transformer; diffusers has no `WanPipeline.from_single_file`."""
    file = tmp_path / "wan.safetensors"
    save_file({"head.modulation": torch.zeros(2), "patch_embedding.weight": torch.zeros(1536, 16, 1, 2, 2)}, file)
    hub_id = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    cache = str(pipelines.hub_cache(tmp_path / "cache", hub_id, pipelines.wan(tmp_path / "wan"), weights=False))
    found = refusal(file, cache_dir=cache)
    assert "a single file of type 'wan-t2v-1.3B' holds no whole pipeline. In Python" in found
    assert f"Engine.from_pretrained({hub_id!r}, transformer=WanTransformer3DModel.from_single_file(" in found


def test_a_part_of_a_pipeline_that_is_no_denoiser(tmp_path: Path) -> None:
    file = tmp_path / "controlnet.safetensors"
    save_file({"controlnet_cond_embedding.conv_in.weight": torch.zeros(2)}, file)
    (tmp_path / "empty").mkdir()
    cache = str(pipelines.hub_cache(tmp_path / "cache", "lllyasviel/control_v11p_sd15_canny", tmp_path / "empty"))
    assert refusal(file, cache_dir=cache).endswith("'controlnet' holds no whole pipeline. Give a diffusers folder.")


UNKNOWN = {
    "a LoRA": {"transformer.blocks.0.to_q.lora_A.weight": torch.zeros(2, 4)},
    "one component": {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 4)},
    "nothing": {},
    "a size that diffusers does not know": {
        "joint_blocks.0.context_block.adaLN_modulation.1.bias": torch.zeros(9216),
        "pos_embed": torch.zeros(1, 4, 4),
    },
}


@pytest.mark.parametrize("tensors", UNKNOWN.values(), ids=UNKNOWN)
def test_what_diffusers_does_not_know(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """Unknown keys are Stable Diffusion 1 to diffusers: it would fetch that configuration, and fail on the weights."""
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    assert "is no checkpoint that diffusers knows (a LoRA, or one part of a model?)" in refusal(file)


def test_a_pickle_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    file.write_bytes(b"\x80\x02nothing")
    assert "cannot be loaded (" in refusal(file, config=parafuse.Config(allow_pickle=True))


def test_every_type_that_diffusers_tells_apart_has_a_configuration() -> None:
    from diffusers.loaders import single_file_utils as utils

    tree = ast.walk(ast.parse(inspect.getsource(utils.infer_diffusers_model_type)))
    values = [n.value for n in tree if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "model_type"]
    tests = [
        id(n)
        for value in values
        for test in ast.walk(value)
        if isinstance(test, ast.IfExp)
        for n in ast.walk(test.test)
    ]
    kinds = {n.value for value in values for n in ast.walk(value) if isinstance(n, ast.Constant) and id(n) not in tests}
    assert {"flux-dev", "sd35_large", "v1", "chroma", "ltx-video"} <= kinds
    assert kinds <= set(utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS)
