"""The layout that `Config()` means on several ranks: chosen by cost, the same on every rank, in one line why."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

from parafuse.attention import AUTO
from parafuse.cache import cache_of
from parafuse.config import VAE_TILED, Axis, Config, Parallel
from parafuse.engine.planning import known, machine
from parafuse.engine.planning.cost import SHARDED, Candidate, Corrections
from parafuse.engine.planning.explain import one_line
from parafuse.engine.planning.facts import Facts
from parafuse.engine.planning.learned import corrections
from parafuse.engine.planning.machine import Machine
from parafuse.engine.planning.search import REQUESTS, Demand, Fidelity, Found, Objective, search
from parafuse.engine.source import ModelSource, locate
from parafuse.errors import ConfigError, ModelError, ParafuseError, RankError, UnsupportedError, nearest
from parafuse.hardware import memory_bytes, num_cuda_devices, visible_gpus
from parafuse.log import note
from parafuse.offload import RANKS, ModelOffload, Offload, offload_of

PLAIN = (str, int, float, bool)
BRIDGED = 2
"""Ranks that an NVLink bridge joins."""


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
    """The machine of these ranks: as it was measured, else by the names of its GPUs, else an estimate."""
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", ranks)), ranks)
    nodes = max(1, ranks // local)
    measured = known.machine(local, device, dtype)
    if measured is not None:
        return machine.across_nodes(measured, nodes)
    gpus = visible_gpus() if device == "cuda" else []
    kind, room = machine.CPU, (memory_bytes() or 0) // local
    if gpus:
        room = min(gpu.memory_bytes for gpu in gpus)
        kind = machine.of_kind(gpus[0].name) or machine.estimated(gpus[0].name, room, gpus[0].capability)
        if machine.of_kind(gpus[0].name) is None:
            note(f"{gpus[0].name}: not known, taken for {kind}; `parafuse plan --probe` measures it")
        if gpus[0].nvlinks and local == BRIDGED and f"{kind}-bridge" in machine.machine_names():
            kind = f"{kind}-bridge"
    found = machine.named(f"{nodes}x{local}x{kind}" if nodes > 1 else f"{local}x{kind}", one_node=True)
    return dataclasses.replace(
        found, device=dataclasses.replace(found.device, memory_bytes=room or found.device.memory_bytes)
    )


def facts_of(
    source: ModelSource,
    config: Config,
    computes_in: tuple[str, str],
    call: Mapping[str, Any],
    *,
    pipeline: Any = None,
    given: Mapping[str, Any] | None = None,
) -> Facts:
    """Facts of a model and a call, kept from one process to the next. `pipeline`: one that is loaded; `given`: parts in
    the place of the model's own. Raises as `gather` does."""
    from parafuse.engine.planner import resolve

    device, dtype = computes_in
    parts = {name: part for name, part in (given or {}).items() if hasattr(part, "named_parameters")}
    plain, tiled = _plain(call), _tiled(config, pipeline)
    alone = Config(device=device, dtype=dtype, parallel=Parallel(ulysses=1), allow_pickle=config.allow_pickle)

    def make() -> Facts:
        from parafuse.engine.planning.gather import gather

        plan = resolve(alone, source, 1, elsewhere=True)
        return gather(source, plan, plain, pipeline=pipeline, given=parts, tiled=tiled)

    there = pipeline.components if pipeline is not None else parts
    key = _key(source, computes_in, plain, tiled, there)
    return dataclasses.replace(known.facts(key, make), model=source.name, vae=config.vae)


def kept_facts(
    source: ModelSource, config: Config, computes_in: tuple[str, str], call: Mapping[str, Any]
) -> Facts | None:
    """`facts_of` where an earlier plan or run has kept them; None where they would have to be made."""
    found = known.kept_facts(_key(source, computes_in, _plain(call), _tiled(config), {}))
    return None if found is None else dataclasses.replace(found, model=source.name, vae=config.vae)


def _plain(call: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if isinstance(value, (*PLAIN, list))}


def _tiled(config: Config, pipeline: Any = None) -> bool:
    return config.vae == VAE_TILED or bool(getattr(getattr(pipeline, "vae", None), "use_tiling", False))


def _key(
    source: ModelSource, computes_in: tuple[str, str], plain: dict[str, Any], tiled: bool, there: Mapping[str, Any]
) -> str:
    """By which facts are kept. `there`: parts that are loaded."""
    return known.key_of(source.model_id, _revision(source), *computes_in, plain, tiled, *map(_made_of, there.items()))


