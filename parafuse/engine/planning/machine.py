"""Machines as the planner sees them: what a device computes and moves in a second, and what joins the ranks.
Torch-free.

`machines.json` has named ones, each number with its source; `measure.py` finds those of the machine at hand."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parafuse.errors import ConfigError, nearest

TABLE = Path(__file__).with_name("machines.json")
SPEC = re.compile(r"(?:(?P<nodes>\d+)x)?(?:(?P<number>\d+)x)(?P<name>[a-z].*)")
MEASURED = "measured here"
"""The source of a machine that was measured."""
GUESSES: dict[tuple[int, int], tuple[str, str]] = {
    (7, 0): ("v100", "v100"), (7, 5): ("t4", "t4"), (8, 0): ("a100-80g", "a100-80g"), (8, 6): ("a40", "rtx3090"),
    (8, 9): ("l40", "rtx4080"), (9, 0): ("h100", "h100"), (10, 0): ("b200", "b200"), (12, 0): ("rtx5090", "rtx5090"),
}  # fmt: skip
"""Compute capability -> the kind that a GPU of no known name is taken for, and that a GeForce is."""
OLDER = (7, 5)
"""Taken for what is older than all of them."""
Curve = tuple[tuple[float, float], ...]
"""(size, seconds) of one call, by size: floating-point operations of a product, bytes of anything else."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a rank computes on."""

    name: str
    kind: str
    """cuda or cpu."""
    memory_bytes: int
    bytes_per_s: float
    """Read and written by a kernel that only copies."""
    flops: Mapping[str, float | None]
    """dtype -> floating-point operations a second of large matrix products; fp8 and int8 beside torch's dtypes."""
    attention: Mapping[str, float | None]
    """The same of long attentions."""
    units: int = 1
    """Of which each computes tiles of a product by itself: streaming multiprocessors."""
    kernel_s: float = 0.0
    """The least that a kernel takes."""
    host_s: float = 0.0
    """That the host takes for an operator: on CUDA beside the device, on a CPU before it computes."""
    capability: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict[str, Curve])
    """`family.dtype` -> times that were measured; what has none goes by the rates above."""
    host_bytes_per_s: float = 20e9
    """From the host's memory to the device, for offload."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins two ranks."""

    name: str
    bytes_per_s: float
    """That a rank sends."""
    latency_s: float
    """Of one exchange, its launch included."""
    node_bytes_per_s: float | None = None
    """That the ranks of a node send together; None: nothing is shared."""

    def seconds(self, sent: float, calls: float, ranks: int) -> float:
        """That `calls` exchanges take in which each of so many ranks of a node sends so many bytes in all."""
        rate = self.bytes_per_s
        if self.node_bytes_per_s is not None:
            rate = min(rate, self.node_bytes_per_s / max(1, ranks))
        return sent / rate + calls * self.latency_s


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Ranks, each on its device, in nodes."""

    name: str
    device: Device
    per_node: int
    """Ranks of a node."""
    nodes: int
    inside: Link
    across: Link
    busy: Device | None = None
    """A rank's device while the others of its node compute, where they share something (memory, power)."""
    sources: tuple[str, ...] = ()
    kind: str = ""
    """By which `named` finds it, as in NUMBERxKIND, a link that was named included; none of one that was measured."""

    @property
    def is_measured(self) -> bool:
        return MEASURED in self.sources

    @property
    def num_ranks(self) -> int:
        return self.per_node * self.nodes

    def device_for(self, ranks: int) -> Device:
        """What one of so many ranks has."""
        return self.busy if self.busy is not None and min(ranks, self.per_node) > 1 else self.device

    def link(self, span: int) -> Link:
        """Between ranks that are at most `span` apart."""
        return self.inside if span <= self.per_node else self.across

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Machine:
        values = dict(values)
        for name in ("device", "busy"):
            if values.get(name) is not None:
                curves = {key: tuple(map(tuple, one)) for key, one in values[name].get("curves", {}).items()}
                values[name] = Device(**values[name] | {"curves": curves})
        for name in ("inside", "across"):
            values[name] = Link(**values[name])
        settings: dict[str, Any] = {**values, "sources": tuple(values.get("sources", ()))}
        return cls(**settings)


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def machine_names() -> list[str]:
    return sorted(_table()["machines"])


