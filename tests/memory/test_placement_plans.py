"""From a model and a machine, both made up, to a placement: what fits, what is refused with which numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import parafuse
from parafuse.config import Config, Parallel
from parafuse.engine import planner
from parafuse.engine.placement import settle
from parafuse.engine.placement.balance import balanced, check_fits
from parafuse.engine.placement.homes import home_in
from parafuse.engine.placement.inventory import ACTIVATIONS, Inventory, inventory
from parafuse.engine.placement.pieces import owners_of, pieces_of
from parafuse.engine.placement.unbuilt import unbuilt
from parafuse.engine.plan import Plan
from parafuse.engine.quantize import settle as quantize_settle
from parafuse.engine.source import locate
from parafuse.errors import ConfigError
from parafuse.hardware import Gpu
from parafuse.placement import max_memory_of
from parafuse.quantization import quantize_of

GB = 10**9


@dataclass(frozen=True)
class Made:
    """A made-up piece."""

    path: str
    num_bytes: int

    @property
    def component(self) -> str:
        return self.path.partition(".")[0]


MODEL = [
    Made("transformer", 1 * GB),
    *[Made(f"transformer.blocks.{i}", 2 * GB) for i in range(10)],
    Made("text_encoder", 9 * GB),
    Made("vae", 1 * GB),
]
"""31 GB."""


def machine(gpus: Sequence[int], *, host: int = 64 * GB, local: int = 1, memory: Any = None, disk: bool = False) -> Any:
    return inventory(
        device="cuda" if gpus else "cpu",
        gpu_bytes=[size * GB for size in gpus],
        host_bytes=host,
        local=local,
        max_memory=max_memory_of(memory),
        has_disk=disk,
    )


def used(homes: dict[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for piece in MODEL:
        found[homes[piece.path]] = found.get(homes[piece.path], 0) + piece.num_bytes
    return found


def test_each_rank_has_its_share_of_a_node() -> None:
    """The smallest of the devices that have the same place in their ranks; the host's memory is shared."""
    there = machine([40, 24, 80, 20], local=2)
    assert there.num_devices == 2
    assert [room.num_bytes for room in there.rooms] == [int(size * GB * (1 - ACTIVATIONS)) for size in (40, 20)]
    assert there.spare[0].num_bytes == int(32 * GB * (1 - ACTIVATIONS))
    assert [room.home for room in (*there.rooms, *there.spare)] == ["0", "1", "cpu"]
    assert machine([40, 24, 80], local=2).num_devices == 1, "one is left over: all ranks have as many"
    assert machine([], disk=True).homes == ["cpu", "disk"]


def test_room_for_activations_is_kept_but_where_the_user_says() -> None:
    assert machine([20]).rooms[0].num_bytes == 17 * GB
    assert machine([20], memory={0: "19GB"}).rooms[0].num_bytes == 19 * GB
    assert machine([20], memory={0: "30GB"}).rooms[0].num_bytes == 20 * GB, "not more than there is"
    assert [room.home for room in machine([20, 20], memory={0: "5GB"}).rooms] == ["0"], "the other is not used"


