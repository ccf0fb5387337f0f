"""Which layers are quantized and which not, and why: every one by name, those of numbered blocks put together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from parafuse.engine.quantize.choose import choose
from parafuse.engine.quantize.pack import nbytes
from parafuse.engine.quantize.put_on import Quantized

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def report(done: Iterable[Quantized]) -> dict[str, Any]:
    """Component -> method, layers that have it, layers that do not by reason, and bytes of all weights, as they are
    now. For receipts."""
    found: dict[str, Any] = {}
    for one in done:
        choice = choose(one.choice.component, one.model, one.method)
        left: dict[str, list[str]] = {}
        for name, why in [*choice.left.items(), *((name, "came later") for name in choice.layers)]:
            left.setdefault(why, []).append(name)
        found[one.choice.component] = {
            "method": one.method.brief,
            "quantized": ranges(choice.there),
            "num_quantized": len(choice.there),
            "left": {why: ranges(names) for why, names in left.items()},
            "num_left": sum(map(len, left.values())),
            "weight_bytes": sum(nbytes(p) for p in one.model.parameters()),
        }
    return found


def lines(done: Iterable[Quantized]) -> list[str]:
    """One line for each component, for receipts and the screen."""
    found: list[str] = []
    for one in done:
        num = len(one.choice.layers) + len(one.choice.there)
        found.append(f"{one.method.brief} on {one.choice.component}: {num} of {num + len(one.choice.left)} layers")
    return found


def ranges(names: Iterable[str]) -> list[str]:
    """`blocks.0-3,5.to_q` for `blocks.0.to_q` and so on: the first number of each name is put together."""
    groups: dict[tuple[str, str], list[int]] = {}
    plain: list[str] = []
    for name in names:
        number = _NUMBER.search(name)
        if number is None:
            plain.append(name)
        else:
            groups.setdefault((name[: number.start()], name[number.end() :]), []).append(int(number.group()))
    return plain + [f"{before}{_runs(numbers)}{after}" for (before, after), numbers in groups.items()]


def _runs(numbers: list[int]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
