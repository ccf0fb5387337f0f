"""A plot of predicted times from 1 to 64 ranks: the best plan of each number, and of each kind of layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from parafuse.engine.planning.cost import Cost
from parafuse.engine.planning.machine import Machine, named
from parafuse.engine.planning.search import AXES, Found, search
from parafuse.errors import ConfigError

RANKS = (1, 2, 4, 8, 16, 32, 64)


def scaled(found: Found) -> dict[int, tuple[Cost, ...]]:
    """Number of ranks -> the legal plans of so many, the best first."""
    out: dict[int, tuple[Cost, ...]] = {}
    for ranks in RANKS:
        demand = dataclasses.replace(
            found.demand, ranks=ranks, fixed={k: v for k, v in found.demand.fixed.items() if k not in AXES}
        )
        try:
            out[ranks] = search(found.facts, _with(found.machine, ranks), demand).costs
        except ConfigError:
            continue
    return out


def _with(machine: Machine, ranks: int) -> Machine:
    """The same kind of machine with so many ranks: of one that is named, nodes have as many as they have there."""
    kind = machine.name.rpartition("x")[2]
    try:
        return named(f"{ranks}x{kind}")
    except ConfigError:  # one that was measured: its node has what it has
        per_node = min(ranks, machine.per_node)
        return dataclasses.replace(machine, per_node=per_node, nodes=-(-ranks // per_node))


def draw(found: Found, path: str) -> Path:
    """Writes the plot. Raises ConfigError where it cannot be written."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "parafuse"  # the same prediction, the same file
    points = scaled(found)
    one = points[min(points)][0].seconds
    figure = Figure(figsize=(7, 4.5), layout="constrained")
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
    axes.set(
        xlabel="ranks", ylabel="seconds of a request, predicted", title=f"{found.facts.model} on {found.machine.name}"
    )
    axes.legend()
    target = Path(path)
    try:
        figure.savefig(target, dpi=120, metadata={"Date": None} if target.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"--plot {path!r}: cannot be written ({error.strerror}).") from error
    return target
