"""What a pipeline is made of, in a word for each component: ranks whose pipelines differ must not run a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from parafuse.parallel.effects import Parts
from parafuse.parallel.fingerprint import fingerprint


def components_of(pipeline: Any) -> dict[str, Any]:
    """Name -> component, of those that are there; of an object that is no pipeline of diffusers', its attributes.
    diffusers' own property fails once the configuration has a key that is no argument of the class."""
    if not hasattr(type(pipeline), "components"):
        return dict(vars(pipeline))
    try:
        found = pipeline.components
    except ValueError:
        found = {name: getattr(pipeline, name, None) for name in pipeline._get_signature_keys(pipeline)[0]}
    return {name: part for name, part in found.items() if part is not None}


class PipelineState:
    """Of one pipeline: classes, submodules, adapters, attention processors, settings. No values of weights."""

    def __init__(self, pipeline: Any):
        self._pipeline = pipeline
        self._known: dict[str, tuple[nn.Module, Parts, str]] = {}

    def facts(
        self, alone: Mapping[str, int] | None = None, wanted: Callable[[str], bool] = lambda _: True
    ) -> dict[str, str]:
        """Component -> what it is, equal on ranks where it is alike. Some milliseconds for a large model. `alone`: the
        rank of those that run on one rank alone, which may change in their calls as they will. `wanted`: by name."""
        self.let_go()
        parts = components_of(self._pipeline)
        found = {name: self._fact(name, part) for name, part in parts.items() if wanted(name)}
        return found | {name: f"on rank {rank} alone" for name, rank in (alone or {}).items()}

    def let_go(self) -> None:
        """Forgets components that the pipeline has no more: their memory is the user's to free."""
        there = components_of(self._pipeline)
        self._known = {name: known for name, known in self._known.items() if there.get(name) is known[0]}

    def _fact(self, name: str, part: Any) -> str:
        if isinstance(part, nn.Module):
            dtype = next((str(p.dtype).removeprefix("torch.") for p in part.parameters()), "")
            return f"{type(part).__name__} {dtype} {self._of_module(name, part)}"
        return word_for(part)

    def _of_module(self, name: str, module: nn.Module) -> str:
        known = self._known.get(name)
        if known is None or known[0] is not module or known[1].have_changed():
            known = self._known[name] = (module, Parts(module), _digest(fingerprint(module)))
        return known[2]


def word_for(part: Any) -> str:
    """A component in a word, by its class and settings."""
    kind = type(part).__name__
    if isinstance(part, nn.Module):
        return f"{kind} {_digest(fingerprint(part))}"
    config: Any = getattr(part, "config", None)
    if hasattr(config, "items"):
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        return f"{kind} {_digest(json.dumps(values, sort_keys=True, default=lambda x: type(x).__name__))}"
    return f"{kind} of {len(part)}" if hasattr(part, "__len__") else kind


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
