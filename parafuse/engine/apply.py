"""`apply`: what a config asks for, put on a model the user already has, and taken off again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import nn

from parafuse.config import Axis, Config
from parafuse.engine.derive import derive
from parafuse.engine.source import ModelSource
from parafuse.engine.stack import block_stack
from parafuse.errors import ConfigError
from parafuse.log import note
from parafuse.parallel.comm import Count, counters, since
from parafuse.parallel.data import DataParallel
from parafuse.parallel.guidance import GuidanceParallel, Rounds
from parafuse.parallel.hooks import is_overridden
from parafuse.parallel.mesh import Mesh, make_mesh, release
from parafuse.parallel.sequence import SequenceParallel
from parafuse.parallel.world import ensure_world

STACKS = ("transformer", "transformer_2", "unconditional_transformer")
"""Pipeline components that hold a block stack, where they are present: what sequence parallel splits."""
DENOISERS = (
    *STACKS, "unet", "image_unet", "text_unet", "prior", "prior_prior", "decoder", "super_res_first", "super_res_last",
)  # fmt: skip
"""Components that a pipeline calls in every step."""
DECODERS = ("vae", "movq", "vqgan", "vqvae")


@dataclass
class Handle:
    """What was applied. `remove()` puts the model back bit for bit; also a context manager."""

    applied: list[str] = field(default_factory=list[str])
    """One line per thing that was applied, for receipts; empty when nothing was."""
    mesh: Mesh | None = None
    guidance: dict[str, GuidanceParallel] = field(default_factory=dict[str, GuidanceParallel])
    """Component -> its guidance branches."""
    data: dict[str, DataParallel] = field(default_factory=dict[str, DataParallel])
    """Component -> its batch over replicas."""
    rounds: Rounds = field(default_factory=Rounds)
    _undo: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    _is_off: bool = False
    _before: dict[str, Count] = field(default_factory=dict[str, Count])
    """What had gone over the groups before: torch gives two meshes of the same ranks the same groups."""

    def __post_init__(self) -> None:
        self._before = {name: replace(count) for name, count in self._counts().items()}

    def remove(self) -> None:
        """Takes everything off, in reverse order. Local; a second call does nothing."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self.applied.clear()
        self.guidance.clear()
        self.data.clear()
        if self.mesh is not None and not self._is_off:
            release(self.mesh)
        self._is_off = True

    def exchanged(self) -> dict[str, Count]:
        """Calls and bytes that this rank has sent since `apply`, per axis and kind, as `ulysses.all_to_all`."""
        return since(self._counts(), self._before)

    def _counts(self) -> dict[str, Count]:
        if self.mesh is None:
            return {}
        groups = {str(axis): group for axis, group in self.mesh.groups.items()}
        if self.mesh.sequence is not None and self.mesh.sequence not in groups.values():
            groups["sequence"] = self.mesh.sequence
        return {f"{axis}.{kind}": c for axis, group in groups.items() for kind, c in counters(group).kinds.items()}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def check_components(source: ModelSource, degrees: Mapping[str, int]) -> None:
    """Raises ConfigError for a pipeline that cannot run in this layout, before its weights are loaded."""
    splits = degrees[Axis.RING] * degrees[Axis.ULYSSES] > 1
    if source.components is None or not splits or set(STACKS) & set(source.components):
        return
    raise ConfigError(
        f"model={source.name!r}: has no transformer to split over ranks (UNets are not split); use cfg=2 for "
        "its guidance branches, data=N for several pictures, or one rank."
    )


def _refuse_wrapped(name: str, modules: list[nn.Module]) -> None:
    """Raises ConfigError for modules that somebody else has wrapped: the order would decide what is right."""
    for module in modules:
        where = f"{name}: {type(module).__name__}"
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            raise ConfigError(f"{where} is compiled; apply parafuse to the model before it is compiled.")
        hooks: Any = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        if hooks:
            raise ConfigError(
                f"{where} carries diffusers hooks ({', '.join(hooks)}), such as a cache, offload or context parallel; "
                "take them off (disable_cache(), remove_all_hooks()) before parafuse is applied."
            )
        if hasattr(module, "_hf_hook"):
            raise ConfigError(
                f"{where} is offloaded or placed by accelerate; take that off before parafuse is applied."
            )


