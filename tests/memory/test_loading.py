"""A model is loaded once for the ranks of a machine: the weights are those of one rank, and are in memory once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from parafuse import Engine
from parafuse.config import Config
from parafuse.engine import node_loading
from parafuse.engine.loader import load_pipeline
from parafuse.engine.planner import resolve
from parafuse.engine.source import locate
from parafuse.errors import ConfigError, ModelError
from parafuse.parallel import node
from parafuse.parallel.world import join_world
from tests.dist.ranks import RankFailure, close_pools, run_ranks
from tests.memory.loading import checkpoint, emoji_in, load

GB = 1 << 30


def loads(folder: str, **config: Any) -> dict[str, Any]:
    return load(folder, **config)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_weights_are_those_of_one_rank(ranks: int) -> None:
    alone = run_ranks(loads, 1, "emoji")[0]
    found = run_ranks(loads, ranks, "emoji")
    assert all(one["weights"] == alone["weights"] for one in found)
    assert [rank["how"] for rank in found[-1]["ranks"]] == ["read"] + ["mapped from rank 0"] * (ranks - 1)
    assert alone["ranks"][0]["how"] == "read"


def quantized(folder: str, text: str) -> dict[str, Any]:
    return load(folder, quantize=text)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("text", ["int8", "fp8:reference=true", "fp8-weight", "int8-weight:keep_originals=true"])
def test_quantized_weights_too(text: str) -> None:
    alone = run_ranks(quantized, 1, "emoji", text)[0]
    found = run_ranks(quantized, 2, "emoji", text)
    assert found[0]["weights"] == found[1]["weights"] == alone["weights"]
    assert found[0]["ranks"][1]["how"] == "mapped from rank 0"


def half_as_float(folder: str) -> dict[str, Any]:
    return load(folder, dtype="float32")


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_ranks_have_the_weights_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """1 GB of weights in float32, mapped from the files, or made of half as much. A page that several have counts for
    each as its part of it."""
    close_pools()  # fresh processes: what a tensor had freed may stay with the allocator
    folder = str(checkpoint(tmp_path, GB * dtype.itemsize // 4, dtype))
    alone = run_ranks(half_as_float, 1, folder)[0]["share"]
    shares = [one["share"] for one in run_ranks(half_as_float, 4, folder)]
    print(f"one rank {alone / GB:.3f} GiB, four {sum(shares) / GB:.3f}: {sum(shares) / alone:.3f}")
    assert alone > 0.95 * GB
    assert sum(shares) < 1.3 * alone, (alone, shares)


def hidden_states(name: str) -> list[Any]:
    """Of each text encoder of a pipeline that this rank may have mapped."""
    source = locate(name)
    world = join_world("cpu", 60.0, dist.get_world_size())
    plan = resolve(Config(device="cpu"), source, world.size)
    settings = {"plan": plan, "pipeline_kwargs": {}, "allow_pickle": False}
    pipeline = node_loading.load_for_ranks(source, settings, world).pipeline
    ids = torch.arange(1, 8)[None]
    encoders = [part for part in pipeline.components.values() if isinstance(part, PreTrainedModel)]
    return [part(ids, output_hidden_states=True).hidden_states for part in encoders]


def test_mapped_encoders_are_known_to_their_library() -> None:
    """transformers' classes tell a process of themselves when they are built, which here they are not."""
    close_pools()  # processes that have built none
    for mine, theirs in zip(*run_ranks(hidden_states, 2, "tiny:hunyuanvideo"), strict=True):
        assert len(mine) == len(theirs) > 1
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def without_sharing(folder: str) -> dict[str, Any]:
    there = node.can_share
    node.can_share = lambda: False
    try:
        return load(folder)
    finally:
        node.can_share = there


def test_where_memory_cannot_be_shared_each_loads() -> None:
    found = run_ranks(without_sharing, 2, "emoji")
    assert [one["how"] for one in found[0]["ranks"]] == ["read", "read"]
    assert found[0]["weights"] == found[1]["weights"]


