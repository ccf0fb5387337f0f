"""What quantizing loses: one forward on real inputs for each group of layers, against the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from parafuse.engine.quantize.choose import Choice
from parafuse.engine.quantize.pack import packed, set_weight
from parafuse.engine.quantize.put_on import Asked
from parafuse.engine.quantize.roles import is_measured, pattern_of
from parafuse.engine.recorded import RecordedCall, recording
from parafuse.errors import ConfigError
from parafuse.quantization import CALIBRATED, Fp8, Quantize

Paint = Callable[[], Any]
"""One request of the pipeline, with everything as it is."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers of the same name in all blocks of a component."""

    component: str
    pattern: str
    """Their full name, * for a number."""
    layers: int
    error: float
    """Of what the component gives when these alone are quantized: sqrt(sum (q - x)^2 / sum x^2), of its worst call."""
    largest: float
    """Of all that they are given."""


class Seen:
    """What one component's layers are given."""

    def __init__(self, one: Asked, choice: Choice):
        self.one, self.choice = one, choice
        self.largest: dict[str, float] = dict.fromkeys(choice.layers, 0.0)
        self.calls: list[RecordedCall] = []
        self._rows: dict[str, set[bool]] = {name: set() for name in choice.layers}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the pipeline paints."""
        with ExitStack() as hooks:
            hooks.enter_context(recording(self.one.model, self.calls, keep=2))
            for name, layer in self.choice.layers.items():
                handle = layer.register_forward_pre_hook(self._note(name))
                hooks.callback(handle.remove)
            yield

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            self.largest[name] = max(self.largest[name], float(x.abs().max()))
            self._rows[name].add(x.numel() // x.shape[-1] == self._samples())

        return note

    def _samples(self) -> int:
        """Of the call that is being made."""
        call = self.calls[-1]
        first = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)), None)
        return first.shape[0] if first is not None and first.ndim else 1

    def unmeasured(self) -> list[str]:
        """Layers that were given nothing but zeros, or nothing at all."""
        return [name for name, most in self.largest.items() if not most]

    def samples(self) -> list[str]:
        """Layers that were given one row for each sample in every call, in a class whose layers nobody has measured."""
        if is_measured(self.one.model):
            return []
        return [name for name, rows in self._rows.items() if rows == {True}]


def watch(asked: Sequence[Asked], choices: Sequence[Choice], paint: Paint, times: int = 1) -> list[Seen]:
    """Paints, and notes what layers are given. Keeps the first and the last call of each component."""
    seen = [Seen(one, choice) for one, choice in zip(asked, choices, strict=True) if choice.layers]
    with ExitStack() as stack:
        for one in seen:
            stack.enter_context(one.watching())
        for _ in range(times):
            paint()
    for one in seen:
        if not one.calls:
            raise ConfigError(f"call: the pipeline did not call its {one.one.name}; give another prompt or more steps.")
    return seen


def groups_of(seen: Seen) -> Iterator[Group]:
    """One forward for each group and each recorded call. Two forms of one group at a time are in memory."""
    names: dict[str, list[str]] = {}
    for name in seen.choice.layers:
        names.setdefault(pattern_of(name), []).append(name)
    for pattern, members in names.items():
        with _as_quantized(seen, members):
            error = error_of(seen.calls)
        yield Group(
            component=seen.one.name,
            pattern=pattern,
            layers=len(members),
            error=error,
            largest=max(seen.largest[name] for name in members),
        )


def error_of(calls: Sequence[RecordedCall]) -> float:
    """Of the worst call as the model is now, against what it was: sqrt(sum (q - x)^2 / sum x^2)."""
    return max(_distance(call.again(), call.plain) for call in calls)


def _distance(found: list[Tensor], plain: list[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(found, plain, strict=True) if b.is_floating_point()]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    whole = sum(float(b.square().sum()) for _, b in pairs)
    return (off / whole) ** 0.5 if whole else 0.0


@contextmanager
def _as_quantized(seen: Seen, names: Sequence[str]) -> Iterator[None]:
    originals = [(seen.choice.layers[name], seen.choice.layers[name].weight) for name in names]
    try:
        with torch.no_grad():
            for name, (layer, weight) in zip(names, originals, strict=True):
                set_weight(layer, packed(weight.data, seen.one.method, seen.largest[name]))
        yield
    finally:
        for layer, weight in originals:
            layer.weight = weight


def without(method: Quantize, groups: Sequence[tuple[str, str]]) -> Quantize:
    """The same that leaves these as they are: (component, name of layers)."""
    names = [".".join(group) for group in groups]
    return replace(method, skip="+".join([*method.skipped, *names])) if names else method


def is_calibrated(method: Quantize) -> bool:
    return isinstance(method, Fp8) and method.scale == CALIBRATED
