"""A plot of predicted times from 1 to 64 ranks: the best plan of each number, and of each kind of layout."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from parafuse.engine.planning.cost import Cost
from parafuse.engine.planning.explain import request_of
from parafuse.engine.planning.machine import MOST_RANKS, Machine, named
from parafuse.engine.planning.search import AXES, Found, search
from parafuse.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKS = (1, 2, 4, 8, 16, 32, 64)


def check_packages() -> None:
    """Raises ConfigError where what draws is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: needs matplotlib; pip install 'parafuse[bench]'.")


def scaled(found: Found) -> dict[int, tuple[Cost, ...]]:
    """Number of ranks -> the legal plans of so many, the best first."""
    out: dict[int, tuple[Cost, ...]] = {}
    for ranks in RANKS:
        demand = dataclasses.replace(
            found.demand, ranks=ranks, fixed={k: v for k, v in found.demand.fixed.items() if k not in AXES}
        )
        there = with_ranks(found.machine, ranks)
        try:
            out[ranks] = search(found.facts, there, demand, found.corrections, refusal=found.refusal).costs
        except ConfigError:
            continue
    return out


def with_ranks(machine: Machine, ranks: int) -> Machine:
    """The same kind of machine with so many ranks: in one node as far as there is room, then in more nodes."""
    per_node = min(ranks, _room(machine))
    return dataclasses.replace(machine, per_node=per_node, nodes=-(-ranks // per_node))


def _room(machine: Machine) -> int:
    """Ranks of a node: of one node of a kind that is known as many as such nodes have, else as many as it has."""
    if machine.nodes > 1 or not machine.kind:
        return machine.per_node
    try:
        return max(machine.per_node, named(f"{MOST_RANKS}x{machine.kind}").per_node)
    except ConfigError:
        return machine.per_node


def draw(found: Found, path: str) -> Path:
    """Writes the plot. Raises ConfigError where it cannot be written, or without what draws."""
    check_packages()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    points = scaled(found)
    if not points:
        raise ConfigError(f"--plot {path!r}: no plan is legal at any of {', '.join(map(str, RANKS))} ranks.")
    target = Path(path)
    with mpl.rc_context({"svg.hashsalt": "parafuse"}):  # the same prediction, the same file
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        _plot(figure, found, points)
        try:
            figure.savefig(target, dpi=120, metadata={"Date": None} if target.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"--plot {path!r}: cannot be written ({error.strerror}).") from error
    return target


def title_of(found: Found) -> str:
    """What was predicted, on what, and what each plan is the best for."""
    kind = found.machine.kind or found.machine.name
    return f"{found.facts.model}, {request_of(found)}\non {kind}, the best for {found.demand.objective}"


def _plot(figure: Figure, found: Found, points: dict[int, tuple[Cost, ...]]) -> None:
    one = points[min(points)][0].seconds
    axes = figure.subplots()
    first = min(points)
    axes.loglog(list(points), [one * first / ranks for ranks in points], ":", color="grey", label="in proportion")
    kinds = {
        "best": lambda cost: True,
        "Ulysses alone": lambda cost: cost.candidate.ulysses == cost.candidate.num_ranks,
        "ring alone": lambda cost: cost.candidate.ring == cost.candidate.num_ranks,
        "branches, then Ulysses": lambda cost: cost.candidate.cfg > 1 and cost.candidate.ring == 1,
    }
    for name, fits in kinds.items():
        line = {ranks: next((cost.seconds for cost in costs if fits(cost)), None) for ranks, costs in points.items()}
        shown = {ranks: seconds for ranks, seconds in line.items() if seconds is not None}
        if len(shown) > 1:
            axes.loglog(list(shown), list(shown.values()), "o-" if name == "best" else "x--", label=name)
    axes.set_xticks(list(points), [str(ranks) for ranks in points])
    axes.set(xlabel="ranks", ylabel="seconds of a request, predicted", title=title_of(found))
    axes.legend()
