"""What a case of the zoo of autoencoders is: a class, a tiny configuration, sizes, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """An autoencoder, small enough that a decode takes well below a second on one core."""

    name: str
    """The class, as diffusers exports it; several cases of one class have a suffix after `:`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    latents: tuple[int, ...] = ()
    """Shape of one sample's latents, without the batch. Empty: there is no `decode`."""
    odd: tuple[int, ...] = ()
    """The same with sizes that no number of ranks divides."""
    picture: tuple[int, ...] = ()
    """Shape of one sample for `encode`, without the batch. Empty: there is no `encode`."""
    odd_picture: tuple[int, ...] = ()
    decode: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords of `decode`."""
    encode: Mapping[str, Any] = field(default_factory=dict)
    frames: bool = False
    """Frames of a video lie in the batch, and `decode` is told how many."""
    sliced: bool = False
    """Takes several samples one by one only (`enable_slicing`)."""
    always_tiled: bool = False
    """Has no undivided decode."""
    draws: bool = False
    """`decode` draws noise, from a generator that it is given."""
    tiles: Mapping[str, Any] | None = None
    """Attributes that make tiles so small that the latents have several. None: no tiling that is known."""
    dim: int = -2
    """The dim of latents and picture that is cut into shards: height, or time of audio."""
    unbuilt: str = ""
    """Why it cannot be built or called as an autoencoder."""
    source: str = "diffusers, tests of the class"

    @property
    def cls(self) -> str:
        return self.name.split(":")[0]


def build(case: Case, seed: int = 0) -> Any:
    """The module with random weights, fp32, in eval mode.

    No weight is left at one or zero, so that a norm's scale, a bias and a residual that starts at zero all count."""
    from diffusers.models import autoencoders

    torch.manual_seed(seed)
    module: Any = getattr(autoencoders, case.cls)(**case.config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            few = parameter.dim() < 2 or not bool(parameter.any())
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.1 if few else 0.01))
    module = module.eval().requires_grad_(False)
    if case.sliced:
        module.enable_slicing()
    return tile(case, module) if case.always_tiled else module


def latents(case: Case, *, batch: int = 2, odd: bool = False, seed: int = 3) -> Tensor:
    return torch.randn(batch, *(case.odd if odd else case.latents), generator=torch.Generator().manual_seed(seed))


def picture(case: Case, *, batch: int = 2, odd: bool = False, seed: int = 4) -> Tensor:
    shape = case.odd_picture if odd else case.picture
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def decode(case: Case, module: Any, latents: Tensor) -> Tensor:
    """What `decode` gives, as one tensor."""
    more = dict(case.decode)
    if case.frames:
        more["num_frames"] = latents.shape[0]
    if case.draws:
        more["generator"] = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return tensor_of(module.decode(latents, **more))


def encode(case: Case, module: Any, picture: Tensor) -> Tensor:
    """What `encode` gives, as one tensor; of a distribution all its parameters."""
    with torch.no_grad():
        return tensor_of(module.encode(picture, **case.encode))


def tensor_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    for name in ("latent_dist", "sample", "latent", "latents"):
        if (value := getattr(result, name, None)) is not None and not callable(value):
            return tensor_of(value)
    if hasattr(result, "parameters"):
        return result.parameters
    if hasattr(result, "mean"):
        return torch.cat([result.mean, getattr(result, "scale", getattr(result, "logs", result.mean))], dim=1)
    return tensor_of(result[0])


def tile(case: Case, module: Any) -> Any:
    """Tiling on, with the small tiles of the case."""
    if case.tiles is None:
        raise ValueError(f"{case.name} has no tiling")
    module.enable_tiling()
    for name, value in case.tiles.items():
        if not hasattr(module, name):
            raise ValueError(f"{case.name} has no {name}")
        setattr(module, name, value)
    return module
