"""What a plan costs: seconds and bytes of each part of a request on one rank. Pure functions of facts and a machine.

Each operator takes as long as its slower limit: what it computes, or what it moves (a roofline, Williams et al. 2009,
with efficiencies that were measured); an exchange its latency and its bytes on the link that its axis crosses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from parafuse.config import Axis
from parafuse.engine.planning.facts import (
    ATTENTION,
    DECODE,
    DENOISE,
    ENCODE,
    FUSED,
    GEMM,
    PRODUCTS,
    VIEW,
    Facts,
    Operator,
    Part,
)
from parafuse.engine.planning.machine import Device, Machine, on_curve

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int64": 8}
TILES = ((128, 256, 1.0), (128, 128, 0.92), (64, 128, 0.8), (64, 64, 0.6))
"""Rows and columns of a product's result that one unit of a GPU computes at a time, and how well: smaller tiles reuse
less.
Libraries take what suits a size."""
LEAST_FILLED = 0.3
"""Of a device, by a product of few tiles: libraries cut the inner dim then."""
CONVOLUTION_RATE = 0.6
"""Of the rate of matrix products: convolutions of autoencoders, 3 x 3 of 128 to 512 channels."""
SHARED_DECODE = 0.85
"""Of what ranks could save in a decode that they share: measured 1.71 of 2.00 (docs/notes/vae-sharded.md)."""
COMPILED_HOST = 0.25
"""Of an operator's host time that a kernel of a compiled block takes."""
COMPILE_S = 2.5
"""Seconds for each kind of block, the first time: 8 to 10 for FLUX.1 and its two kinds (as published;
docs/compile.md)."""
HIT_RATES = {"first-block": 0.36, "taylorseer": 0.6, "interval": 0.5}
"""Of the steps, that a cache of this kind leaves out where nothing is known: of first-block 17.01 s of 26.36 (FLUX.1
on an
L20, ParaAttention), of the others by their usual settings."""
UNKNOWN_HITS = 0.3
SHARDED = "group:to=ranks"
"""The offload whose weights are cut between the ranks of a sequence."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What could run: the options that change time or memory."""

    data: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    compile: bool = False
    quantize: str = ""
    cache: str = ""
    offload: str = ""

    @property
    def sequence(self) -> int:
        return self.ring * self.ulysses

    @property
    def num_ranks(self) -> int:
        return self.data * self.cfg * self.sequence

    @property
    def degrees(self) -> dict[str, int]:
        shown = {Axis.DATA: self.data, Axis.CFG: self.cfg, Axis.RING: self.ring, Axis.ULYSSES: self.ulysses}
        return {str(axis): degree for axis, degree in shown.items()}

    def __str__(self) -> str:
        axes = [f"{axis} {degree}" for axis, degree in self.degrees.items() if degree > 1]
        more = ["compile"] if self.compile else []
        more += [f"{name} {value}" for name in ("quantize", "cache", "offload") if (value := getattr(self, name))]
        return " x ".join(axes) + "".join(f", {one}" for one in more) if axes else ", ".join(["1 rank", *more])


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """What real runs have told: measured over predicted, by what it is of (a part of `Step`, encode, decode, or
    `beside`: computing while other ranks do). 1 where nothing is known."""

    factors: Mapping[str, float] = field(default_factory=dict[str, float])
    hit_rates: Mapping[str, float] = field(default_factory=dict[str, float])

    def of(self, name: str) -> float:
        return self.factors.get(name, 1.0)