def named(text: str, *, one_node: bool = False) -> Machine:
    """The machine of `8xh200`, `4xl40-pcie`, or `2x8xh100-ib400`: nodes x ranks of each x device - link. A link of a
    network (ib, eth) joins nodes, any other the ranks of a node.

    Where no number of nodes is given, more ranks than a node of its kind has are whole nodes, and its name says how
    many; `one_node`: they are one node all the same, as of a machine that is at hand. Raises ConfigError with the
    nearest name for one that is not known, for a link that its devices do not have, for one between nodes where there
    is one node, and for ranks that are not whole nodes."""
    found = SPEC.fullmatch(text.strip().lower())
    example = "such as 8xh200, 4xl40-pcie or 2x8xh100-ib400"
    if found is None:
        raise ConfigError(f"hardware={text!r}: must be NUMBERxDEVICE or NODESxNUMBERxDEVICE, {example}.")
    nodes, number, name = int(found["nodes"] or 1), int(found["number"]), found["name"]
    if not 1 <= nodes * number <= MOST_RANKS or not number or not nodes:
        raise ConfigError(f"hardware={text!r}: must be from 1 to {MOST_RANKS} ranks.")
    table = _table()
    base, suffix = _parted(text, name, table)
    entry, title = table["machines"][base], text
    if found["nodes"] is None and not one_node:
        nodes, number = _whole_nodes(text, number, name, entry["per_node"])
        title = f"{nodes}x{number}x{name}" if nodes > 1 else text
    link = _link_named(text, suffix, base, table) if suffix else ""
    if link.startswith(NETWORKS) and nodes == 1:
        raise ConfigError(
            f"hardware={text!r}: {link} joins nodes, and this is one; leave it out, or name the nodes: "
            f"2x{number}x{name}."
        )
    joins = link.startswith(NETWORKS)
    return Machine(
        name=title,
        device=_device(entry["device"], table),
        per_node=number,
        nodes=nodes,
        inside=_link(link if link and not joins else entry["inside"], table),
        across=_link(link if joins else entry["across"], table),
        sources=tuple(table["devices"][entry["device"]]["sources"]),
        kind=name,
    )


def _whole_nodes(text: str, number: int, name: str, per_node: int) -> tuple[int, int]:
    """(nodes, ranks of each) for so many ranks. Raises ConfigError where a node would have fewer than the others."""
    if number <= per_node:
        return 1, number
    if number % per_node:
        raise ConfigError(
            f"hardware={text!r}: {number} ranks are not whole nodes of {per_node}, which {name} has; must be from 1 to "
            f"{per_node}, or a multiple of {per_node}. Name the nodes for any other: NODESxNUMBERx{name}, such as "
            f"1x{number}x{name} for one node with all of them."
        )
    return number // per_node, per_node


MOST_RANKS = 1024
NETWORKS = ("ib", "eth")
FAMILIES = ("nvlink", "pcie", *NETWORKS)
"""Of links: without a generation it is the one that the machine has."""