def denoisers(target: Any, names: Sequence[str] = STACKS) -> list[tuple[str, nn.Module]]:
    """(name, module) of a pipeline's denoisers, or of the target itself where it is a module."""
    if isinstance(target, nn.Module):
        return [(type(target).__name__, target)]
    found = [(name, getattr(target, name, None)) for name in names]
    modules = [(name, module) for name, module in found if isinstance(module, nn.Module)]
    if not modules:
        raise ConfigError(
            f"target={type(target).__name__}: must be a torch module, or a pipeline with one of {', '.join(names)}."
        )
    return modules


def _batched(target: Any, modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module, str]]:
    """(name, module, method) of what a pipeline calls with a batch of samples: its denoisers, and the VAE's decoder."""
    found = [(name, module, "forward") for name, module in modules]
    for name in () if isinstance(target, nn.Module) else DECODERS:
        vae = getattr(target, name, None)
        if isinstance(vae, nn.Module) and hasattr(vae, "decode"):
            found.append((f"{name}.decode", vae, "decode"))
    return found


def apply(target: Any, config: Config | None = None, *, mesh: Mesh | None = None) -> Handle:
    """Makes a pipeline or a transformer run on all ranks. Every rank must call it, with the same config.

    `target` is changed in place (its instances, never their classes) and must have the same weights on every rank. Uses
    the default process group, or makes it from the launcher's environment. On one rank nothing is wrapped. Raises
    ConfigError before anything is changed or exchanged. Calls of the model are collective from then on."""
    config = config or Config()
    for field_name in ("dtype", "device", "allow_pickle"):
        value = getattr(config, field_name)
        if value != getattr(Config(), field_name):
            raise ConfigError(f"{field_name}={value!r}: apply takes the model as it is; set it when loading the model.")
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    degrees = config.parallel.degrees(world_size) if mesh is None else {}  # a mesh has its own
    if world_size == 1:
        return Handle()
    if mesh is not None:
        degrees = {axis: mesh.degree(axis) for axis in Axis}
    splits = degrees[Axis.RING] * degrees[Axis.ULYSSES] > 1
    modules = denoisers(target, STACKS if splits else DENOISERS)
    for name, module in modules:
        _refuse_wrapped(name, list(module.modules()))
        if is_overridden(module):
            raise ConfigError(f"target: parafuse is on {name} already; call remove() on the handle of the first apply.")
    stacks = [block_stack(module) for _, module in modules] if splits else []
    if mesh is None:
        first = next(chain(modules[0][1].parameters(), modules[0][1].buffers()), None)
        device = "cuda" if first is not None and first.is_cuda else "cpu"
        ensure_world(device, config.timeout_s)
        mesh = make_mesh(degrees, device, config.timeout_s)
        if splits and config.parallel.ulysses == "auto":
            note(f"ulysses {degrees[Axis.ULYSSES]}: all ranks that no other axis uses")
    handle = Handle(mesh=mesh)
    try:
        _install(handle, mesh, target, modules, stacks)
    except BaseException:
        handle.remove()
        raise
    return handle


def _install(
    handle: Handle, mesh: Mesh, target: Any, modules: list[tuple[str, nn.Module]], stacks: list[list[nn.Module]]
) -> None:
    """Sequence parallel inside of data parallel inside of guidance parallel."""
    for (name, module), blocks in zip(modules, stacks, strict=False):
        sequence = SequenceParallel(module, blocks, mesh, derive)
        axes = " x ".join(f"{a} {mesh.degree(a)}" for a in (Axis.RING, Axis.ULYSSES) if mesh.degree(a) > 1)
        _put_on(handle, sequence, f"sequence parallel ({axes}) on {name}: {len(blocks)} blocks")
    for name, module, method in _batched(target, modules) if mesh.degree(Axis.DATA) > 1 else []:
        handle.data[name] = DataParallel(module, mesh, method)
        _put_on(handle, handle.data[name], f"data parallel (data {mesh.degree(Axis.DATA)}) on {name}")
    for name, module in modules if mesh.degree(Axis.CFG) > 1 else []:
        handle.guidance[name] = GuidanceParallel(module, mesh, handle.rounds)
        _put_on(handle, handle.guidance[name], f"guidance parallel (cfg {mesh.degree(Axis.CFG)}) on {name}")


def _put_on(handle: Handle, one: SequenceParallel | DataParallel | GuidanceParallel, line: str) -> None:
    handle._undo.append(one.remove)
    one.install()
    handle.applied.append(line)
