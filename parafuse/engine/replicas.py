"""Data parallel: the pictures of one call, spread over replicas, each with the noise one GPU would have drawn for it.

The call of a replica has one prompt for each of its pictures. A single generator draws the noise of the whole batch on
every replica, which takes its rows, at the start and at every stochastic step; a list of generators is cut as prompts
are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parafuse.errors import ConfigError
from parafuse.parallel.hooks import Forward, override, override_forward
from parafuse.parallel.layout import head_range

PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
PICTURES = ("image", "mask_image", "masked_image_latents", "control_image", "video", "last_image", "audio")
"""Arguments that come once for each prompt where they are lists, or tensors, of as many."""


@dataclass(frozen=True)
class Share:
    """What one replica computes of a call."""

    call: dict[str, Any]
    first: int
    last: int
    total: int
    """Pictures [first, last) of so many."""
    prompts: int
    has_pictures: bool
    """Whether a picture is given for each prompt; otherwise one may serve all."""

    @property
    def count(self) -> int:
        return self.last - self.first

    @property
    def chosen(self) -> list[int]:
        """The prompt of each picture."""
        return [index // (self.total // self.prompts) for index in range(self.first, self.last)]

    @property
    def is_idle(self) -> bool:
        return self.first == self.last


def share_of(call: dict[str, Any], degree: int, replica: int) -> Share:
    """The part of a checked call that is one replica's. Raises ConfigError for lengths that do not fit each other."""
    prompts = _num_prompts(call)
    name, each = next(((name, call[name]) for name in PER_PROMPT if call.get(name)), ("", 1))
    total = prompts * each
    first, last = head_range(total, degree, replica)
    own = {key: _rows_of(key, value, prompts, total, first, last) for key, value in call.items()}
    if name:
        own[name] = 1
    if isinstance(own.get("prompt"), str) and last - first > 1:
        own["prompt"] = [own["prompt"]] * (last - first)
        own = {key: _texts(key, value, last - first) for key, value in own.items()}
    given = [call.get(key) for key in PICTURES]
    has_pictures = any(isinstance(value, (list, Tensor)) and len(value) == prompts for value in given)
    return Share(own, first, last, total, prompts, has_pictures)


def _texts(name: str, value: Any, count: int) -> Any:
    """Pipelines want the negative prompts in the form of the prompts."""
    return [value] * count if "prompt" in name and isinstance(value, str) else value


def _num_prompts(call: dict[str, Any]) -> int:
    for name in ("prompt", "prompt_embeds", "negative_prompt_embeds", "image", "batch_size"):
        value = call.get(name)
        if isinstance(value, (list, Tensor)):
            return len(cast("list[Any]", value))
        if isinstance(value, int):
            return value
        if isinstance(value, str):
            return 1
    return 1


def _rows_of(name: str, value: Any, prompts: int, total: int, first: int, last: int) -> Any:
    """The rows of one argument for pictures [first, last); what is not by picture or prompt stays as it is."""
    if not isinstance(value, (list, Tensor)) or not ("prompt" in name or name in (*PICTURES, "latents", "generator")):
        return value
    rows = cast("list[Any]", value)
    if len(rows) == total and (name in ("latents", "generator") or prompts == total):
        return rows[first:last]
    if len(rows) == prompts:
        each = total // prompts
        chosen = [index // each for index in range(first, last)]
        return value[chosen] if isinstance(value, Tensor) else [rows[index] for index in chosen]
    if len(rows) == 1 or name in PICTURES:
        return value
    raise ConfigError(f"{name}: {len(rows)} given for {prompts} prompts and {total} pictures.")


class SharedNoise(TorchFunctionMode):
    """Draws from `generator` give the rows of this replica out of the whole batch's noise."""

    def __init__(self, generator: torch.Generator, share: Share):
        super().__init__()
        self.generator, self.share = generator, share
        self._encoded: list[torch.Size] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Not on the way of every function, as inside of the denoiser, which draws no noise."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn or kwargs.get("generator") is not self.generator:
            return func(*args, **kwargs)
        sizes = tuple(kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args))
        share, rest = self.share, {key: value for key, value in kwargs.items() if key != "size"}
        if sizes in self._encoded:  # of pictures that were given: one for all, or one for each prompt
            self._encoded.remove(torch.Size(sizes))
            if not share.has_pictures or sizes[0] != share.count:
                return func(*args, **kwargs)
            return func((share.prompts, *sizes[1:]), **rest)[share.chosen]
        if not sizes or sizes[0] != share.count:
            return func(*args, **kwargs)
        return func((share.total, *sizes[1:]), **rest)[share.first : share.last].clone()

    def encoding(self, original: Forward) -> Forward:
        """For a VAE's `encode`: the next draw of its latents' shape is for these."""

        def encode(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            mean = getattr(getattr(result, "latent_dist", None), "mean", None)
            if mean is not None:
                self._encoded.append(mean.shape)
            return result

        return encode


@contextmanager
def shared_noise(share: Share, denoisers: Iterable[nn.Module], vae: Any) -> Iterator[None]:
    """While a replica's call runs: noise of a single generator is that of the whole batch."""
    generator = share.call.get("generator")
    if not isinstance(generator, torch.Generator) or share.count == share.total:
        yield
        return
    mode = SharedNoise(generator, share)

    def pausing(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with mode.paused():
                return original(*args, **kwargs)

        return forward

    with ExitStack() as stack, mode:
        for module in denoisers:
            stack.callback(override_forward(module, pausing))
        if vae is not None:
            stack.callback(override(vae, "encode", mode.encoding(vae.encode)))
        yield


def merged(outputs: Iterable[Any]) -> Any:
    """One output from those of the replicas, in order: lists and tuples of results, arrays and tensors joined."""
    parts = list(outputs)
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        fields = [field.name for field in dataclasses.fields(first)]
        return type(first)(**{name: merged(getattr(part, name) for part in parts) for name in fields})
    if isinstance(first, tuple):
        return tuple(merged(column) for column in zip(*parts, strict=True))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else first
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    return first
