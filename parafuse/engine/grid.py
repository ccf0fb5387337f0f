"""Which stream of a denoiser is a video, and its grid of frames, rows and columns: found out from one real call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

Grid = tuple[int, int, int]
"""Frames, rows, columns."""


@dataclass(frozen=True)
class VideoStream:
    """Where the tokens of a video enter the blocks. Frames may be 1: a picture."""

    grid: Grid
    """Of its tokens, row-major in their order."""
    block: nn.Module
    """The first block that is given them."""
    leaf: int
    """Of that block's arguments, flattened as (args, kwargs): the one that has them."""
    name: str
    """Of that argument, as messages say it: argument 'hidden_states', argument 0."""
    dims: tuple[int, ...]
    """Of that argument, which count tokens: (1,) of (B, S, D); (1, 2, 3) of (B, F, R, C, D), which are taken row-major."""
    first: int
    """The first token of the video in it; those before it are something else."""
    total: int
    """Tokens in it; those from `first` + the grid's product on are something else too."""
    source: str
    """What it was found from: argument 'hidden_states', dims 2, 3 and 4."""

    @property
    def length(self) -> int:
        """Tokens of the video."""
        frames, rows, columns = self.grid
        return frames * rows * columns


def video_stream(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Grid | None = None
) -> VideoStream:
    """The video among what the model's first block is given in a call with these arguments.

    Runs the model up to its blocks, some dozens of times, as its classes have it: local, nothing is exchanged, and
    nothing is left behind. `grid`: given by the user; then only the stream is found, which must have as many tokens.
    Raises UnsupportedError with what was seen where it cannot be told."""
    raise NotImplementedError