@pytest.mark.parametrize(
    ("gpus", "memory", "message"),
    [
        ([20, 20], {2: "5GB"}, r"max_memory\[2\]: each rank has 2 devices here \(2 on this machine for 1 rank\)"),
        ([20, 20], {1: "5GB"}, "max_memory: names device 1 and not 0"),
        ([], {0: "5GB"}, r"max_memory\[0\]: ranks compute on the CPU here"),
    ],
)
def test_memory_of_devices_that_are_not_there(gpus: list[int], memory: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        machine(gpus, memory=memory)


def test_what_fits_is_spread_evenly_and_nothing_leaves_the_devices() -> None:
    homes = balanced(MODEL, machine([24, 24]), "balanced")
    assert used(homes) == {"0": 15 * GB, "1": 16 * GB} or used(homes) == {"0": 16 * GB, "1": 15 * GB}
    blocks = [homes[piece.path] for piece in MODEL if piece.component == "transformer"]
    assert sum(one != other for one, other in pairwise(blocks)) <= 1


def test_the_host_comes_before_the_disk_and_both_come_last() -> None:
    there = machine([20], host=10 * GB, disk=True)  # 17 GB and 8.5 GB of room
    homes = balanced(MODEL, there, "balanced")
    assert set(homes.values()) == {"0", "cpu", "disk"}
    assert used(homes)["cpu"] == 8 * GB, "as much as fits"
    passing = 4 * GB  # two blocks at a time, or the text encoder
    assert used(homes)["0"] <= 17 * GB - passing
    assert used(homes)["0"] >= 0.7 * (17 * GB - 9 * GB)


def test_without_space_for_what_comes_and_goes_it_would_be_fuller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The safeguard, switched off."""
    from parafuse.engine.placement import balance

    there = machine([20], host=100 * GB)
    assert used(balanced(MODEL, there, "balanced"))["0"] + 4 * GB <= 17 * GB
    monkeypatch.setattr(balance, "_passing", lambda pieces, away: 0)
    assert used(balanced(MODEL, there, "balanced"))["0"] + 4 * GB > 17 * GB


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        balanced(MODEL, machine([10, 10], host=4 * GB), "balanced")
    text = str(caught.value)
    for part in (
        "placement='balanced': the weights need 31 GB of each rank",
        "find no room",
        "device 0: room for 8.5 GB (of 10 GB, the rest for activations)",
        "device 1: room for 8.5 GB",
        "cpu: room for 3.4 GB",
        "give offload_folder to keep the rest on a disk",
    ):
        assert part in text, text
    with pytest.raises(ConfigError, match=r"needs 9 GB there beside the 0 MB that stay; it has 2 GB"):
        balanced(MODEL, machine([10], memory={0: "2GB"}, disk=True), "balanced")


def test_a_map_that_puts_too_much_into_a_place() -> None:
    homes = {"transformer": "0", "text_encoder": "1", "vae": "1"}
    check_fits(MODEL, homes, machine([24, 12]))
    with pytest.raises(ConfigError, match="the map puts 21 GB on device 0, which has 20 GB; put less there"):
        check_fits(MODEL, homes, machine([20, 12]))
    with pytest.raises(ConfigError, match=r"the map puts 10 GB on device 1, which has 9 GB \(max_memory\)"):
        check_fits(MODEL, homes, machine([24, 12], memory={0: "24GB", 1: "9GB"}))
    with pytest.raises(ConfigError, match="comes to device 0 to run, and needs 9 GB there beside the 21 GB that stay"):
        check_fits(MODEL, homes | {"text_encoder": "cpu"}, machine([24, 12]))


# real architectures on made-up machines


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts so many GPUs of so many GB into this machine, with 64 GB of its own."""

    def put_in(number: int, size: int, *, local: int = 1, host: int = 64) -> None:
        found = [Gpu(name="made up", memory_bytes=size * GB, capability="9.0", nvlinks=0)] * number
        for module in (planner, settle):
            monkeypatch.setattr(module, "num_cuda_devices", lambda: number)
        monkeypatch.setattr(settle, "visible_gpus", lambda: found)
        monkeypatch.setattr(quantize_settle, "visible_gpus", lambda: found)
        monkeypatch.setattr(settle, "memory_bytes", lambda: host * GB)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))

    return put_in


def resolved(model: str, ranks: int = 1, **asked: Any) -> Plan:
    return planner.resolve(Config(**asked), locate(model), ranks)


def test_two_ranks_with_two_devices_each(gpus: Any) -> None:
    """Two-way sequence parallel, each rank's blocks on its two devices: FLUX.1 (34 GB) over 2 x 24 GB for each rank."""
    gpus(4, 24, local=2)
    plan = resolved("random:flux.1-dev", 2, placement="balanced", parallel=Parallel(ulysses=2))
    assert (plan.devices_per_rank, plan.device, plan.sequence_degree) == (2, "cuda", 2)
    assert plan.placement is not None
    assert set(plan.placement.values()) == {"0", "1"}, "counted within the rank"
    pieces = pieces_of(owners_of(unbuilt(locate("random:flux.1-dev"), "bfloat16"), None))
    loads = {"0": 0, "1": 0}
    for piece in pieces:
        loads[home_in(plan.placement, piece.path) or ""] += piece.num_bytes
    assert sum(loads.values()) == pytest.approx(33.9e9, rel=0.02)
    assert max(loads.values()) <= 1.05 * sum(loads.values()) / 2
    assert plan == resolved("random:flux.1-dev", 2, placement="balanced", parallel=Parallel(ulysses=2))
    again = planner.resolve(plan.config(), locate("random:flux.1-dev"), 2)
    assert again.placement == plan.placement, "a plan makes itself again"


def test_auto_places_where_it_does_not_fit_on_one(gpus: Any) -> None:
    gpus(2, 80)
    plan = resolved("random:flux.1-dev", placement="auto")
    assert plan.placement is None
    assert "all of it fits on one device" in plan.why
    gpus(2, 24)
    assert set((resolved("random:flux.1-dev", placement="auto").placement or {}).values()) == {"0", "1"}


