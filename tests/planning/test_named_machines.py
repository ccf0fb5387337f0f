"""Which machine of the table a GPU's name or a written number of ranks means."""

from __future__ import annotations

import dataclasses
import json

import pytest

from parafuse.engine.planning.machine import (
    GUESSES,
    MEASURED,
    OLDER,
    TABLE,
    Machine,
    across_nodes,
    estimated,
    kind_of,
    machine_names,
    named,
    of_kind,
)
from parafuse.errors import ConfigError
from tests.planning.models import DEVICE, FAST, machine

SAID = {
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H800": "h800",
    "NVIDIA H800 PCIe": "h800-pcie",
    "NVIDIA H20": "h20",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100 80GB PCIe": "a100-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-pcie",
    "NVIDIA A800-SXM4-80GB": "a800",
    "NVIDIA A800 80GB PCIe": "a800-pcie",
    "NVIDIA A10": "a10",
    "NVIDIA A40": "a40",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA L4": "l4",
    "NVIDIA L40": "l40",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000-ada",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000",
    "NVIDIA GeForce RTX 4080": "rtx4080",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "Tesla T4": "t4",
    "Tesla V100-SXM2-32GB": "v100",
    "Tesla V100-PCIE-16GB": "v100-pcie",
}


@pytest.mark.parametrize("said", SAID)
def test_names_that_drivers_say(said: str) -> None:
    assert of_kind(said) == SAID[said]


@pytest.mark.parametrize(
    "said",
    [
        "Radeon", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA A10G", "NVIDIA GeForce RTX 4070", "Quadro RTX 6000",
        "NVIDIA B300 SXM6 AC", "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "",
    ],
)  # fmt: skip
def test_names_that_only_resemble_one(said: str) -> None:
    assert of_kind(said) is None


@pytest.mark.parametrize(
    ("said", "capability", "kind"),
    [
        ("NVIDIA GH200 480GB", "9.0", "h100"),
        ("NVIDIA A30", "8.0", "a100-80g"),
        ("NVIDIA RTX A1000", "8.6", "a40"),
        ("NVIDIA GeForce RTX 3080", "8.6", "rtx3090"),
        ("Orin", "8.7", "a40"),
        ("NVIDIA RTX 5000 Ada Generation", "8.9", "l40"),
        ("NVIDIA GeForce RTX 4070", "8.9", "rtx4080"),
        ("NVIDIA T400 4GB", "7.5", "t4"),
        ("NVIDIA TITAN V", "7.0", "v100"),
        ("NVIDIA GeForce GTX 1080", "6.1", "t4"),
        ("NVIDIA B300 SXM6 AC", "10.3", "b200"),
        ("NVIDIA GB10", "12.1", "rtx5090"),
    ],
)
def test_a_gpu_that_is_not_in_the_table_is_taken_for_the_nearest(said: str, capability: str, kind: str) -> None:
    assert of_kind(said) is None
    assert estimated(said, 0, capability) == kind


def test_without_a_capability_the_nearest_memory_decides() -> None:
    assert estimated("unknown", 16 << 30) in ("rtx4080", "t4")
    assert estimated("unknown", 180 << 30) == "b200"
    assert named(f"1x{estimated('unknown', 0)}").device.kind == "cuda"


def test_every_kind_that_may_be_taken_can_be_named() -> None:
    table = json.loads(TABLE.read_text())
    assert {kind for pair in GUESSES.values() for kind in pair} <= set(machine_names())
    assert {name for name, one in table["devices"].items() if one["kind"] == "cuda"} <= set(machine_names())
    assert OLDER in GUESSES


@pytest.mark.parametrize(("text", "per_node"), [("12xh100", 8), ("6xa10", 4), ("3xa100-pcie-bridge", 2)])
def test_ranks_that_are_not_whole_nodes_are_refused(text: str, per_node: int) -> None:
    number, _, kind = text.partition("x")
    with pytest.raises(ConfigError, match=f"hardware='{text}'") as caught:
        named(text)
    assert f"a multiple of {per_node}" in str(caught.value)
    assert f"1x{number}x{kind}" in str(caught.value)
    assert named(f"1x{number}x{kind}").num_ranks == int(number)


@pytest.mark.parametrize("text", ["8xa10", "12xh100", "96xcpu"])
def test_one_node_is_never_split(text: str) -> None:
    number = int(text.partition("x")[0])
    for one in (named(text, one_node=True), named(f"1x{text}")):
        assert (one.nodes, one.per_node) == (1, number)
        assert one.link(number) is one.inside


def test_more_ranks_than_a_node_has_are_whole_nodes() -> None:
    assert (named("8xa10").per_node, named("8xa10").nodes) == (4, 2)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1xrtx4090", "rtx4090"),
        ("2x8xh100-ib400", "h100-ib400"),
        ("4xl40-pcie", "l40-pcie"),
        ("16xa100-80g-pcie4", "a100-80g-pcie4"),
    ],
)
def test_a_machine_knows_its_kind(text: str, kind: str) -> None:
    found = named(text)
    assert found.kind == kind
    assert named(f"2x1x{kind}").device == found.device
    assert not found.is_measured
    assert Machine.from_dict(found.to_dict()).kind == kind


def test_a_kept_file_without_a_kind_loads() -> None:
    kept = machine().to_dict()
    del kept["kind"]
    assert Machine.from_dict(kept) == machine()


def test_nodes_of_a_measured_machine_are_joined_by_what_its_kind_has() -> None:
    device = dataclasses.replace(DEVICE, name="NVIDIA H100 80GB HBM3")
    measured = dataclasses.replace(machine(), device=device, across=FAST, sources=(MEASURED,))
    assert across_nodes(measured, 1) == measured
    found = across_nodes(measured, 4)
    assert (found.nodes, found.num_ranks, found.inside) == (4, 32, FAST)
    assert found.across == named("8xh100").across
    assert found.is_measured
    assert "estimate" in found.sources[-1]
    unknown = dataclasses.replace(measured, device=dataclasses.replace(device, name="NVIDIA A30", capability="8.0"))
    assert across_nodes(unknown, 2).across == named("8xa100-80g").across
    cpu = dataclasses.replace(measured, device=dataclasses.replace(device, kind="cpu"))
    assert kind_of(cpu.device) == "cpu"
    assert across_nodes(cpu, 2).across == named("1xcpu").across