class Step(NamedTuple):
    """Seconds of one call of a denoiser, or of another part, on one rank."""

    gemm: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0
    pointwise: float = 0.0
    host: float = 0.0
    """Of the host, that the device waits for."""
    ulysses: float = 0.0
    ring: float = 0.0
    """That is not hidden behind attention."""
    gather: float = 0.0
    batch: float = 0.0
    """Between branches of guidance and replicas."""
    offload: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: Step, times: float = 1.0) -> Step:
        return Step(*(a + b * times for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one request."""

    candidate: Candidate
    encode_s: float
    denoise: Step
    """Of all steps."""
    step_s: float
    """Of a step that no cache leaves out."""
    decode_s: float
    compile_s: float
    """Once, before the first request."""
    memory_bytes: float
    """The most that a rank has at a time."""
    memory_at: str
    replicated: float
    """Of a step's computing, the share that every rank of a sequence does."""
    pictures: int
    """That are made in this time."""
    steps: int = 1
    hits: float = 0.0
    """Share of the steps that a cache leaves out."""

    @property
    def mean_step_s(self) -> float:
        """Of all steps, those that a cache leaves out among them."""
        return self.denoise.total / self.steps

    @property
    def shares(self) -> dict[str, float]:
        """Part of a request -> its share of the time."""
        parts = self.denoise._asdict() | {"encode": self.encode_s, "decode": self.decode_s}
        return {name: seconds / (self.seconds or 1.0) for name, seconds in parts.items() if seconds}

    @property
    def seconds(self) -> float:
        return self.encode_s + self.denoise.total + self.decode_s

    @property
    def throughput(self) -> float:
        """Pictures a second."""
        return self.pictures / self.seconds

    @property
    def limit(self) -> str:
        """What most of it is."""
        parts = self.denoise._asdict() | {"encode": self.encode_s, "decode": self.decode_s}
        return max(parts, key=lambda name: parts[name])

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": str(self.candidate),
            "degrees": self.candidate.degrees,
            "options": {name: getattr(self.candidate, name) for name in ("compile", "quantize", "cache", "offload")},
            "seconds": self.seconds,
            "step_s": self.step_s,
            "mean_step_s": self.mean_step_s,
            "hits": self.hits,
            "shares": self.shares,
            "encode_s": self.encode_s,
            "denoise_s": self.denoise._asdict(),
            "decode_s": self.decode_s,
            "compile_s": self.compile_s,
            "memory_bytes": self.memory_bytes,
            "memory_at": self.memory_at,
            "replicated": self.replicated,
            "pictures": self.pictures,
            "pictures_per_s": self.throughput,
            "limit": self.limit,
        }


def in_8_bits(method: str) -> bool:
    """Whether a quantization computes in 8 bits; others keep weights in 8 bits, and compute in the model's dtype."""
    return bool(method) and not method.endswith("-weight")


def rate_of(device: Device, dtype: str, *, attention: bool = False) -> float:
    """Floating-point operations a second: of the slowest dtype that is known where this one is not."""
    tables = (device.attention, device.flops) if attention else (device.flops, device.attention)
    known = tables[0].get(dtype)
    if known:
        return known
    slowest = (min(rates) for table in tables if (rates := [rate for rate in table.values() if rate]))
    return next(slowest, device.bytes_per_s)


def seconds_of(one: Operator, degree: int, samples: float, device: Device, quantize: str = "") -> float:
    """Of one call of an operator on the device, for this share of the samples. The host's time is apart."""
    flops, moved = one.flops.on(degree) * samples, one.bytes.on(degree) * samples
    if one.family == VIEW:
        return 0.0
    dtype, weights = one.dtype, one.weights
    if quantize and one.family == GEMM:
        weights /= ITEM_BYTES.get(one.dtype, 2)
        if in_8_bits(quantize) and device.flops.get(quantize):
            dtype = quantize
            moved *= 1.5  # what is quantized is read and written once more
    curve = device.curves.get(f"{one.family}.{dtype}") or (
        None if one.family in PRODUCTS else device.curves.get(f"pointwise.{dtype}")
    )
    if curve:
        taken = on_curve(curve, flops if one.family in PRODUCTS else moved)
        return max(taken, weights / device.bytes_per_s) if one.family == GEMM else taken
    if one.family not in PRODUCTS:
        return device.kernel_s + moved / device.bytes_per_s
    if one.family == ATTENTION:
        rate = rate_of(device, dtype, attention=True)
    else:
        rate = rate_of(device, dtype) * (_filled(one, flops, device) if one.family == GEMM else CONVOLUTION_RATE)
    return device.kernel_s + max(flops / rate, (moved + weights) / device.bytes_per_s)


def _filled(one: Operator, flops: float, device: Device) -> float:
    """Of a device's units, those that a product keeps busy: its tiles come in waves of which the last is not full."""
    inner = one.weights / max(1, one.columns) / ITEM_BYTES.get(one.dtype, 2)
    if device.kind != "cuda" or not inner or not one.columns:
        return 1.0
    rows = flops / (2 * one.columns * inner)
    best = LEAST_FILLED
    for height, width, quality in TILES:
        tiles = math.ceil(rows / height) * math.ceil(one.columns / width)
        waves = tiles / device.units
        used = rows * one.columns / (tiles * height * width)
        best = max(best, quality * used * waves / math.ceil(waves))
    return best


class Costs:
    """Costs of candidates for one model on one machine."""

    def __init__(self, facts: Facts, machine: Machine, corrections: Corrections | None = None):
        self.facts, self.machine, self.corrections = facts, machine, corrections or Corrections()
        self._known: dict[Any, Step] = {}

    def beside(self, facts: Facts, machine: Machine) -> Costs:
        """Costs of other facts on another machine; what is known is shared where ranks compute the same."""
        other = Costs(facts, machine, self.corrections)
        if other._computing == self._computing:
            other._known = self._known
        return other

    @property
    def _computing(self) -> tuple[Any, ...]:
        """All that the time to compute comes of."""
        devices = [self.machine.device, self.machine.busy]
        return (
            [(part.name, part.phase, part.alone, part.shared) for part in self.facts.parts],
            [None if one is None else dataclasses.replace(one, memory_bytes=0) for one in devices],
        )

    def cost(self, one: Candidate, *, pictures: int | None = None) -> Cost:
        """Of a request for so many pictures; as many as the facts have where none are given."""
        facts, device = self.facts, self.machine.device_for(one.num_ranks)
        wanted = facts.pictures if pictures is None else pictures
        encode = sum((part.calls * self._alone(part, device).total for part in facts.of(ENCODE)), 0.0)
        encode += sum((self._brought(part, one, device) for part in facts.of(ENCODE)), 0.0)
        here = math.ceil(wanted / one.data) / facts.pictures  # of the facts' samples, those of this replica
        denoise, step = Step(), 0.0
        for part in facts.of(DENOISE):
            calls, samples = self._share(part, one, here)
            each = self._call(part, one, samples, device)
            denoise = denoise.plus(each, calls)
        denoise = denoise.plus(self._between(one, wanted))
        step = denoise.total / facts.steps
        hits = self._hits(one.cache)
        if hits:
            denoise = Step(*(seconds * (1 - hits) for seconds in denoise))
        decode = sum((part.calls * self._decode(part, one, wanted, device) for part in facts.of(DECODE)), 0.0)
        decode += sum((self._brought(part, one, device) for part in facts.of(DECODE)), 0.0)
        kinds = {name for part in facts.of(DENOISE) for name in part.blocks}
        bytes_, at = self._memory(one, here)
        return Cost(
            candidate=one,
            encode_s=encode * self.corrections.of("encode"),
            denoise=denoise,
            step_s=step,
            decode_s=decode * self.corrections.of("decode"),
            compile_s=COMPILE_S * len(kinds) if one.compile else 0.0,
            memory_bytes=bytes_,
            memory_at=at,
            replicated=self._replicated(one),
            pictures=wanted,
            steps=facts.steps,
            hits=hits,
        )

    def _share(self, part: Part, one: Candidate, here: float) -> tuple[float, float]:
        """(calls in a request, share of a call's samples) on one rank."""
        if one.cfg == 1:
            return part.calls, here
        if self.facts.stacked:
            branches = self.facts.branches
            return part.calls, here * math.ceil(branches / one.cfg) / branches
        return part.calls * math.ceil(self.facts.branches / one.cfg) / self.facts.branches, here

    def _call(self, part: Part, one: Candidate, samples: float, device: Device) -> Step:
        each = self._computed(part, one.sequence, samples, device, compiled=one.compile, quantize=one.quantize)
        if part.heads and one.ulysses > 1:
            each = each._replace(attention=each.attention * uneven(min(part.heads), one.ulysses))
        if one.num_ranks > 1:
            each = Step(*(seconds * self.corrections.of("beside") for seconds in each))
        each = self._exchanged(part, one, samples, each)
        if one.offload:
            each = each._replace(offload=self._carried(part, one, each.total, device))
        return each

    def _alone(self, part: Part, device: Device) -> Step:
        return self._computed(part, 1, 1.0, device)

    def _computed(
        self, part: Part, degree: int, samples: float, device: Device, *, compiled: bool = False, quantize: str = ""
    ) -> Step:
        """What a rank computes in one call."""
        key = part.name, part.phase, degree, samples, device is self.machine.busy, compiled, quantize
        if key not in self._known:
            self._known[key] = self._added(part, degree, samples, device, compiled, quantize)
        return self._known[key]

    def _added(self, part: Part, degree: int, samples: float, device: Device, compiled: bool, quantize: str) -> Step:
        sums = dict.fromkeys((*PRODUCTS, "pointwise"), 0.0)
        launches = 0.0
        known: set[str] = set()
        for one in part.operators(degree):
            is_fused = compiled and bool(one.where)
            if one.family not in PRODUCTS and is_fused != (one.family == FUSED):
                continue
            method = quantize if one.where and one.family == GEMM else ""
            seconds = seconds_of(one, degree, samples, device, method) * one.count
            sums[one.family if one.family in PRODUCTS else "pointwise"] += seconds
            launches += one.count * (COMPILED_HOST if is_fused else 1.0)
            known.add(one.family)
        right = self.corrections.of
        found = Step(**{name: seconds * right(name) for name, seconds in sums.items()})
        host = launches * device.host_s * right("host")
        return found._replace(host=host if device.kind == "cpu" else max(0.0, host - found.total))

    def _exchanged(self, part: Part, one: Candidate, samples: float, each: Step) -> Step:
        if one.sequence == 1:
            return each
        sent, right = part.exchanges, self.corrections.of
        world, active = one.num_ranks, min(one.num_ranks, self.machine.per_node)
        ulysses = ring = 0.0
        if one.ulysses > 1:
            moved = sent.ulysses_bytes * samples / one.sequence * (one.ulysses - 1) / one.ulysses
            ulysses = self._all_to_all(moved, sent.ulysses_calls, one.ulysses, active)
        if one.ring > 1 and sent.attention_calls:
            moved = sent.ring_bytes * samples / one.ulysses / sent.attention_calls / one.ring  # a block of keys
            link = self.machine.link(one.sequence)
            there = link.seconds(moved, 1, active)
            hidden = each.attention / sent.attention_calls / one.ring
            merged = 6 * moved / self.machine.device_for(world).bytes_per_s
            ring = sent.attention_calls * (one.ring - 1) * (max(0.0, there - hidden) + link.latency_s / 2 + merged)
        gathered = sent.gather_bytes * samples * (one.sequence - 1) / one.sequence
        gather = self.machine.link(one.sequence).seconds(gathered, sent.gather_calls, active)
        return each._replace(
            ulysses=ulysses * right("ulysses"), ring=ring * right("ring"), gather=gather * right("gather")
        )

    def _all_to_all(self, moved: float, calls: float, degree: int, active: int) -> float:
        """Of what a rank sends to `degree - 1` others, what leaves the node goes over the slower link."""
        if degree <= self.machine.per_node:
            return self.machine.inside.seconds(moved, calls, active)
        outside = moved * (degree - self.machine.per_node) / (degree - 1)
        return max(
            self.machine.across.seconds(outside, calls, active), self.machine.inside.seconds(moved - outside, 0, active)
        )

    def _between(self, one: Candidate, wanted: int) -> Step:
        """Results of branches and replicas, gathered in every step."""
        if one.cfg * one.data == 1:
            return Step()
        degree, active = one.cfg * one.data, min(one.num_ranks, self.machine.per_node)
        link = self.machine.link(one.num_ranks)
        # each rank sends its own part to the others of its axes
        own = self.facts.result_bytes * self.facts.branches * wanted / degree
        axes = (one.cfg > 1) + (one.data > 1)
        seconds = link.seconds(own * (degree - 1), axes, active)
        return Step(batch=seconds * self.facts.steps * self.corrections.of("batch"))

    def _carried(self, part: Part, one: Candidate, computed: float, device: Device) -> float:
        """Weights that come while others compute; what is left to wait for in one call."""
        came = self._kept(part.name, one) / device.host_bytes_per_s
        if one.offload == SHARDED:
            return max(0.0, self._gathered(part, one) - computed)
        if one.offload == "model":
            return came / max(1.0, part.calls)
        return max(0.0, came - computed)

    def _gathered(self, part: Part, one: Candidate) -> float:
        """Weights that come from the ranks of a sequence, one exchange for each of what comes together."""
        sent = self._kept(part.name, one) / one.sequence * (one.sequence - 1)
        link = self.machine.link(one.sequence)
        return link.seconds(sent, GATHERS, min(one.num_ranks, self.machine.per_node))

    def _brought(self, part: Part, one: Candidate, device: Device) -> float:
        """The same in a request, of an encoder or a decoder."""
        return part.calls * self._carried(part, one, self._alone(part, device).total, device) if one.offload else 0.0

    def _decode(self, part: Part, one: Candidate, wanted: int, device: Device) -> float:
        alone = self._alone(part, device).total * wanted / self.facts.pictures
        if one.data > 1:
            return alone * math.ceil(wanted / one.data) / wanted
        if one.num_ranks == 1 or not self.facts.shares(part):
            return alone
        return alone / (1 + (one.num_ranks - 1) * SHARED_DECODE)

    def _hits(self, cache: str) -> float:
        kind = cache.partition(":")[0]
        return self.corrections.hit_rates.get(kind, HIT_RATES.get(kind, UNKNOWN_HITS)) if cache else 0.0

    def _replicated(self, one: Candidate) -> float:
        """Of the floating-point operations of a rank, those that every rank of its sequence does."""
        if one.sequence == 1:
            return 0.0
        whole = total = 0.0
        for part in self.facts.of(DENOISE):
            for each in part.operators(one.sequence):
                whole += part.calls * each.count * each.flops.whole
                total += part.calls * each.count * each.flops.on(one.sequence)
        return whole / total if total else 0.0

    def _memory(self, one: Candidate, here: float) -> tuple[float, str]:
        """(the most bytes of a rank, the phase in which it has them)."""
        facts, by_phase = self.facts, dict[str, float]()
        kept = {part.name: self._kept(part.name, one) for part in facts.parts}
        others = sum(number for name, number in facts.weights.items() if name not in kept)
        for part in facts.parts:
            if part.phase == DENOISE:
                samples = here * (math.ceil(facts.branches / one.cfg) / facts.branches if facts.stacked else 1.0)
                peak = (part.peak.on(one.sequence) if one.sequence > 1 else part.peak_alone) * samples
                peak *= 1.6 if one.cache else 1.0
            else:
                peak = part.peak_alone
                is_shared = part.phase == DECODE and one.num_ranks > 1 and facts.shares(part) and not facts.tiles
                peak = peak / one.num_ranks * 1.25 if is_shared else peak
            there = sum(kept.values()) + others
            if one.offload == "model":
                there = kept[part.name]
            elif one.offload == "group":
                there = kept[part.name] * GROUP_SHARE
            elif one.offload == SHARDED:
                there = there / one.sequence + kept[part.name] * GROUP_SHARE
            by_phase[part.phase] = max(by_phase.get(part.phase, 0.0), there + peak)
        at = max(by_phase, key=lambda phase: by_phase[phase])
        return by_phase[at] + OVERHEAD.get(self.machine.device.kind, 0.0), at

    def _kept(self, name: str, one: Candidate) -> float:
        number = float(self.facts.weights.get(name, 0))
        is_denoiser = any(part.name == name for part in self.facts.of(DENOISE))
        return number / ITEM_BYTES.get(self.facts.dtype, 2) if one.quantize and is_denoiser else number


GROUP_SHARE = 0.1
"""Of a component's weights, those of the blocks that are on the device at a time."""
GATHERS = 50
"""Exchanges by which the weights of a component come from other ranks in a call."""
OVERHEAD = {"cuda": 0.9e9}
"""Context, kernels, workspaces of libraries, and one communicator."""


def uneven(heads: int, degree: int) -> float:
    """How much more than its part the rank with the most heads computes."""
    return math.ceil(heads / degree) * degree / heads