def test_bytes_are_those_after_quantization(gpus: Any) -> None:
    """In 8 bits, FLUX.1 and its text encoder fit on one device of 24 GB; in 16 bits they do not."""
    gpus(1, 24)
    with pytest.raises(ConfigError, match=r"placement='balanced': the weights need 33\.7 GB of each rank"):
        resolved("random:flux.1-dev", placement="balanced", max_memory={0: "24GB", "cpu": 0})
    plan = resolved(
        "random:flux.1-dev", placement="balanced", quantize="int8-weight:text_encoders=int8-weight",
        max_memory={0: "24GB", "cpu": 0},
    )  # fmt: skip
    assert set((plan.placement or {}).values()) == {"0"}


def test_a_last_resort_is_taken_only_where_it_is_needed(gpus: Any) -> None:
    gpus(1, 16)
    plan = resolved("random:flux.1-dev", placement="balanced", offload_folder="away")
    assert plan.placement is not None
    assert set(plan.placement.values()) == {"0", "cpu"}
    assert plan.offload_folder == "away"


# pieces


@pytest.mark.parametrize("model", ["emoji", "tiny:flux.1-dev"])
def test_pieces_are_known_before_loading_as_they_are_after(model: str) -> None:
    """Names and bytes of what is built without memory are those of what is loaded."""
    source = locate(model)
    before = pieces_of(owners_of(unbuilt(source, "float32"), None))
    with parafuse.Engine.from_pretrained(model, Config(dtype="float32", device="cpu")) as engine:
        loaded = {name: part for name, part in engine.pipeline.components.items() if isinstance(part, nn.Module)}
        after = pieces_of(owners_of(unbuilt(source, "float32", loaded), None))
    order = [piece.component for piece in before]
    assert sorted(before, key=lambda one: order.index(one.component)) == sorted(
        after, key=lambda one: order.index(one.component)
    )
    assert sum("." in piece.path for piece in before) > 5


def test_quantized_layers_have_the_bytes_that_they_get() -> None:
    """Against what is kept once they are quantized."""
    method = quantize_of("int8-weight:min_features=64")
    source = locate("emoji")
    before = pieces_of(owners_of(unbuilt(source, "float32"), method))
    with parafuse.Engine.from_pretrained("emoji", Config(quantize=method, device="cpu")) as engine:
        weights = [
            part for p in engine.pipeline.transformer.parameters()
            for part in ([getattr(p, name) for name in p.__tensor_flatten__()[0]]
                         if hasattr(p, "__tensor_flatten__") else [p])
        ]  # fmt: skip
        kept = sum(part.nbytes for part in weights)
    predicted = sum(piece.num_bytes for piece in before if piece.component == "transformer")
    assert predicted == pytest.approx(kept, rel=0.01)


# maps that are wrong


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"transformr": "cpu"}, "the model has no component 'transformr' with weights; did you mean 'transformer'?"),
    ({"scheduler": "cpu", "": "cpu"}, "the model has no component 'scheduler' with weights; there are "),
    (
        {"transformer.transformer_block.0": "cpu", "": "cpu"},
        "transformer has no such module; did you mean 'transformer.transformer_blocks.0'?",
    ),
    ({"transformer.transformer_blocks.99": "cpu", "": "cpu"}, "transformer has no such module"),
    ({"transformer": "cpu"}, "placement: leaves out text_encoder; give 'text_encoder' a place, or ''"),
    (
        {"transformer.transformer_blocks": "cpu", "vae": "cpu", "text_encoder": "cpu", "text_encoder_2": "cpu"},
        "placement: leaves out transformer.",
    ),
    ({"": 0}, "placement['']='0': ranks compute on the CPU here, and have no devices with numbers"),
    ({"": "cpu", "vae": "disk"}, "placement['vae']='disk': needs a folder; give offload_folder"),
]


