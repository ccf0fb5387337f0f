"""Adapters that do not fit a pipeline: one clear error, and nothing of them stays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from parafuse.engine.surface import Act
from parafuse.errors import ConfigError

LOADS = ("load_lora_weights", "load_lora_adapter")
DOES_NOT_FIT = (RuntimeError, ValueError, LookupError, AttributeError, TypeError)
"""What diffusers and peft raise then; packed weights know less of shapes."""
FILES = (".safetensors", ".bin", ".pt")
NAMES_OF_HUB = 2
"""An owner's and a repository's."""
STATE = ("peft_config", "_hf_peft_config_loaded")
"""What peft, diffusers and transformers note on a component."""


@contextmanager
def fitting(act: Act, pipeline: Any) -> Iterator[None]:
    """Around a method on every rank. Raises ConfigError where it loads an adapter of another architecture, of which
    diffusers says so in its own words, or, where no name in it fits, in its log alone. Whatever fails, layers and
    adapters are as they were."""
    if act.name not in LOADS:
        yield
        return
    _refuse_missing(act)
    before = adapters(pipeline)
    found = [_Found(part) for part in pipeline.components.values() if isinstance(part, nn.Module)]
    try:
        yield
    except Exception as error:
        for part, names in adapters(pipeline).items():
            for name in names - before.get(part, set()):
                with suppress(ValueError, KeyError):  # it was taken off by itself
                    getattr(pipeline, part).delete_adapters(name)
        for one in found:
            one.restore()
        if isinstance(error, ConfigError) or not isinstance(error, DOES_NOT_FIT):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        asked = f" {str(act.args[0])!r}" if act.args and isinstance(act.args[0], (str, os.PathLike)) else ""
        raise ConfigError(f"{act}: the adapter{asked} does not fit this model ({' '.join(lines[:2])}).") from error
    if adapters(pipeline) == before and not act.kwargs.get("hotswap"):
        raise ConfigError(
            f"{act}: nothing in the adapter is for a part of {type(pipeline).__name__} ({', '.join(before)}); it is "
            "one for another architecture, or its names need another prefix."
        )


def _refuse_missing(act: Act) -> None:
    """Raises ConfigError for a file or folder that is not there, which diffusers takes for the name of a hub's."""
    asked = act.args[0] if act.args else None
    if not isinstance(asked, (str, os.PathLike)):
        return
    path = Path(asked)
    is_path = path.is_absolute() or path.suffix in FILES or len(path.parts) != NAMES_OF_HUB
    if is_path and not path.exists():
        raise ConfigError(f"{act}: {str(path)!r} does not exist; give a file, a folder, or the id of one on the hub.")


class _Found:
    """What peft has put on a component so far: its layers, the adapters in them, and which of these are active."""

    def __init__(self, part: nn.Module):
        self._part = part
        self._layers = {layer: (_within(layer), list(layer.active_adapters)) for _, layer in _wrapping(part)}
        self._trained = [(x, x.requires_grad) for x in part.parameters()]
        self._state = {name: vars(part)[name] for name in STATE if name in vars(part)}

    def restore(self) -> None:
        """Takes off what has come since then. diffusers leaves its layers around those of the model, which then have
        other names in whatever is saved, and another adapter active."""
        for path, layer in _wrapping(self._part):
            if layer not in self._layers:
                parent, _, name = path.rpartition(".")
                setattr(self._part.get_submodule(parent), name, layer.get_base_layer())
                continue
            names, active = self._layers[layer]
            for name in _within(layer) - names:
                layer.delete_adapter(name)
            if list(layer.active_adapters) != active:
                layer.set_adapter(active)
        for x, is_trained in self._trained:
            if x.requires_grad != is_trained:
                x.requires_grad_(is_trained)
        for name in STATE:
            if name in self._state:
                setattr(self._part, name, self._state[name])
            else:
                vars(self._part).pop(name, None)


def _wrapping(part: nn.Module) -> list[tuple[str, Any]]:
    """(path, layer) of each layer of peft's around one of the model's, under all its paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, one) for path, one in part.named_modules(remove_duplicate=False) if isinstance(one, BaseTunerLayer)]


def _within(layer: Any) -> set[str]:
    """The adapters in a layer."""
    found = [getattr(layer, name, None) for name in (*layer.adapter_layer_names, *layer.other_param_names)]
    return {name for one in found if isinstance(one, (Mapping, nn.ModuleDict, nn.ParameterDict)) for name in one}


def adapters(pipeline: Any) -> dict[str, set[str]]:
    """Component -> names of the adapters on it."""
    parts = {name: part for name, part in pipeline.components.items() if hasattr(part, "load_lora_adapter")}
    parts |= {name: part for name, part in pipeline.components.items() if _configs(part)}
    return {name: _configs(part) | _norms(part) for name, part in parts.items()}


def _configs(part: Any) -> set[str]:
    return set(getattr(part, "peft_config", None) or ()) if isinstance(part, nn.Module) else set()


def _norms(part: Any) -> set[str]:
    """FLUX's adapters may have norms alone."""
    return {"norms"} if getattr(part, "_transformer_norm_layers", None) else set()
