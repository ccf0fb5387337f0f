"""Devices that a user names (on several ranks each has its own, so a number would mean one device for all), and hooks
that move components between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from parafuse.engine.plan import Plan
from parafuse.errors import ConfigError


def refuse_numbered(where: str, values: Mapping[str, Any]) -> None:
    """Raises ConfigError for a device with a number, which all ranks would share."""
    for name, value in values.items():
        numbered = isinstance(value, torch.device) and value.type == "cuda" and value.index is not None
        if numbered or (isinstance(value, str) and value.startswith("cuda:")) or name == "gpu_id":
            raise ConfigError(
                f"{where}: {name}={value}: every rank has a device of its own. Give 'cuda', or leave it out."
            )


def refuse_another_device(asked: Sequence[torch.device], plan: Plan, size: int) -> None:
    """Raises ConfigError for a device that several ranks cannot move to: their exchanges are on the plan's."""
    for device in asked:
        if size > 1 and device.type != plan.device:
            raise ConfigError(
                f"to: device={device}: the ranks of this engine are on {plan.device!r}. Make an engine with "
                f"Config(device={device.type!r}), or close this one and move its pipeline."
            )


def refuse_wrapped(name: str, modules: list[nn.Module]) -> None:
    """Raises ConfigError for modules that somebody else has wrapped: the order would decide what is right."""
    for module in modules:
        where = f"{name}: {type(module).__name__}"
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            raise ConfigError(f"{where} is compiled; apply parafuse to the model before it is compiled.")
        hooks: Any = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        if hooks:
            raise ConfigError(
                f"{where} carries diffusers hooks ({', '.join(hooks)}), such as a cache, offload or context parallel; "
                "take them off before parafuse is applied (disable_cache(); where there is no such method, load the "
                "model again)."
            )
        if hasattr(module, "_hf_hook"):
            raise ConfigError(
                f"{where} is offloaded or placed by accelerate; take that off before parafuse is applied "
                "(remove_all_hooks(), or a manager's disable_auto_cpu_offload()); it can be switched on again after "
                "that, where parafuse has no offload and no placement."
            )


def remove_offload(module: nn.Module) -> None:
    """Takes off the hooks of accelerate and diffusers that move a component to a device and back."""
    if hasattr(module, "_hf_hook"):
        remove_hook_from_module(module, recurse=True)
    for part in module.modules():
        registry: Any = getattr(part, "_diffusers_hook", None)
        if registry is not None:
            for name in GROUP_HOOKS:
                registry.remove_hook(name, recurse=False)


GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""diffusers' names of what `enable_group_offload` puts on."""
