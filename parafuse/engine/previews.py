"""Pictures of latents without an autoencoder: a linear map from latent channels to colours, fitted as requests end.

The final latents of a request and its picture are pairs of what goes in and what is to come out, one for each place of
the latents. A least-squares fit over them takes milliseconds, and is all that a preview needs. Half way through, they
are mostly noise: where the scheduler follows dx/dsigma, what the noise hides is extrapolated from two steps,
    x0 = x' - sigma' * (x' - x) / (sigma' - sigma),
which is exact for a denoiser that says the same from there on.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parafuse.log import note

SHORTEST, LONGEST = 64, 512
"""Pixels of a preview's sides."""
MAX_PLACES = 16_384
"""Of one request that go into a fit."""
MAX_FINENESS = 4
"""Pixels of a preview along each side of one place."""
FINEST = 4
"""Pixels of the picture along each side that a preview's pixel stands for at least."""
FORGET = 0.8
"""What earlier requests count for in a fit, against the one after them."""
ENOUGH = 64
"""Requests after which a fit stays as it is."""
RIDGE = 1e-4
"""Of the mean square of a channel: few places with many channels are not fitted to the letter."""
MOST_ASPECT_ERROR = 0.1
"""How far the sides of packed latents may be from the picture's proportions."""

Picture = Image.Image | Sequence[Image.Image]
"""A picture, or the frames of a video."""


@dataclass(frozen=True)
class Shape:
    """How latents lie: places in rows and columns, of how many channels."""

    kind: str
    """packed, spatial, or video."""
    height: int
    width: int
    channels: int


@dataclass
class _Map:
    """The running fit for one number of channels."""

    fineness: int
    gram: Tensor
    """(C + 1, C + 1)."""
    target: Tensor
    """(C + 1, 3 * fineness^2)."""
    matrix: Tensor | None = None
    learned: int = 0
    """Requests."""

    def solved(self) -> Tensor:
        found = self.matrix
        if found is None:
            scale = self.gram.diagonal().mean().clamp(min=1e-12)
            ridge = RIDGE * scale * torch.eye(len(self.gram), dtype=self.gram.dtype)
            found = self.matrix = cast("Tensor", torch.linalg.solve(self.gram + ridge, self.target))
        return found


