"""Offload on one component: what meets its calls, and what meets the methods that read or change its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parafuse.engine.members import OFFLOADS, beside_offload
from parafuse.errors import ConfigError, UnsupportedError
from parafuse.offload import Offload
from parafuse.parallel.hooks import Forward, OnForward, override, override_forward
from parafuse.parallel.packed import has_values
from parafuse.parallel.residence import Residence

READS = ("state_dict", "save_pretrained", "push_to_hub", "save_lora_adapter", "save_attn_procs")
CHANGES = (
    "_apply", "load_state_dict", "load_lora_adapter", "load_attn_procs", "load_adapter", "add_adapter", "fuse_lora",
    "unfuse_lora", "unload_lora", "delete_adapters", "fuse_qkv_projections", "unfuse_qkv_projections", "tie_weights",
    "resize_token_embeddings", "dequantize", "_load_ip_adapter_weights",
)  # fmt: skip
MOVES = ("to", "cuda", "cpu")


Hook = Callable[..., None]


class OffloadedComponent:
    """Its weights are at home, and come for its calls. `install` before all that is put on calls of it."""

    def __init__(self, name: str, module: nn.Module, method: Offload, residence: Residence):
        self.name, self.module, self.method, self.residence = name, module, method, residence
        self._undo: list[Callable[[], None]] = []
        self.offloading: Any = None
        """Whose it is, where pipelines may share it."""

    def install(self) -> None:
        """All or nothing."""
        try:
            self._put_on()
        except BaseException:
            self.remove()
            raise

    def _put_on(self) -> None:
        self.residence.settle()
        self._undo.append(self.residence.close)
        there = [name for name in (*READS, *CHANGES, *OFFLOADS) if callable(getattr(self.module, name, None))]
        for name in (*there, *MOVES):
            self._undo.append(override(self.module, name, self._instead(name, getattr(self.module, name))))

    def remove(self) -> None:
        """Puts weights and methods back. Goes on where it was left. No communication."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def _instead(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for a method of the component."""

        def at_home(*args: Any, **kwargs: Any) -> Any:
            with self.residence.at_home(changes=name in CHANGES):
                return original(*args, **kwargs)

        def moved(*args: Any, **kwargs: Any) -> Any:
            device, others = _asked(name, args, kwargs)
            own = self.residence.device
            if device is not None and (device.type != own.type or device.index not in (None, own.index or 0)):
                raise ConfigError(
                    f"{name}: device={str(device)!r}: {self.name} is offloaded ({self.method.said}), and its "
                    f"weights come to {str(own)!r} by themselves when it is called; take parafuse off first (remove(), "
                    "or close() of an engine)."
                )
            return original(**others) if others else self.module

        def refused(*_: Any, **__: Any) -> None:
            raise ConfigError(f"{name}: {beside_offload(name, self.method)}.")

        found: Any = refused if name in OFFLOADS else moved if name in MOVES else at_home
        found.parafuse_offloading = self.offloading
        return found


class Summons:
    """For parts of a component that are called by themselves, as pipelines do with encoders, decoders and embeddings:
    hooks that are always there, so that nothing that watches the component sees a change."""

    def __init__(self, residence: Residence, *, enters: bool, quiet: Iterable[nn.Module] = ()):
        """`enters`: whether calls that units come for are met here; else somebody else does that, and what stays is
        summoned, by no part of those that are `quiet`."""
        self._residence, self._enters = residence, enters
        self._quiet = list(quiet)
        self._known: set[nn.Module] = set()
        self._handles: list[Any] = []

    def install(self) -> None:
        self._residence.on_renewed.append(self._look)
        self._look()
        if self._enters:
            self._on(self._residence.root, self._begin, self._end)

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._known.clear()
        if self._look in self._residence.on_renewed:
            self._residence.on_renewed.remove(self._look)

    def _look(self) -> None:
        """Meets what is new."""
        modules = dict.fromkeys(self._residence.modules)
        inside = {part: one for one in modules for part in one.modules()}
        quiet = {part for one in self._quiet for part in one.modules()}
        for part in self._residence.root.modules():
            if part in self._known or part is self._residence.root:
                continue
            if part in modules and self._enters:
                self._on(part, self._enter, self._leave)
            elif part not in modules and part not in quiet and part._parameters:
                self._on(part, self._summoning(inside.get(part)))
            self._known.add(part)

    def _on(self, part: nn.Module, before: Hook, after: Hook | None = None) -> None:
        self._handles.append(part.register_forward_pre_hook(_unseen(before)))
        if after is not None:
            self._handles.append(part.register_forward_hook(_unseen(after), always_call=True))

    def _summoning(self, module: nn.Module | None) -> Hook:
        return lambda part, args: self._residence.summon(module)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._residence.summon()
        self._residence.enter(module)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._residence.leave(module)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._residence.begin_call()

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        self._residence.end_call()