@pytest.mark.parametrize(("homes", "message"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_maps_that_do_not_fit_the_model(homes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved("emoji", placement=homes, device="cpu")
    assert message in str(caught.value)


def test_a_block_is_in_one_place(gpus: Any) -> None:
    gpus(2, 24)
    homes = {"": 0, "transformer.transformer_blocks.0.attn": 1}
    with pytest.raises(ConfigError, match=r"placement: transformer.transformer_blocks.0 runs as one, but transformer"):
        resolved("emoji", placement=homes)
    whole = resolved("emoji", placement={"": 0, "transformer.transformer_blocks.0": 1}).placement
    assert whole is not None
    assert {path for path, home in whole.items() if home == "1"} == {"transformer.transformer_blocks.0"}
    with pytest.raises(ConfigError, match=r"placement\['vae'\]='2': each rank has devices 0, 1, counted within"):
        resolved("emoji", placement={"": 0, "vae": 2})


def test_a_map_of_accelerate_is_taken_as_it_is(gpus: Any) -> None:
    """What its own `infer_auto_device_map` gives for a component: blocks, and single layers at both ends."""
    from accelerate import infer_auto_device_map

    gpus(2, 24)
    transformer = unbuilt(locate("emoji"), "float32").modules["transformer"]
    whole: Any = transformer._no_split_modules
    theirs = infer_auto_device_map(transformer, {0: "20MB", 1: "40MB"}, no_split_module_classes=whole)
    assert set(theirs.values()) == {0, 1}
    homes = {f"transformer.{path}": device for path, device in theirs.items()}
    plan = resolved("emoji", placement=homes | dict.fromkeys(("vae", "text_encoder", "text_encoder_2"), 0))
    assert plan.placement is not None
    for path, _ in transformer.named_parameters():
        longest = max((key for key in theirs if f"{path}.".startswith(f"{key}.")), key=len)
        assert home_in(plan.placement, f"transformer.{path}") == str(theirs[longest]), path


def test_a_single_file_is_refused_and_a_map_of_the_host_computes_there(tmp_path: Path, gpus: Any) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="is a single file, whose modules are known only after loading; save it as"):
        resolved(str(tmp_path / "x.safetensors"), placement="balanced")
    gpus(2, 24)
    assert resolved("emoji", placement={"": "cpu"}).device == "cpu"
    assert resolved("emoji", placement={"": 0}).device == "cuda"


def test_custom_parts_are_placed_as_a_whole_by_their_files(tmp_path: Path) -> None:
    """A class that comes with the model is not known before it is loaded."""
    import shutil

    from parafuse.engine.source import EMBEDDED

    folder = Path(shutil.copytree(EMBEDDED / "emoji", tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["my_vae", "MyVae"]}))
    found = unbuilt(locate(str(folder)), "float32")
    assert found.others == {"vae": (folder / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size}
    with pytest.raises(ConfigError, match="the modules of vae are known only after loading; give 'vae' itself"):
        resolved(str(folder), placement={"": "cpu", "vae.decoder": "cpu"}, device="cpu")
    assert isinstance(machine([]), Inventory)


def test_configurations_of_a_hub_id_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """They alone: no weights. Where the hub is not there, the error says so."""
    import huggingface_hub

    from parafuse.engine.source import EMBEDDED

    with pytest.raises(ConfigError, match="the configuration of model='owner/name' is needed, and cannot be fetched"):
        resolved("owner/name", placement="balanced", device="cpu")
    asked: list[Any] = []

    def fetched(hub_id: str, **more: Any) -> str:
        asked.append((hub_id, more["allow_patterns"]))
        return str(EMBEDDED / "emoji")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    plan = resolved("owner/name", placement="balanced", device="cpu")
    assert plan.placement == resolved("emoji", placement="balanced", device="cpu").placement
    assert asked == [("owner/name", ["*.json", "**/*.json"])]


def test_the_first_of_a_ranks_devices_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank n of a node has n times as many devices before it as each rank has."""
    import torch

    from parafuse.parallel.world import join_world

    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert join_world("cuda", 9.0, 1, num_devices=2).device == torch.device("cuda", 2)
    assert join_world("cuda", 9.0, 1).device == torch.device("cuda", 1)
    assert seen == [torch.device("cuda", 2), torch.device("cuda", 1)]


def test_devices_are_counted_from_the_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from parafuse.engine.placement.put_on import Placing
    from parafuse.placement import PlacedWeights

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    placing = Placing.of(
        PlacedWeights(device="cuda", homes=(("vae", "1"), ("unet", "0"), ("text", "cpu"))), nn.Linear(1, 1)
    )
    assert placing.device == torch.device("cuda", 2)
    homes = {name: placing.device_of(placing.home(name)) for name in ("vae", "unet", "text", "later")}
    assert [str(device) for device in homes.values()] == ["cuda:3", "cuda:2", "cuda:2", "cuda:2"]
    assert [placing.is_away(placing.home(name)) for name in homes] == [False, False, True, False]


def test_weights_in_8_bits_move_as_the_objects_that_they_are() -> None:
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from parafuse.engine.placement.put_on import Placing
    from parafuse.placement import PlacedWeights

    layer, x = nn.Linear(32, 16), torch.randn(3, 32)
    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    expected, weight = layer(x), layer.weight
    placing = Placing.of(PlacedWeights(device="cpu", homes=(("vae", "cpu"),)), layer)
    placing.send(weight, torch.device("cpu"))
    assert layer.weight is weight
    assert torch.equal(layer(x), expected)
    placing.send(weight, torch.device("meta"))
    assert layer.weight is weight
    assert weight.device.type == "meta"