def _made_of(named: tuple[str, Any]) -> str:
    """What decides the facts of a part that is loaded: sizes of weights, and settings; not their values."""
    name, part = named
    settings = dict(part.config) if hasattr(part, "set_timesteps") else {}  # a scheduler: how often it calls
    tiles = {key: value for key, value in getattr(part, "__dict__", {}).items() if key.startswith(("tile_", "use_"))}
    weights = part.named_parameters() if hasattr(part, "named_parameters") else ()
    sizes = [(key, tuple(x.shape), str(x.dtype)) for key, x in weights]
    return f"{name} {type(part).__name__} {settings} {tiles} {sizes}"


def _revision(source: ModelSource) -> str:
    """Of a hub id, what is in the local cache."""
    from parafuse.engine.memory.fake_pipeline import folder_of

    if source.kind != "hub":
        return ""
    try:
        return folder_of(source).name
    except ModelError:
        return ""


def fixed_of(config: Config, *, options: bool) -> dict[str, Any]:
    """What a config has set, as fields of a candidate; `options`: those beside degrees as well."""
    parallel = config.parallel
    found: dict[str, Any] = {}
    if parallel != Parallel():
        found = {str(axis): getattr(parallel, axis) for axis in (Axis.DATA, Axis.CFG, Axis.RING, Axis.ULYSSES)}
    found = {name: degree for name, degree in found.items() if degree != "auto"}
    given = {
        "sparse": str(config.sparse or ""),
        "attention": "" if config.attention == AUTO else str(config.attention),
        "compile": config.compile,
        "quantize": str(config.quantize or "").partition(":")[0],
        "cache": cache.brief if (cache := cache_of(config.cache)) is not None else "",
        "offload": offload_name(offload_of(config.offload)),
    }
    return found | {name: value for name, value in given.items() if value or options}


def offload_name(method: Offload | None) -> str:
    """As a candidate has it."""
    if method is None:
        return ""
    return SHARDED if method.to == RANKS else "model" if isinstance(method, ModelOffload) else "group"


def choose(
    config: Config,
    source: ModelSource,
    ranks: int,
    computes_in: tuple[str, str],
    call: Mapping[str, Any] | None = None,
    *,
    pipeline: Any = None,
    given: Mapping[str, Any] | None = None,
) -> Chosen:
    """The layout for so many ranks; the config itself where it has set one. Local: ranks may differ in what they know
    of their machines (`choose_together`). `computes_in`: device and dtype. `pipeline`: one that is loaded; `given`:
    parts in the place of the model's own.

    Where facts of the model cannot be had, Ulysses takes all ranks, as without a planner, and `why` says so. Raises
    ConfigError for a call that the pipeline does not take, and where no layout is legal."""
    if ranks == 1 or not config.parallel.is_chosen:
        return Chosen(config, "")
    device, dtype = computes_in
    try:
        facts = facts_of(source, config, computes_in, call or {}, pipeline=pipeline, given=given)
    except ParafuseError as error:
        if call and isinstance(error, ConfigError) and not isinstance(error, (ModelError, UnsupportedError)):
            raise
        first = str(error).partition("\n")[0]
        return Chosen(config, f"ulysses takes all ranks that no other axis uses; its cost is not known: {first}")
    demand = Demand(ranks=ranks, fidelity=Fidelity.FAST, fixed=fixed_of(config, options=True), layouts_only=True)
    there = machine_at_hand(ranks, device, dtype)
    learned = corrections_of(there, device, dtype)
    found = search(facts, there, demand, learned, refusal=refusal_of(config, device))
    parallel = Parallel(**found.best.candidate.degrees)
    return Chosen(dataclasses.replace(config, parallel=parallel), one_line(found), found)


def choose_together(
    config: Config,
    source: ModelSource,
    ranks: int,
    computes_in: tuple[str, str],
    call: Mapping[str, Any] | None = None,
    *,
    alone: bool,
    **parts: Any,
) -> Chosen:
    """What rank 0 chooses, on every rank of a launcher; every rank must call it. With `alone`, this process decides for
    ranks that it starts itself, or is the only one. Raises as `choose` does, on all ranks alike."""

    def make() -> Chosen:
        return choose(config, source, ranks, computes_in, call, **parts)

    if alone or ranks == 1:
        return make()
    from parafuse.parallel.world import AGREE_S, from_first

    own: list[Chosen | Exception] = []

    def told() -> str:
        try:
            own.append(found := make())
        except Exception as error:
            own.append(error)
            return json.dumps({"error": str(error), "is_config": isinstance(error, ConfigError)})
        return json.dumps({"degrees": dataclasses.asdict(found.config.parallel), "why": found.why})

    said = json.loads(from_first("a layout", told, max(config.timeout_s, AGREE_S)))
    for mine in own:  # on rank 0
        if isinstance(mine, Exception):
            raise mine
        return mine
    if "error" in said:
        raise (ConfigError if said["is_config"] else RankError)(said["error"])
    if not config.parallel.is_chosen:
        return Chosen(config, "")
    return Chosen(dataclasses.replace(config, parallel=Parallel(**said["degrees"])), said["why"])