def _unseen(hook: Callable[..., None]) -> Hook:
    """A hook that no compiler looks into."""
    found: Any = torch.compiler.disable(hook)
    return found


class UnitCalls:
    """What meets the calls of units of a denoiser: outside of what splits or compiles them, inside of what leaves them
    out."""

    def __init__(self, residence: Residence):
        self._residence = residence
        self._on: dict[nn.Module, None] = {}
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        self._residence.on_renewed.append(self._look)
        self._look()

    def remove(self) -> None:
        """Puts every forward back as it was."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self._on.clear()
        if self._look in self._residence.on_renewed:
            self._residence.on_renewed.remove(self._look)

    def _look(self) -> None:
        """Meets what is new: the layers of an adapter."""
        for module in self._residence.modules:
            if module not in self._on:
                self._on[module] = None
                self._undo.append(
                    override_forward(module, lambda original, module=module: self.around(module, original))
                )
                vars(module)["forward"].parafuse_weights = True

    def around(self, module: nn.Module, original: Forward) -> Forward:
        residence = self._residence

        def forward(*args: Any, **kwargs: Any) -> Any:
            with residence.unit(module):
                return original(*args, **kwargs)

        return forward

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Inside, these modules are as their classes have them, with nothing around but this."""
        plain = [(module, vars(module)) for module in self._on if "forward" not in vars(module)]
        for module, state in plain:
            state["forward"] = self.around(module, type(module).forward.__get__(module))
        try:
            yield
        finally:
            for _, state in plain:
                del state["forward"]


class RootCalls(OnForward):
    """What meets whole calls of a denoiser: outside of all that computes, inside of what shares calls between ranks."""

    def __init__(self, residence: Residence, *, checks: bool):
        """`checks`: whether the first result is looked at, for weights that were read where they were not there."""
        super().__init__(residence.root)
        self._residence, self._checks = residence, checks
        residence.on_renewed.append(self._renew)
        self._asks = checks

    def _renew(self) -> None:
        self._checks = self._asks

    def _forward(self, original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._residence.call():
                result = original(*args, **kwargs)
            if self._checks:
                self._check(result)
            return result

        return forward

    def _check(self, result: Any) -> None:
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
        if any(bool(x.isnan().any()) for x in tensors if has_values(x)):
            raise UnsupportedError(
                f"offload: {type(self.module).__name__}: its first result is not a number. Either it is none without "
                "offload too, or it reads weights of a layer without calling that layer, so that they cannot come one "
                "by one; use offload='group' (by blocks) or 'model'."
            )
        self._checks = False


def _asked(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device | None, dict[str, Any]]:
    """The device that `to`, `cuda` or `cpu` is asked for, and what else, which changes weights where they are."""
    args, kwargs = tuple(map(_device, args)), {key: _device(x) for key, x in kwargs.items()}
    if name != "to":
        named = next((x for x in (*args, *kwargs.values()) if x is not None), name)
        return torch.device(named), {}
    torch_nn: Any = getattr(torch._C, "_nn")  # noqa: B009 - torch has no stubs for it
    device, dtype, _, memory_format = torch_nn._parse_to(*args, **kwargs)
    others = {"dtype": dtype, "memory_format": memory_format}
    return device, {key: x for key, x in others.items() if x is not None}


def _device(x: Any) -> Any:
    """A number as the device that it means."""
    return torch.device("cuda", x) if isinstance(x, int) and not isinstance(x, bool) else x
