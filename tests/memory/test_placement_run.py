"""Placements executed: with weights on a disk, emoji paints the exact picture on any number of ranks, beside caches,
compiled blocks and quantization; the members of a pipeline that go with a device map do what they should."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import parafuse
from parafuse.config import Config, Parallel
from parafuse.engine import engine as engine_module
from parafuse.engine import node_loading
from parafuse.errors import ConfigError, RankError
from parafuse.offload import CHANGED, ENDING
from parafuse.parallel.residence import Residence
from tests.adapters import lora
from tests.dist.ranks import RankFailure, run_ranks

EXACT = 1e-5
CALL: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 3, "output_type": "np"}
ODD: dict[str, Any] = CALL | {"prompt": ["a rocket", ""], "width": 96, "height": 72}  # batch 2, 108 tokens
LITTLE = {"cpu": "14MB"}
"""Of the 46 MB that emoji has in float32."""


def emoji(folder: Any = None, **asked: Any) -> parafuse.Engine:
    placed = {"placement": "balanced", "max_memory": LITTLE, "offload_folder": str(folder)} if folder else {}
    return parafuse.Engine.from_pretrained("emoji", Config(device="cpu", **(placed | asked)))


def painted(engine: parafuse.Engine, **call: Any) -> np.ndarray:
    return engine(**(CALL | call), seed=7).images


class Watched:
    """Bytes of weights that are in memory for their values, the most at any time that something came."""

    def __init__(self, engine: parafuse.Engine):
        self._parts = [part for part in engine.pipeline.components.values() if isinstance(part, nn.Module)]
        self.most_bytes = 0

    def look(self) -> None:
        there = {id(p): p for part in self._parts for p in part.parameters() if p.numel() == 1 or any(p.stride())}
        self.most_bytes = max(self.most_bytes, sum(p.nbytes for p in there.values()))


def on_rank(folder: str, asked: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Pictures with a placement and without one, on one rank of several."""
    pictures: list[np.ndarray] = []
    found: dict[str, Any] = {}
    for place in ("", folder):
        with emoji(place, **asked) as engine:
            pictures.append(np.concatenate([painted(engine, **call).ravel() for call in calls]))
            found |= {
                "plan": engine.plan.to_dict(),
                "moved": engine.receipt["offload"],
                "applied": list(engine.handle.applied),
            }
    return found | {"error": float(np.abs(pictures[0] - pictures[1]).max() / np.abs(pictures[0]).max())}


RUNS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (3, {}),
    (4, {"parallel": Parallel(ring=2)}),
    (2, {"parallel": Parallel(cfg=2)}),
    (2, {"parallel": Parallel(data=2)}),
    (2, {"cache": "first-block:0.2"}),
    (3, {"cache": "taylorseer:3"}),
    (2, {"cache": "fora:2"}),
    (2, {"quantize": "int8-weight:min_features=64"}),
    (1, {"rewrites": "modulation"}),
]


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize(("ranks", "asked"), RUNS, ids=[f"{ranks}-{'-'.join(asked)}" for ranks, asked in RUNS])
def test_the_picture_is_exact(ranks: int, asked: dict[str, Any], tmp_path: Path) -> None:
    calls = [{}] if asked.keys() - {"parallel"} else [ODD]
    given = (str(tmp_path), asked, calls)
    for got in run_ranks(on_rank, ranks, *given, timeout_s=400) if ranks > 1 else [on_rank(*given)]:
        assert got["error"] <= EXACT
        assert "disk" in got["plan"]["placement"].values()
        assert got["moved"]["fetches"] > 10
        assert "placement: weights on cpu, disk" in got["applied"]