@dataclass
class Previews:
    """Of one engine, on the rank that shows them. Local: give it values that are there."""

    latent_channels: int | None = None
    """Of the autoencoder: tells channels from frames in latents of videos."""
    _maps: dict[tuple[str, int], _Map] = field(default_factory=dict[tuple[str, int], _Map])
    """By kind of latents and channels."""
    _cells: dict[tuple[str, int], float] = field(default_factory=dict[tuple[str, int], float])
    """Pixels of the picture that a place covers along a side."""
    _said: set[str] = field(default_factory=set[str])

    def learn(self, latents_B: Tensor, pictures: Sequence[Picture]) -> None:
        """Takes the final latents of a request and what it has painted; of videos the middle frames. What cannot be
        paired is said once, and left."""
        frames = [_middle(one) for one in pictures]
        if not frames or len(latents_B) != len(frames):
            self._say("count", f"{len(latents_B)} latents for {len(frames)} pictures")
            return
        shape = self._shape(latents_B, frames[0].size)
        if shape is None:
            self._say("shape", f"latents {tuple(latents_B.shape)} do not lie as their {frames[0].size} pictures")
            return
        cell = frames[0].height / shape.height
        self._cells[shape.kind, shape.channels] = cell
        found = self._maps.get((shape.kind, shape.channels))
        if found is None:
            fineness = min(MAX_FINENESS, max(1, int(cell) // FINEST))
            rows = shape.channels + 1
            found = _Map(fineness, torch.zeros(rows, rows).double(), torch.zeros(rows, 3 * fineness**2).double())
            self._maps[shape.kind, shape.channels] = found
        if found.learned >= ENOUGH:
            return
        found.learned += 1
        found.gram *= FORGET
        found.target *= FORGET
        for number, frame in enumerate(frames):
            x_NC = _with_one(self._places(latents_B[number : number + 1], shape))
            y_N3 = _targets(frame, shape, found.fineness)
            few = torch.linspace(0, len(x_NC) - 1, min(len(x_NC), MAX_PLACES)).long()
            found.gram += x_NC[few].T @ x_NC[few] / len(few)
            found.target += x_NC[few].T @ y_N3[few] / len(few)
        found.matrix = None

    def show(self, latents_B: Tensor, size: tuple[int, int] | None) -> list[bytes]:
        """A PNG for each sample; empty where nothing fits. `size`: width and height of what is being painted; None:
        that of the model, of which an earlier request has told."""
        shape = self._shape(latents_B, size)
        found = None if shape is None else self._maps.get((shape.kind, shape.channels))
        if shape is None or found is None:
            self._say("unknown", f"nothing is known yet of latents {tuple(latents_B.shape)}")
            return []
        matrix = found.solved()
        return [
            _png(self._painted(latents_B[number : number + 1], shape, matrix, found.fineness))
            for number in range(len(latents_B))
        ]

    def _painted(self, latents: Tensor, shape: Shape, matrix: Tensor, fineness: int) -> Image.Image:
        y_N3 = _with_one(self._places(latents, shape)) @ matrix
        tiles = y_N3.reshape(shape.height, shape.width, fineness, fineness, 3).permute(0, 2, 1, 3, 4)
        pixels = tiles.reshape(shape.height * fineness, shape.width * fineness, 3).clamp(0, 1)
        return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())

    def _places(self, latents: Tensor, shape: Shape) -> Tensor:
        """(places, channels) of one sample, in rows; of a video the middle frame's."""
        x = latents[0].detach().to("cpu", torch.float64)
        if shape.kind == "packed":
            return x
        if shape.kind == "video":
            dim = 0 if self._channels_first(latents) else 1
            x = x.movedim(dim, 0)[:, x.shape[1 - dim] // 2]
        return x.reshape(shape.channels, -1).T

    def _channels_first(self, latents: Tensor) -> bool:
        """(B, C, F, H, W), not (B, F, C, H, W)."""
        return self.latent_channels is None or latents.shape[1] == self.latent_channels

    def _shape(self, latents: Tensor, size: tuple[int, int] | None) -> Shape | None:
        """How latents of a picture of (width, height) lie; None where they do not."""
        if latents.ndim == 4:
            _, channels, height, width = latents.shape
            return Shape("spatial", height, width, channels) if _fits(height, width, size) else None
        if latents.ndim == 5:
            channels = latents.shape[1 if self._channels_first(latents) else 2]
            height, width = latents.shape[-2:]
            return Shape("video", height, width, channels) if _fits(height, width, size) else None
        if latents.ndim != 3:
            return None
        _, places, channels = latents.shape
        sides = _sides(places, size, self._cells.get(("packed", channels)))
        return None if sides is None else Shape("packed", *sides, channels)

    def _say(self, kind: str, why: str) -> None:
        """Once of a kind."""
        if kind not in self._said:
            self._said.add(kind)
            note(f"a request had no previews: {why}")


def clean(before: Tensor, after: Tensor, scheduler: Any) -> Tensor:
    """What the picture's latents will be, by the step that led from `before` to `after`; `after` where the scheduler's
    latents do not follow a derivative by sigma. Local."""
    sigmas = _sigmas(scheduler)
    if sigmas is None:
        return after
    sigma, next_sigma = sigmas
    if not math.isfinite(next_sigma) or sigma == next_sigma:
        return after
    slope = (after.float() - before.float()) / (next_sigma - sigma)
    return after.float() - next_sigma * slope


def _sigmas(scheduler: Any) -> tuple[float, float] | None:
    """Of the last step's begin and end, where latents are x0 + sigma * noise (Euler's and its like) or on the line
    between both (flow matching)."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None or not isinstance(index, int) or not 0 < index < len(sigmas):
        return None
    if "Ancestral" in type(scheduler).__name__:
        return None  # new noise in each step
    is_flow = float(max(sigmas)) <= 1.0
    is_scaled = float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1.0
    return (float(sigmas[index - 1]), float(sigmas[index])) if is_flow or is_scaled else None


def _fits(height: int, width: int, size: tuple[int, int] | None) -> bool:
    return size is None or abs(math.log((width / height) / (size[0] / size[1]))) <= MOST_ASPECT_ERROR


def _sides(places: int, size: tuple[int, int] | None, cell: float | None) -> tuple[int, int] | None:
    """(rows, columns) of packed places: those of the picture's proportions; without its size, as a square."""
    if size is not None and cell:
        height, width = round(size[1] / cell), round(size[0] / cell)
        if height * width == places:
            return height, width
    aspect = 1.0 if size is None else size[0] / size[1]
    rows = [rows for rows in range(1, places + 1) if places % rows == 0]
    if not rows:
        return None
    best = min(rows, key=lambda one: abs(math.log(places / one / one / aspect)))
    return (best, places // best) if _fits(best, places // best, size or (1, 1)) else None


def _middle(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else picture[len(picture) // 2]


def _with_one(x_NC: Tensor) -> Tensor:
    return torch.cat([x_NC, torch.ones(len(x_NC), 1, dtype=x_NC.dtype)], dim=1)


def _targets(frame: Image.Image, shape: Shape, fineness: int) -> Tensor:
    """(places, 3 * fineness^2): each place's colours."""
    size = (shape.width * fineness, shape.height * fineness)
    pixels = np.asarray(frame.convert("RGB").resize(size, Image.Resampling.BOX), dtype=np.float64) / 255
    tiles = torch.from_numpy(pixels).reshape(shape.height, fineness, shape.width, fineness, 3).permute(0, 2, 1, 3, 4)
    return tiles.reshape(shape.height * shape.width, -1)


def _png(image: Image.Image) -> bytes:
    short, long = min(image.size), max(image.size)
    scale = min(max(1.0, SHORTEST / short), LONGEST / long) if long > LONGEST else max(1.0, SHORTEST / short)
    if long * scale > LONGEST:
        scale = LONGEST / long
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, format="PNG")
    return out.getvalue()
