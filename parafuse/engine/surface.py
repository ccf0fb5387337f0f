"""A diffusers pipeline's own methods and properties on an engine: what is called here runs on every rank."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils._pytree import tree_map, tree_map_only

from parafuse.engine.devices import refuse_another_device
from parafuse.engine.members import PARTS, Way, refusal, way_of
from parafuse.engine.plan import Plan
from parafuse.engine.state import components_of
from parafuse.errors import ConfigError, nearest
from parafuse.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Act:
    """Something done on every rank to a pipeline, or to a part of it."""

    part: str = ""
    """Way to the part from the pipeline, as `vae` or `transformer.transformer_blocks.0`; empty: the pipeline."""
    name: str
    """Of the method; or of the attribute that is set."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    sets: bool = False
    """Whether an attribute is set, to the one argument."""
    own_device: tuple[str, ...] = ()
    """Names of arguments in whose place each rank gives its own device."""

    def __str__(self) -> str:
        return ".".join(filter(None, (self.part, self.name)))

    def values(self) -> dict[str, Any]:
        """The arguments by name, or by number."""
        return {f"argument {i}": value for i, value in enumerate(self.args, 1)} | self.kwargs

    def do(self, pipeline: Any, **own: Any) -> Any:
        """Does it on this rank; `own`: arguments that each rank has its own of."""
        target = part_of(pipeline, self.part)
        args, kwargs = resolved(pipeline, (self.args, self.kwargs))
        if self.sets:
            return setattr(target, self.name, args[0])
        return getattr(target, self.name)(*args, **kwargs, **own)

    def changed(self, plan: Plan) -> Plan:
        """The plan of an engine on which it was done."""
        if self.part or self.sets:
            return plan
        if self.name == "reset_device_map":
            return replace(plan, placement=None, offload_folder="")
        dtypes = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, torch.dtype)]
        return replace(plan, dtype=str(dtypes[-1]).removeprefix("torch.")) if self.name == "to" and dtypes else plan

    def referring(self, pipeline: Any) -> Act:
        """The same with references for arguments that are parts of the pipeline: each rank takes its own."""
        args, kwargs = referred(pipeline, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Reference:
    """A part of the pipeline as an argument."""

    path: str


def referred(pipeline: Any, tree: Any) -> Any:
    """The same nest with references for parts of the pipeline. Raises ConfigError for a part of another engine."""
    names = {id(part): name for name, part in components_of(pipeline).items()}

    def refer(x: Any) -> Any:
        if type(x) is not Part:
            return Reference(names[id(x)]) if id(x) in names else x
        path, bare = _place(x)[1], _bare(x)
        if _there(pipeline, path) is not bare:
            raise ConfigError(
                f"{path}: is a component of another engine, which the ranks that it has started cannot tell from this "
                "one's. Make this engine with from_pipe, or start all ranks with torchrun."
            )
        return Reference(path)

    return tree_map(refer, tree)


def resolved(pipeline: Any, tree: Any) -> Any:
    """The same nest with this rank's parts for references."""
    return tree_map_only(Reference, lambda x: part_of(pipeline, x.path), tree)


def _there(pipeline: Any, path: str) -> Any:
    try:
        return part_of(pipeline, path)
    except (AttributeError, LookupError):
        return None


def part_of(pipeline: Any, path: str) -> Any:
    """The part at the end of a dotted path; numbers are places in a list of modules."""
    for name in filter(None, path.split(".")):
        pipeline = pipeline[int(name)] if name.isdigit() else getattr(pipeline, name)
    return pipeline


class Surface(ABC):
    """Gives an engine the members of its pipeline. Own attributes are those that a class of it declares."""

    pipeline: Any
    """The diffusers pipeline under the handles."""
    plan: Plan
    world: World
    handle: Any

    @abstractmethod
    def act(self, act: Act) -> Any:
        """Does something on every rank; every rank calls it under a launcher."""

    @property
    @abstractmethod
    def _feeds_ranks(self) -> bool:
        """Whether this process stands for ranks that it has started: what it does, it must tell them."""

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    def packed(self) -> str:
        """The method in which weights are quantized; empty where none are."""
        return next((one.method.method for one in self.handle.quantized.values()), "")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "pipeline" not in vars(self):
            raise AttributeError(name)
        if name in PARTS and not hasattr(self.pipeline, name):
            part, method = PARTS[name]
            if not hasattr(getattr(self.pipeline, part, None), method):
                raise AttributeError(f"{type(self.pipeline).__name__} has no {part} with {method}")
            return _reach(self, part, method)
        return _reach(self, "", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "pipeline" not in vars(self) or _is_own(type(self), name):
            object.__setattr__(self, name, value)
            return
        if not hasattr(self.pipeline, name):
            raise AttributeError(_unknown(self.pipeline, name))
        self.act(Act(name=name, args=(value,), sets=True))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As the pipeline's own: another dtype, or on one rank another device. On several ranks each has its own."""
        args = tuple(map(_device, args))
        kwargs = {name: _device(x) for name, x in kwargs.items()}
        asked = [torch.device(x) for x in (*args, *kwargs.values()) if isinstance(x, (str, torch.device))]
        refuse_another_device(asked, self.plan, self.world.size)
        self.act(Act(name="to", args=args, kwargs=kwargs))
        for device in asked if self.world.size == 1 else ():
            self.world.device, self.plan = device, replace(self.plan, device=device.type)
        return self

    def reset_device_map(self) -> None:
        """As the pipeline's own: the placement is taken off, and all weights are in the host's memory."""
        self.act(Act(name="reset_device_map"))

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """As the pipeline's own: a component is on the device while it runs; by default each rank's own."""
        self._offload("enable_model_cpu_offload", gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """As the pipeline's own: a module is on the device while it runs; by default each rank's own."""
        self._offload("enable_sequential_cpu_offload", gpu_id, device)

    def _offload(self, name: str, gpu_id: int | None, device: Any) -> None:
        _refuse(self, "", name)
        own = self.world.device.type == "cuda" and gpu_id is None and device in (None, "cuda", torch.device("cuda"))
        given = {key: value for key, value in (("gpu_id", gpu_id), ("device", device)) if value is not None and not own}
        self.act(Act(name=name, kwargs=given, own_device=("device",) if own else ()))

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """As the pipeline's own, on rank 0; the other ranks show no bar."""
        self.pipeline.set_progress_bar_config(**(kwargs if self.rank == 0 else kwargs | {"disable": True}))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.pipeline)})


