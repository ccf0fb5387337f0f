"""Placements and memory limits as people write them: diffusers' and accelerate's forms, texts, files, plans."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parafuse.config import Axis, Config
from parafuse.engine.plan import Plan
from parafuse.errors import ConfigError
from parafuse.launch.cli import CONFIG_OPTIONS
from parafuse.launch.options import build, given
from parafuse.placement import MaxMemory, Placement, max_memory_of, placement_of

FORMS: list[tuple[Any, Placement | None]] = [
    (None, None),
    ("rank", None),
    ("balanced", Placement("balanced")),
    ("auto", Placement("auto")),
    ({"": 0}, Placement("map", (("", "0"),))),
    ({"unet": "cuda:1", "vae": torch.device("cuda", 1)}, Placement("map", (("unet", "1"), ("vae", "1")))),
    ({"unet": "cuda", "vae": torch.device("cpu")}, Placement("map", (("unet", "0"), ("vae", "cpu")))),
    (
        {"transformer.transformer_blocks.0": 1, "vae": "cpu", "text_encoder": "disk"},
        Placement("map", (("transformer.transformer_blocks.0", "1"), ("vae", "cpu"), ("text_encoder", "disk"))),
    ),
    ('{"unet": 1, "vae": "cpu"}', Placement("map", (("unet", "1"), ("vae", "cpu")))),
]


@pytest.mark.parametrize(("value", "meant"), FORMS, ids=[str(value) for value, _ in FORMS])
def test_forms_of_placements(value: Any, meant: Placement | None) -> None:
    assert placement_of(value) == meant
    assert placement_of(meant) == meant
    assert placement_of(None if meant is None else str(meant)) == meant, "its text makes it again"


def test_a_map_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"transformer": 0, "vae": "cpu"}))
    assert Config(placement=str(tmp_path / "map.json")).placement == placement_of({"transformer": 0, "vae": "cpu"})


REFUSED: list[tuple[Any, str]] = [
    ("balancd", "placement='balancd': must be 'balanced', 'auto', 'rank', a map"),
    ("balancd", "did you mean 'balanced'?"),
    ("sequential", "placement='sequential': must be"),
    ({}, "placement={}: must be"),
    (3, "placement=3: must be"),
    ({1: 0}, "placement: key 1: must be the path of a component or module"),
    ({"vae": True}, "placement['vae']=True: is no device"),
    ({"vae": -1}, "placement['vae']=-1: is no device"),
    ({"vae": "mps"}, "placement['vae']='mps': is no device; must be a number (counted within the rank)"),
    ({"vae": "dsk"}, "placement['vae']='dsk': is no device"),
    ({"vae": "dsk"}, "did you mean 'disk'?"),
    ({"vae": torch.device("meta")}, "is no device"),
    ('{"vae": 0, "vae": 1}', "'vae' is given twice."),
    ('{"vae": ', "cannot be read as JSON"),
    ("gone.json", "placement='gone.json': cannot be read (No such file or directory)."),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_placements_that_are_none(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(placement=value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


GIB = 1 << 30
MEMORIES: list[tuple[Any, MaxMemory]] = [
    ({0: "40GiB", "cpu": "60GB"}, MaxMemory(((0, 40 * GIB),), 60 * 10**9)),
    ({1: 5, 0: "1.5GiB"}, MaxMemory(((0, 3 * GIB // 2), (1, 5)))),
    ({"0": "512MB", "cuda:1": "512MiB"}, MaxMemory(((0, 512 * 10**6), (1, 512 << 20)))),
    ({"cpu": "0GB", "disk": "1000GB"}, MaxMemory((), 0, 10**12)),
    ("0=40GiB,cpu=60GB", MaxMemory(((0, 40 * GIB),), 60 * 10**9)),
    ("0=100", MaxMemory(((0, 100),))),
]


@pytest.mark.parametrize(("value", "meant"), MEMORIES, ids=[str(value) for value, _ in MEMORIES])
def test_forms_of_memory(value: Any, meant: MaxMemory) -> None:
    """As accelerate reads them."""
    from accelerate.utils.modeling import convert_file_size_to_int

    assert max_memory_of(value) == meant
    assert max_memory_of(str(meant)) == meant
    sizes = [size for _, size in meant.devices] + [size for size in (meant.cpu, meant.disk) if size is not None]
    for size in value.values() if isinstance(value, dict) else ():
        assert convert_file_size_to_int(size) in sizes


MEMORIES_REFUSED: list[tuple[Any, str]] = [
    ("40GiB", "max_memory='40GiB': '40GiB' names no device; must be {0: '40GiB', 'cpu': '60GiB'}"),
    ("0=1GB,0=2GB", "0 is given twice."),
    ({0: 1, "cuda:0": 2}, "max_memory: 0 is given twice."),
    ({0: "40Gb"}, "'Gb' may be bits (accelerate takes it so) or bytes; write GB."),
    ({0: "much"}, "max_memory[0]='much': must be a number of bytes, or a size such as '40GiB'"),
    ({0: -1}, "max_memory[0]=-1: must be a number of bytes"),
    ({0: 1.5}, "max_memory[0]=1.5: must be"),
    ({"gpu": 1}, "did you mean 'cpu'?"),
    ({}, "max_memory={}: must be"),
]


@pytest.mark.parametrize(("value", "message"), MEMORIES_REFUSED, ids=[f"{i}" for i in range(len(MEMORIES_REFUSED))])
def test_memory_that_is_none(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(placement="balanced", max_memory=value)
    assert message in str(caught.value)


def test_nothing_is_taken_and_ignored() -> None:
    with pytest.raises(ConfigError, match="max_memory='cpu=5': is for a placement; give placement='balanced' or a map"):
        Config(max_memory={"cpu": 5})
    with pytest.raises(ConfigError, match="offload_folder='x': is for a placement"):
        Config(offload_folder="x")
    with pytest.raises(ConfigError, match="offload_folder=3: must be the name of a folder"):
        Config(placement="balanced", offload_folder=3)  # pyright: ignore[reportArgumentType]


def test_a_config_comes_back_from_its_file(tmp_path: Path) -> None:
    config = Config(placement={"": "cpu", "vae": "disk"}, max_memory={"cpu": "2GB"}, offload_folder="away")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert Config.from_file(tmp_path / "config.json") == config
    assert hash(config) == hash(Config.from_file(tmp_path / "config.json"))
    written = {"placement": {"": "cpu"}, "max_memory": {"0": "2GB"}}  # by hand
    assert Config.from_dict(written) == Config(placement={"": "cpu"}, max_memory={0: 2 * 10**9})


def test_the_command_line_says_the_same() -> None:
    typed = {"placement": '{"vae": "cpu", "": 0}', "max_memory": "0=40GiB,cpu=60GiB", "offload_folder": "away"}
    built = build(Config(), given(CONFIG_OPTIONS, typed))
    assert built == Config(
        placement={"vae": "cpu", "": 0}, max_memory={0: "40GiB", "cpu": "60GiB"}, offload_folder="away"
    )


def plan(**more: Any) -> Plan:
    degrees = {str(axis): 1 for axis in Axis}
    return Plan(
        model="m", model_id="i", world_size=1, degrees=degrees, device="cuda", dtype="bfloat16", timeout_s=9, **more
    )


def test_a_plan_holds_where_everything_is(tmp_path: Path) -> None:
    one = plan(placement={"vae": "1", "unet": "disk"}, devices_per_rank=2, offload_folder="away")
    one.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == one
    again = one.config().placement
    assert isinstance(again, Placement)
    assert (again.homes, again.device) == ((("vae", "1"), ("unet", "disk")), "cuda")
    assert "placed on device 1, disk of each rank" in one.one_line()
    assert plan().config().placement is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"placement": {"vae": "1"}}, r"plan.placement\['vae'\]='1': each rank has 1 \(plan.devices_per_rank\)"),
        ({"placement": {"vae": "disk"}}, r"plan.placement\['vae'\]='disk': plan.offload_folder is missing"),
        ({"devices_per_rank": 0}, "plan.devices_per_rank=0: must be a whole number of at least 1"),
        ({"placement": "balanced"}, "plan.placement='balanced': must be a map"),
    ],
)
def test_a_plan_that_cannot_be(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**more)


def test_the_leaf_is_free_of_torch() -> None:
    code = "import parafuse.placement, parafuse.config, parafuse.engine.planner, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