def with_something_unwilling(folder: str) -> dict[str, Any]:
    there = node_loading.load_pipeline

    def load_pipeline(*args: Any, **kwargs: Any) -> Any:
        pipeline = there(*args, **kwargs)
        pipeline.unwilling = lambda: None  # a lambda is not pickled
        return pipeline

    node_loading.load_pipeline = load_pipeline
    try:
        return load(folder)
    finally:
        node_loading.load_pipeline = there


def test_what_cannot_be_handed_over_is_loaded_by_each() -> None:
    found = run_ranks(with_something_unwilling, 2, "emoji")
    how = [one["how"] for one in found[0]["ranks"]]
    assert how[0] == "read"
    assert how[1].startswith("read: ")
    assert "lambda" in how[1]
    assert found[0]["weights"] == found[1]["weights"]


def refused(folder: str) -> str:
    try:
        load(folder)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "vae"])
def test_a_weight_that_is_missing_is_named_on_all_ranks(tmp_path: Path, part: str) -> None:
    folder = emoji_in(tmp_path)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    lost = sorted(tensors)[len(tensors) // 2]
    del tensors[lost]
    save_file(tensors, file)
    found = run_ranks(refused, 2, str(folder))
    assert found[0] == found[1]
    assert f"lacks weights of {part}: {lost}" in found[0]


def test_a_shard_that_was_cut_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 100 << 20, torch.float32)
    file = max((folder / "transformer").glob("*.safetensors"))
    whole = file.stat().st_size
    os.truncate(file, whole - 1000)
    found = run_ranks(refused, 2, str(folder))
    assert found[0] == found[1]
    assert file.name in found[0]
    assert f"has {whole - 1000} bytes instead of {whole}" in found[0]


def ends(folder: str) -> dict[str, Any]:
    if os.environ["RANK"] == "0":
        node_loading.load_pipeline = lambda *_, **__: os._exit(3)  # in a process that is killed anyway
    return load(folder)


def test_a_rank_that_ends_while_it_loads_is_named() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(ends, 2, "emoji")
    assert "rank 0 ended while it loaded the model" in failure.value.reports[1]


def fails(folder: str) -> str:
    def load_pipeline(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("by accident")

    there, node_loading.load_pipeline = node_loading.load_pipeline, load_pipeline
    try:
        load(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        node_loading.load_pipeline = there
    return ""


def test_what_the_loading_rank_fails_with_reaches_the_others() -> None:
    assert run_ranks(fails, 3, "emoji") == [
        "ZeroDivisionError: by accident",
        *["RankError: rank 0 failed: ZeroDivisionError: by accident"] * 2,
    ]


def test_weights_are_loaded_as_adapters_leave_them() -> None:
    """Compiled code asks whether a weight wants a gradient: it would be made anew after an adapter came and went."""
    pipeline = load_pipeline(locate("emoji"), dtype="float32", allow_pickle=False)
    assert not any(x.requires_grad for x in pipeline.transformer.parameters())


def test_a_folder_that_is_none_is_told_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_loading, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is no folder; give another one"):
        Engine.from_pretrained("emoji", Config(offload=f"model:to=disk,folder={tmp_path / 'file'}"))


def test_a_tensor_of_another_shape_is_named_with_its_file(tmp_path: Path) -> None:
    there = emoji_in(tmp_path)
    file = there / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"] = weights["proj_out.bias"][:-1].clone()
    save_file(weights, file)
    words = r"transformer/diffusion_pytorch_model.safetensors has proj_out.bias of shape \[\d+\], and its config"
    with pytest.raises(ModelError, match=words) as said:
        load_pipeline(locate(str(there)), dtype="float32", allow_pickle=False)
    assert "low_cpu_mem_usage" not in str(said.value)