class Part:
    """A part of the pipeline of an engine that has started its ranks: its methods run on all of them.

    `isinstance` sees the part's own class. `engine.pipeline` has the bare part, of this process alone."""

    def __init__(self, engine: Surface, path: str):
        object.__setattr__(self, "_parafuse", (engine, path))

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(_bare(self))

    def __getattr__(self, name: str) -> Any:
        return _reach(*_place(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        engine, path = _place(self)
        if not hasattr(_bare(self), name):
            raise AttributeError(_unknown(_bare(self), name))
        engine.act(Act(part=path, name=name, args=(value,), sets=True))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _act(*_place(self), "__call__", *args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        engine, path = _place(self)
        if isinstance(key, slice):
            return [self[i] for i in range(len(self))[key]]
        return Part(engine, f"{path}.{range(len(self))[key]}") if isinstance(key, int) else _bare(self)[key]

    def __len__(self) -> int:
        return len(_bare(self))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return repr(_bare(self))

    def __dir__(self) -> list[str]:
        return dir(_bare(self))


def _place(part: Part) -> tuple[Surface, str]:
    return object.__getattribute__(part, "_parafuse")


def _bare(part: Part) -> Any:
    engine, path = _place(part)
    return part_of(engine.pipeline, path)


def _reach(engine: Surface, path: str, name: str) -> Any:
    """A member of the pipeline or of a part: methods as ones that run where they must, the rest as it is."""
    owner = part_of(engine.pipeline, path)
    try:
        value = getattr(owner, name)
    except AttributeError as error:
        if hasattr(type(owner), name) or name.startswith("_"):
            raise  # a property that cannot be read yet
        raise AttributeError(_unknown(owner, name)) from error
    if not inspect.isroutine(value):
        is_part = engine._feeds_ranks and not path and name in components_of(engine.pipeline)
        if is_part or (engine._feeds_ranks and isinstance(value, nn.Module)):
            return Part(engine, f"{path}.{name}" if path else name)
        return value
    way = way_of(name)
    if way is Way.HERE:
        return value
    if way is Way.WRITES:
        return value if engine.rank == 0 else _nothing
    return partial(_act, engine, path, name)


def _refuse(engine: Surface, path: str, name: str, args: tuple[Any, ...] = ()) -> None:
    """Raises ConfigError for what cannot be called under the engine's plan."""
    reason = refusal(name, engine.plan, args, part=path, packed=engine.packed)
    if reason:
        raise ConfigError(f"{name}: {reason}.")


def _act(engine: Surface, path: str, name: str, /, *args: Any, **kwargs: Any) -> Any:
    _refuse(engine, path, name, args)
    result = engine.act(Act(part=path, name=name, args=args, kwargs=kwargs))
    is_part = engine._feeds_ranks and path and result is part_of(engine.pipeline, path)
    return Part(engine, path) if is_part else result  # so that calls can be chained, as with to()


def _device(x: Any) -> Any:
    """torch takes a number for a device."""
    return torch.device("cuda", x) if isinstance(x, int) and not isinstance(x, bool) else x


def _nothing(*_: Any, **__: Any) -> None:
    """Files are rank 0's to write."""


def _is_own(cls: type, name: str) -> bool:
    return any(name in vars(c) or name in vars(c).get("__annotations__", ()) for c in cls.__mro__)


def _unknown(owner: Any, name: str) -> str:
    kind = type(owner).__name__
    return f"{kind} has no {name!r}{nearest(name, [n for n in dir(owner) if not n.startswith('_')])}"
