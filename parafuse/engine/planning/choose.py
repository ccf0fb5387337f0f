"""The layout that `Config()` means on several ranks: chosen by cost, the same on every rank, in one line why."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parafuse.config import VAE_TILED, Axis, Config, Parallel
from parafuse.engine.planning import known, machine
from parafuse.engine.planning.cost import Corrections
from parafuse.engine.planning.explain import one_line
from parafuse.engine.planning.facts import Facts
from parafuse.engine.planning.learned import corrections
from parafuse.engine.planning.machine import Machine
from parafuse.engine.planning.search import REQUESTS, Demand, Fidelity, Found, Objective, search
from parafuse.engine.source import ModelSource, locate
from parafuse.errors import ConfigError, ParafuseError
from parafuse.hardware import memory_bytes, visible_gpus

PLAIN = (str, int, float, bool)


@dataclass(frozen=True)
class Chosen:
    """A layout, and why."""

    config: Config
    """With degrees in the place of "auto"."""
    why: str
    found: Found | None = None

    @property
    def layout(self) -> str:
        """In words."""
        return str(self.found.best.candidate) if self.found is not None else "ulysses on all of them"


def machine_at_hand(ranks: int, device: str, dtype: str) -> Machine:
    """The machine of these ranks: as it was measured, else by the names of its GPUs, else an estimate of a CPU."""
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", ranks)), ranks)
    nodes = max(1, ranks // local)
    measured = known.machine(local, device, dtype)
    if measured is not None:
        return dataclasses.replace(measured, nodes=nodes)
    gpus = visible_gpus() if device == "cuda" else []
    name = machine.of_kind(gpus[0].name) if gpus else None
    if name is None:
        found = machine.named(f"{local}xcpu")
        room = memory_bytes() or found.device.memory_bytes
        here = dataclasses.replace(found.device, memory_bytes=room // local)
        return dataclasses.replace(found, device=here, nodes=nodes)
    found = machine.named(f"{nodes}x{local}x{name}" if nodes > 1 else f"{local}x{name}")
    room = min(gpu.memory_bytes for gpu in gpus)
    return dataclasses.replace(found, device=dataclasses.replace(found.device, memory_bytes=room))


def facts_of(
    source: ModelSource, config: Config, device: str, dtype: str, call: Mapping[str, Any], pipeline: Any = None
) -> Facts:
    """Facts of a model and a call, kept from one process to the next. Raises as `gather` does."""
    from parafuse.engine.planner import resolve

    plain = {name: value for name, value in call.items() if isinstance(value, (*PLAIN, list))}
    tiled = config.vae == VAE_TILED or bool(getattr(getattr(pipeline, "vae", None), "use_tiling", False))
    alone = Config(device=device, dtype=dtype, parallel=Parallel(ulysses=1), allow_pickle=config.allow_pickle)

    def make() -> Facts:
        from parafuse.engine.planning.gather import gather

        plan = resolve(alone, source, 1, elsewhere=True)
        return gather(source, plan, plain, pipeline=pipeline, tiled=tiled)

    found = known.facts(known.key_of(source.model_id, device, dtype, plain, tiled), make)
    return dataclasses.replace(found, vae=config.vae)


def fixed_of(config: Config, *, options: bool) -> dict[str, Any]:
    """What a config has set, as fields of a candidate; `options`: those beside degrees as well."""
    parallel = config.parallel
    found: dict[str, Any] = {}
    if not parallel.is_chosen:
        found = {str(axis): getattr(parallel, axis) for axis in (Axis.DATA, Axis.CFG, Axis.RING, Axis.ULYSSES)}
    elif parallel != Parallel():
        found = {str(axis): getattr(parallel, axis) for axis in (Axis.DATA, Axis.CFG, Axis.RING)}
    found = {name: degree for name, degree in found.items() if degree != "auto"}
    given = {
        "compile": config.compile,
        "quantize": str(config.quantize or "").partition(":")[0],
        "cache": str(config.cache or ""),
        "offload": OFFLOADS.get(str(config.offload or "").partition(":")[0], ""),
    }
    return found | {name: value for name, value in given.items() if value or options}


OFFLOADS = {"model": "model", "group": "group", "sequential": "group"}


def choose(
    config: Config,
    source: ModelSource,
    ranks: int,
    computes_in: tuple[str, str],
    call: Mapping[str, Any] | None = None,
    *,
    pipeline: Any = None,
) -> Chosen:
    """The layout for so many ranks; the config itself where it has set one. Local, and the same on every rank that has
    the same model, machine and files. `computes_in`: device and dtype. `pipeline`: one that is loaded.

    Where facts of the model cannot be had, Ulysses takes all ranks, as without a planner, and `why` says so."""
    if ranks == 1 or not config.parallel.is_chosen:
        return Chosen(config, "")
    device, dtype = computes_in
    try:
        facts = facts_of(source, config, device, dtype, call or {}, pipeline)
        demand = Demand(ranks=ranks, fidelity=Fidelity.FAST, fixed=fixed_of(config, options=True), layouts_only=True)
        found = search(facts, machine_at_hand(ranks, device, dtype), demand, corrections_of(device))
    except ParafuseError as error:
        if isinstance(error, ConfigError) and "is legal" in str(error):
            raise
        first = str(error).partition("\n")[0]
        return Chosen(config, f"ulysses takes all ranks that no other axis uses; its cost is not known: {first}")
    parallel = Parallel(**found.best.candidate.degrees)
    return Chosen(dataclasses.replace(config, parallel=parallel), one_line(found), found)


def corrections_of(device: str) -> Corrections:
    """What runs on this machine have told."""
    return corrections(known.this_machine(device))


def plans(
    model: str,
    hardware: str | Machine,
    call: Mapping[str, Any] | None = None,
    config: Config | None = None,
    *,
    objective: str = Objective.LATENCY,
    fidelity: str = Fidelity.EXACT,
    requests: int = REQUESTS,
) -> Found:
    """The legal plans for a model and a request on a machine, the best first, with what each costs. Nothing is loaded,
    downloaded or exchanged, and the machine need not be here.

    `hardware`: as `8xh200` (docs/planner.md), or a machine. `call`: keywords of the pipeline's call; the model's own
    where
    they are not given. `config`: what it sets stays, all else is chosen. Raises ConfigError for contradictory demands
    and
    where no plan is legal, ModelError for a model that is not here, UnsupportedError for one that cannot be
    followed."""
    config = config or Config()
    machine_there = machine.named(hardware) if isinstance(hardware, str) else hardware
    source = locate(model, allow_pickle=config.allow_pickle)
    on_it = dataclasses.replace(config, device=machine_there.device.kind)
    demand = Demand(
        ranks=machine_there.num_ranks,
        objective=Objective(objective),
        fidelity=Fidelity(fidelity),
        requests=requests,
        fixed=fixed_of(config, options=False),
    )
    return plans_for(source, on_it, machine_there, demand, call or {})


def plans_for(
    source: ModelSource,
    config: Config,
    there: Machine,
    demand: Demand,
    call: Mapping[str, Any],
    learned: Corrections | None = None,
) -> Found:
    """`plans`, for a model that was found and a machine at hand or named. Raises as `plans` does."""
    from parafuse.engine.planner import computes_in

    demand.check()
    device, dtype = computes_in(config, demand.ranks, elsewhere=True)
    return search(facts_of(source, config, device, dtype, call), there, demand, learned)