def _parted(text: str, name: str, table: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """(machine, what follows it) of a name: the longest machine that it begins with. Raises ConfigError where there is
    none."""
    ends = [name, *(name[:end] for end in range(len(name) - 1, 0, -1) if name[end] == "-")]
    base = next((one for one in ends if one in table["machines"]), None)
    if base is None:
        known = machine_names()
        raise ConfigError(
            f"hardware={text!r}: {name!r} is not known{nearest(name, known) or '.'} There are {', '.join(known)}; "
            "parafuse plan --probe measures the machine at hand."
        )
    return base, name[len(base) + 1 :]


def links_of(base: str) -> list[str]:
    """Links that a machine of the table may be named with, its own first: NVLink as its devices have it in some machine
    of the table, PCIe no newer than theirs, and networks between nodes."""
    table = _table()
    entry = table["machines"][base]
    device = table["devices"][entry["device"]]
    if device["kind"] != "cuda":
        return [entry["inside"], *(name for name in table["links"] if name.startswith(NETWORKS))]
    alike = [one["inside"] for one in table["machines"].values() if one["device"] == entry["device"]]
    same = [name for name in alike if "bridge" not in name]  # which joins pairs: a machine of its own
    slots = [name for name in table["links"] if name.startswith("pcie") and name[:5] <= device["pcie"]]
    networks = [name for name in table["links"] if name.startswith(NETWORKS)]
    found = [entry["inside"], device["pcie"], *same, *slots, entry["across"], *networks]
    return list(dict.fromkeys(found))


def _link_named(text: str, suffix: str, base: str, table: dict[str, dict[str, Any]]) -> str:
    """The link of a name's end. Raises ConfigError for one that is not the machine's."""
    links = links_of(base)
    if suffix in FAMILIES and (first := next((one for one in links if one.startswith(suffix)), None)):
        return first
    if suffix not in links:
        kinds = [name.removeprefix(f"{base}-") for name in table["machines"] if name.startswith(f"{base}-")]
        what = "has no such link" if suffix.startswith(FAMILIES) else f"has no kind or link {suffix!r}"
        beside = f"; of its kinds there are {', '.join(kinds)}" if kinds else ""
        raise ConfigError(
            f"hardware={text!r}: {base} {what}{nearest(suffix, [*links, *kinds]) or '.'} Its links are "
            f"{', '.join(links)}{beside}."
        )
    return suffix


def _device(name: str, table: dict[str, dict[str, Any]]) -> Device:
    values = {key: value for key, value in table["devices"][name].items() if key not in ("sources", "title")}
    if slot := values.pop("pcie", None):
        values["host_bytes_per_s"] = table["links"][slot]["host_bytes_per_s"]
    return Device(name=name, **values)


def _link(name: str, table: dict[str, dict[str, Any]]) -> Link:
    left_out = ("sources", "title", "host_bytes_per_s")
    return Link(name=name, **{key: value for key, value in table["links"][name].items() if key not in left_out})


def of_kind(name: str) -> str | None:
    """The machine of the table whose GPUs NVML calls so ("NVIDIA H200"): of those whose words are all in the name, the
    one with the most. None where there is none; `estimated` finds what is near."""
    words = _words(name)
    if words & SLOWER:
        return None
    fits = [
        (len(told.split()), len(told), kind)
        for kind, entry in _table()["machines"].items()
        for told in entry.get("drivers_say", ())
        if words.issuperset(told.split())
    ]
    return max(fits)[2] if fits else None


SLOWER = frozenset({"laptop", "mobile", "max"})
"""Words of GPUs that are much slower than those whose name they share; Max-Q is two words."""


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def estimated(name: str, memory_bytes: int, capability: str = "") -> str:
    """The machine of the table that is nearest to an NVIDIA GPU which it has not: a guess, by the compute capability
    ("8.9"), or by the memory where that is not known. What takes it must say that it is a guess."""
    found = re.match(r"(\d+)\.(\d+)", capability)
    if found is None:
        devices = {key: one for key, one in _table()["devices"].items() if one["kind"] == "cuda"}
        return min(devices, key=lambda key: abs(math.log(devices[key]["memory_bytes"] / max(1, memory_bytes))))
    number = int(found[1]), int(found[2])
    usual, geforce = GUESSES[max((one for one in GUESSES if one <= number), default=OLDER)]
    return geforce if "geforce" in _words(name) else usual


def kind_of(device: Device) -> str:
    """The machine of the table that is nearest to a device; a measured one is known by its name."""
    if device.kind != "cuda":
        return CPU
    return of_kind(device.name) or estimated(device.name, device.memory_bytes, device.capability)


CPU = "cpu"


def across_nodes(measured: Machine, nodes: int) -> Machine:
    """So many nodes of a machine that was measured as one. What joins them was not measured: it is taken from the named
    machine of the same kind, or the nearest."""
    if nodes == 1:
        return dataclasses.replace(measured, nodes=1)
    other = named(f"{nodes}x1x{kind_of(measured.device)}")
    return dataclasses.replace(
        measured,
        name=f"{nodes}x{measured.name}" if measured.nodes == 1 else measured.name,
        nodes=nodes,
        across=other.across,
        sources=(*measured.sources, f"estimate: {other.across.name} between nodes, which was not measured"),
    )


def on_curve(curve: Curve, size: float) -> float:
    """Seconds at a size: between two that were measured by their powers, beyond the largest in proportion."""
    first, last = curve[0], curve[-1]
    if size <= first[0]:
        return first[1]
    if size >= last[0]:
        return last[1] * size / last[0]
    place = bisect.bisect_right(curve, (size, math.inf))
    (a, s), (b, t) = curve[place - 1], curve[place]
    return s * (t / s) ** (math.log(size / a) / math.log(b / a))
