"""Whether a pipeline's requests may overlap: what one of them, watched, still does after it has begun to decode.

A second request may denoise meanwhile, on the same denoiser, scheduler and pipeline. So the rest of the first one must
leave these alone. No pipeline is known by name: a request that overlaps nothing shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parafuse.engine.apply import Handle
from parafuse.engine.state import components_of
from parafuse.engine.targets import autoencoders, weighty
from parafuse.parallel.held import Held

UNKNOWN = "<unknown>"
PROMPTS = "prompt"
"""In the name of an argument that is a text to be read: it decides nothing else."""


def alike(keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for requests that differ in prompts, pictures and noise alone. Of those, one shows what the others do, and
    what the pipeline notes of a call on itself is the same."""
    return tuple((name, _kind(name, value)) for name, value in sorted(keywords.items()))


def _kind(name: str, value: Any) -> Any:
    if isinstance(value, str) and PROMPTS in name:
        return "text"
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_kind(name, one) for one in value))
    if isinstance(value, dict):
        return tuple((str(key), _kind(str(key), one)) for key, one in sorted(value.items(), key=lambda x: str(x[0])))
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value).__name__, value)
    return _kind_of_object(value)


def _kind_of_object(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return "generator"
    if isinstance(value, (Tensor, np.ndarray)):
        return (tuple(value.shape), str(value.dtype))
    size = getattr(value, "size", None)  # of a picture
    if isinstance(size, tuple):
        return (type(value).__qualname__, size)
    name = getattr(value, "__qualname__", None)
    return UNKNOWN if name is None else (getattr(value, "__module__", ""), name)


def unknown(keywords: Mapping[str, Any]) -> str:
    """Why two such calls cannot be told to be alike; '' where they can."""
    found = ""
    for name, value in keywords.items():
        if UNKNOWN in tree_leaves(_kind(name, value)):
            found = name
    return f"{found} is no number, text, picture or function, and might be another thing in each call" if found else ""


def refusal(pipeline: Any, handle: Handle) -> str:
    """Why none of an engine's requests can overlap, as far as it stands beforehand; '' if nothing speaks against it."""
    if not autoencoders(pipeline):
        return "the pipeline has no autoencoder, whose decode another request could overlap"
    if handle.offloading is not None:
        return "weights are offloaded, and components take turns on the device"
    if handle.cuts_decodes:
        return "the samples of a decode are cut between replicas, over the exchanges of the denoiser; use vae='sharded'"
    modules = [(name, part) for name, part in components_of(pipeline).items() if isinstance(part, nn.Module)]
    cached = next((name for name, part in modules if getattr(part, "is_cache_enabled", False)), None)
    if cached is not None:
        return f"diffusers' own cache is on {cached}, and a call that ends makes it start anew; use Config(cache=...)"
    return ""


class Watch:
    """One request that overlaps nothing, from its begin to its end. Local."""

    def __init__(self, pipeline: Any, device: torch.device, generators: Sequence[torch.Generator]):
        """`generators`: those that the call was given, which other calls may have too."""
        self._pipeline, self._device, self._generators = pipeline, device, generators
        self._noise = self._states()
        self._drawn = False
        self._since: list[Callable[[], str]] = []
        """What tells of a change since the first decode."""
        self._called: list[str] = []
        self._decodes = False

    def decodes(self) -> None:
        """A decode begins, outside of the user's callbacks."""
        if self._decodes:
            return
        self._decodes, own = True, len(self._generators)
        self._drawn = not all(map(torch.equal, self._noise[own:], self._states()[own:]))
        vaes = [id(module) for _, module in autoencoders(self._pipeline)]
        parts = {name: part for name, part in components_of(self._pipeline).items() if id(part) not in vaes}
        for name, part in parts.items():
            self._since.append(_changes(name, part))
        values = dict(vars(self._pipeline))
        self._since.append(
            lambda: next((name for name, x in vars(self._pipeline).items() if not _same(x, values, name)), "")
        )
        self._noise = self._states()

    def calls(self, name: str) -> None:
        """A denoiser or a text encoder is called."""
        if self._decodes:
            self._called.append(name)

    def refusal(self) -> str:
        """Why the next ones like it cannot overlap; '' where they can."""
        if not self._decodes:
            return "the request had no decode"
        if self._called:
            return f"the pipeline calls {self._called[0]} after its first decode"
        if self._drawn:
            return "denoising draws noise that comes from no seed; what ranks drew would depend on time"
        if not all(map(torch.equal, self._noise, self._states())):
            return "decoding draws noise that comes from no seed of its own; what ranks drew would depend on time"
        changed = next(filter(None, (told() for told in self._since)), "")
        return f"the pipeline changes {changed} after its first decode" if changed else ""

    def _states(self) -> list[Tensor]:
        """Of the generators that were given, then of the process's own."""
        found = [one.get_state() for one in (*self._generators, torch.default_generator)]
        if self._device.type == "cuda":
            found.append(torch.cuda.default_generators[self._device.index or 0].get_state())
        return found


def _changes(name: str, part: Any) -> Callable[[], str]:
    """Tells the component's name, once something in it is another."""
    if isinstance(part, nn.Module):
        held = Held(part)
        return lambda: "" if held.is_same() else name
    values = dict(vars(part)) if hasattr(part, "__dict__") else {}
    return lambda: "" if all(_same(x, values, key) for key, x in getattr(part, "__dict__", {}).items()) else name


def _same(x: Any, before: dict[str, Any], key: str) -> bool:
    """An attribute that was there; numbers and texts by value."""
    if key not in before:
        return False
    plain = (bool, int, float, str, type(None))
    return x is before[key] or (isinstance(x, plain) and type(x) is type(before[key]) and x == before[key])


def watched_modules(pipeline: Any) -> list[tuple[str, nn.Module]]:
    """What a request must not call any more, once another denoises."""
    parts, encoders = weighty(pipeline)
    return [*parts, *encoders]