def compiled_on_rank(folder: str, ranks: int) -> list[Any]:
    from unittest import mock

    from parafuse.parallel import tiers

    torch.compiler.reset()
    with mock.patch.object(tiers, "BACKEND", "eager"):
        got = on_rank(folder, {"compile": True}, [{}, {}])
    return [got["error"], got["applied"]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_blocks(ranks: int, tmp_path: Path) -> None:
    given = (str(tmp_path), ranks)
    for wrong, applied in (
        run_ranks(compiled_on_rank, ranks, *given, timeout_s=400) if ranks > 1 else [compiled_on_rank(*given)]
    ):
        assert wrong <= EXACT
        assert any(line.startswith("compiled blocks") for line in applied)


def test_memory_stays_under_what_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every time that weights have come."""
    original, watched = Residence._bring, list[Watched]()

    def bring(self: Residence, unit: Any) -> None:
        original(self, unit)
        for one in watched:
            one.look()

    monkeypatch.setattr(Residence, "_bring", bring)
    with emoji(tmp_path) as engine:
        watched.append(Watched(engine))
        painted(engine)
        resident = sum(
            p.nbytes for p in {id(p): p for x in watched for m in x._parts for p in m.parameters()}.values()
            if p.numel() == 1 or any(p.stride())
        )  # fmt: skip
        ledger = engine.receipt["offload"]
        assert 0 < watched[0].most_bytes <= 14e6
        assert resident + ledger["most_resident_bytes"] <= 14e6, "with what is on its way"
    watched.clear()


def test_the_watch_sees_too_much(tmp_path: Path) -> None:
    """Negative control: without a placement all of it is there."""
    with emoji() as engine:
        one = Watched(engine)
        one.look()
        assert one.most_bytes > 40e6


def test_diffusers_keywords_are_taken(tmp_path: Path) -> None:
    plain = parafuse.Engine.from_pretrained("emoji", Config(device="cpu"))
    homes = {"": "cpu", "transformer": "disk", "vae": "disk"}
    engine = parafuse.Engine.from_pretrained(
        "emoji", Config(device="cpu"), device_map=homes, offload_folder=str(tmp_path)
    )
    assert engine.plan.placement == {
        "text_encoder": "cpu", "text_encoder_2": "cpu", "transformer": "disk", "vae": "disk",
    }  # fmt: skip
    assert np.array_equal(painted(engine), painted(plain))
    other = parafuse.Engine.from_pretrained("emoji", device_map="balanced", max_memory={"cpu": "1GB"})
    assert set((other.plan.placement or {}).values()) == {"cpu"}
    assert np.array_equal(painted(other), painted(plain))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting ranks and loading are failures."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("it came through the checks")

    monkeypatch.setattr(node_loading, "load_pipeline", forbidden)
    monkeypatch.setattr(engine_module.Workers, "start", forbidden)


TOO_LITTLE = {"placement": "balanced", "max_memory": {"cpu": "5MB"}}
BEFORE_LOADING: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (TOO_LITTLE, {}, "the weights need 46.1 MB of each rank, and "),
    ({"placement": {"transformr": "cpu"}}, {}, "did you mean 'transformer'?"),
    ({"placement": {"transformer": "cpu"}}, {}, "leaves out "),
    ({"placement": {"": "disk"}}, {}, "needs a folder; give offload_folder"),
    ({}, {"device_map": {"": "disk"}}, "needs a folder; give offload_folder"),
    ({}, {"device_map": "sequential"}, "device_map: placement='sequential': must be"),
    ({}, {"max_memory": {"cpu": 5}}, "is for a placement; give placement='balanced' or a map too."),
    ({}, {"device_map": "cpu", "max_memory": {"cpu": 5}}, "device_map='cpu' places nothing"),
    ({"placement": "balanced"}, {"device_map": "auto"}, "device_map='auto': the Config says placement='balanced'"),
    ({"placement": {"": "cpu"}, "offload": "group:to=disk"}, {}, "not with offload="),
]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("asked", "given", "message"), BEFORE_LOADING, ids=[str(i) for i in range(len(BEFORE_LOADING))]
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    asked: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    several: list[dict[str, Any]] = [{}, {"parallel": Parallel(ulysses=2)}]
    for more in several:
        with pytest.raises(ConfigError) as caught:
            parafuse.Engine.from_pretrained("emoji", Config(device="cpu", **asked, **more), **given)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def refused_on_rank() -> str:
    """What a rank hears, and whether it can go on."""
    text = ""
    try:
        parafuse.Engine.from_pretrained("emoji", Config(device="cpu", **TOO_LITTLE))
    except ConfigError as error:
        text = str(error)
    with parafuse.Engine.from_pretrained("emoji", Config(device="cpu", placement="balanced")) as engine:
        painted(engine)
    return text


def test_every_rank_is_told_and_can_go_on() -> None:
    texts = run_ranks(refused_on_rank, 2)
    assert texts[0] == texts[1]
    assert "the weights need 46.1 MB of each rank" in texts[0]


def another_on_rank() -> str:
    import torch.distributed as dist

    home = {"": "cpu"} if dist.get_rank() else "balanced"
    memory = None if dist.get_rank() else {"cpu": "14MB"}
    folder = None if dist.get_rank() else "/nowhere/at/all"
    try:
        config = Config(device="cpu", placement=home, max_memory=memory, offload_folder=folder)
        parafuse.Engine.from_pretrained("emoji", config)
    except (RankError, ConfigError) as error:
        return str(error)
    return ""


def test_ranks_with_other_placements_find_out() -> None:
    try:
        texts = run_ranks(another_on_rank, 2)
    except RankFailure as failure:  # pragma: no cover
        raise AssertionError("it hung") from failure
    assert all("rank 1 was given a plan other than rank 0's: offload_folder is" in text for text in texts), texts


# what goes with a device map


def test_device_maps_are_written_as_the_ecosystem_reads_them(tmp_path: Path) -> None:
    with emoji(tmp_path) as engine:
        pipeline = engine.pipeline
        assert pipeline.hf_device_map == engine.hf_device_map
        assert pipeline.hf_device_map["transformer"] in ("cpu", "disk")
        assert "disk" in pipeline.transformer.hf_device_map.values()
        inside = [path for path in engine.plan.placement or {} if path.startswith("transformer.")]
        assert set(pipeline.transformer.hf_device_map) == {"", *(path.removeprefix("transformer.") for path in inside)}
        with pytest.raises(ValueError, match="reset_device_map"):
            engine.to("cpu")
        with pytest.raises(ConfigError, match="the placement keeps the weights elsewhere already"):
            engine.enable_model_cpu_offload()
        with pytest.raises(ConfigError, match=r"transformer is offloaded \(the placement\)"):
            pipeline.transformer.to("cuda")
    assert pipeline.hf_device_map is None
    assert not hasattr(pipeline.transformer, "hf_device_map")


@pytest.mark.parametrize("more", [{}, {"cache": "first-block:0.2"}])
def test_reset_device_map(more: dict[str, Any], tmp_path: Path) -> None:
    """Weights are in the host's memory then, to() works again, and the picture is the same."""
    with emoji(tmp_path, **more) as engine:
        before = painted(engine)
        with pytest.raises(ConfigError, match="enable_model_cpu_offload: "):
            engine.enable_model_cpu_offload(device="cpu")
        engine.reset_device_map()
        assert engine.hf_device_map is None
        assert engine.plan.placement is None
        weights = list(engine.pipeline.transformer.parameters())
        assert all(any(p.stride()) or p.numel() == 1 for p in weights)
        assert not any(p.isnan().any() for p in weights)
        assert np.array_equal(painted(engine), before)
        assert engine.receipt["offload"] is None
        engine.to("cpu")
        assert np.array_equal(painted(engine), before)
        assert not any("placement" in line for line in engine.handle.applied)
        engine.enable_model_cpu_offload(device="cpu")
        assert hasattr(engine.pipeline.transformer, "_hf_hook")
        assert np.array_equal(painted(engine), before)
    assert "forward" not in vars(engine.pipeline.transformer)


def test_taken_off_the_model_is_as_it_was(tmp_path: Path) -> None:
    plain = parafuse.Engine.from_pretrained("emoji", Config(device="cpu"))
    with emoji(tmp_path) as engine:
        painted(engine)
    for name, part in plain.pipeline.components.items():
        if isinstance(part, nn.Module):
            other = getattr(engine.pipeline, name).state_dict()
            assert all(torch.equal(x, other[key]) for key, x in part.state_dict().items())


def test_a_loaded_pipeline_is_placed_too(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    from parafuse.engine.source import EMBEDDED

    defaults = {"width": 128, "height": 128, "true_cfg_scale": 2.0, "negative_prompt": "", "max_sequence_length": 16}
    pipeline = FluxPipeline.from_pretrained(EMBEDDED / "emoji")
    with parafuse.Engine.from_pipeline(pipeline) as engine:
        expected = painted(engine, **defaults)
    config = Config(placement="balanced", max_memory=LITTLE, offload_folder=str(tmp_path))
    with parafuse.Engine.from_pipeline(pipeline, config) as engine:
        assert "disk" in (engine.plan.placement or {}).values()
        assert np.array_equal(painted(engine, **defaults), expected)
    with pytest.raises(
        ConfigError, match=r"is held against the machine before weights are moved; use parafuse\.Engine"
    ):
        parafuse.apply(pipeline, config)


def test_state_and_saving_see_all_weights(tmp_path: Path) -> None:
    """A placed model is saved with its values."""
    with emoji(tmp_path / "away") as engine:
        expected = painted(engine)
        engine.save_pretrained(tmp_path / "saved")
    other = parafuse.Engine.from_pretrained(str(tmp_path / "saved"), Config(device="cpu"))
    defaults = {"width": 128, "height": 128, "true_cfg_scale": 2.0, "negative_prompt": "", "max_sequence_length": 16}
    assert np.array_equal(painted(other, **defaults), expected)


def test_from_pipe_shares_the_placement(tmp_path: Path) -> None:
    from diffusers import FluxImg2ImgPipeline

    with emoji(tmp_path) as engine:
        other = engine.from_pipe(FluxImg2ImgPipeline)
        assert other.hf_device_map is not None
        with pytest.raises(ConfigError, match="another pipeline has the same components, placed; close its engine"):
            engine.reset_device_map()
        before = painted(engine)
        other.close()
        assert engine.hf_device_map is not None
        assert np.array_equal(painted(engine), before)
        engine.reset_device_map()
        assert np.array_equal(painted(engine), before)


def test_a_lora_on_placed_weights(tmp_path: Path) -> None:
    """Loaded, set and unloaded; its own weights come and go with their blocks."""
    plain = emoji()
    weights = lora(plain.pipeline, ["transformer"], rank=2, seed=3, every=5)
    before = painted(plain)
    plain.load_lora_weights(dict(weights))
    expected = painted(plain)
    assert np.abs(expected - before).max() > 0.05
    with emoji(tmp_path) as engine:
        assert np.array_equal(painted(engine), before)
        engine.load_lora_weights(dict(weights))
        assert np.abs(painted(engine) - expected).max() <= EXACT
        engine.unload_lora_weights()
        assert np.array_equal(painted(engine), before)


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"offload_folder=.*: .*file is no folder; give another one"):
        emoji(tmp_path / "file" / "away")


def test_files_that_are_used_again_are_the_room_that_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what they have in them, as far as their size tells; not by being there."""
    with emoji(tmp_path) as engine:
        before = painted(engine)
    kept = {file.name: file.stat().st_size for file in tmp_path.glob(f"*{ENDING}") if file.stat().st_size}
    assert kept
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    with emoji(tmp_path) as engine:
        assert np.array_equal(painted(engine), before)
    largest = max(kept, key=lambda name: kept[name])
    other = tmp_path / "others"
    other.mkdir()
    for name, size in kept.items():
        shutil.copy(tmp_path / name, other / name)
        if name == largest:
            os.truncate(other / name, 2 * size)  # of another model
    with pytest.raises(ConfigError, match=r"needs .* MB.*, and the disk has .* free; give another one"):
        emoji(other)
    (other / largest).rename(other / f"{largest.removesuffix(ENDING)}{CHANGED}")
    os.truncate(other / f"{largest.removesuffix(ENDING)}{CHANGED}", kept[largest])
    with pytest.raises(ConfigError, match=r"needs .* MB.*, and the disk has .* free; give another one"):
        emoji(other)


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(ConfigError, match=r"needs .* MB, and the disk has 1 MB free; give another one"):
        emoji(tmp_path)