def refusal_of(config: Config, device: str) -> Callable[[Candidate], str]:
    """Why an option of a config cannot be had in a layout; empty where it can."""
    from parafuse.engine.extras import Extras

    if config.placement is not None:  # it is settled against the machine, later
        return lambda _: ""
    extras = Extras.of(config, device)

    def why(one: Candidate) -> str:
        try:
            extras.check(device, lambda axis: one.degrees.get(str(axis), 1))
        except ConfigError as error:
            return str(error)
        return ""

    return why


def corrections_of(there: Machine, device: str, dtype: str) -> Corrections:
    """What runs on this machine have told of predictions like these."""
    return corrections(known.this_machine(device), there, dtype)


def plans(
    model: str,
    hardware: str | int | Machine | None = None,
    call: Mapping[str, Any] | None = None,
    config: Config | None = None,
    *,
    objective: str = Objective.LATENCY,
    fidelity: str = Fidelity.EXACT,
    requests: int = REQUESTS,
) -> Found:
    """The legal plans for a model and a request on a machine, the best first, with what each costs; `print` shows why.
    Nothing is loaded, downloaded or exchanged, and the machine need not be here.

    `hardware`: as `8xh200` (docs/planner.md), a machine, or a number of ranks of this one; not given: all GPUs of this
    one, or one rank on its CPU. `call`: keywords of the pipeline's call; the model's own where they are not given.
    `config`: what it sets stays, all else is chosen. Raises ConfigError for contradictory demands and where no plan is
    legal, ModelError for a model that is not here, UnsupportedError for one that cannot be followed."""
    _check_kinds(model=(model, str), call=(call, Mapping | None), requests=(requests, int))
    _check_kinds(config=(config, Config | None))
    config = config or Config()
    for name, value, kinds in (("objective", objective, Objective), ("fidelity", fidelity, Fidelity)):
        names = [str(kind) for kind in kinds]
        if value not in names:
            raise ConfigError(f"{name}={value!r}: must be one of {', '.join(names)}{nearest(str(value), names) or '.'}")
    if requests < 1:
        raise ConfigError(f"requests={requests}: must be at least 1.")
    there = _machine_of(hardware, config)
    if config.device not in ("auto", there.device.kind):
        raise ConfigError(f"hardware={there.name!r}: computes on {there.device.kind}, not on device={config.device!r}.")
    source = locate(model, allow_pickle=config.allow_pickle)
    on_it = dataclasses.replace(config, device=there.device.kind)
    demand = Demand(
        ranks=there.num_ranks,
        objective=Objective(objective),
        fidelity=Fidelity(fidelity),
        requests=requests,
        fixed=fixed_of(config, options=False),
    )
    return plans_for(source, on_it, there, demand, call or {})


def _check_kinds(**given: tuple[Any, Any]) -> None:
    """Raises ConfigError for an argument of another type."""
    for name, (value, kind) in given.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = " or ".join("None" if one is NoneType else one.__name__ for one in get_args(kind) or (kind,))
            raise ConfigError(f"{name}={value!r}: must be {wanted}, not {type(value).__name__}.")


def _machine_of(hardware: str | int | Machine | None, config: Config) -> Machine:
    """That is named, or this one. Raises ConfigError for what names none."""
    from parafuse.engine.planner import computes_in

    if isinstance(hardware, Machine):
        return hardware
    if isinstance(hardware, str):
        return machine.named(hardware)
    ranks = (num_cuda_devices() if config.device != "cpu" else 0) or 1 if hardware is None else hardware
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= machine.MOST_RANKS:
        raise ConfigError(
            f"hardware={hardware!r}: must be a name such as '8xh200', a number of ranks of this machine (from 1 to "
            f"{machine.MOST_RANKS}), or a Machine."
        )
    return machine_at_hand(ranks, *computes_in(config, ranks))


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
    refusal = refusal_of(dataclasses.replace(config, device=device), device)
    return search(facts_of(source, config, (device, dtype), call), there, demand, learned, refusal=refusal)
