"""The sparse attentions that can be asked for: frozen, torch-free. Lossy: queries of a video see a part of its keys.

Tokens of a video are taken in tiles, boxes of frames x rows x columns. A pattern says which tiles see which; all other
tokens (text, sound) see everything and are seen by everything.
"""

# Users pass what they like, so types are checked at run time too.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from parafuse.errors import ConfigError
from parafuse.spelled import Spelled, chosen

AUTO = "auto"
TILE_TOKENS = 128
"""Tokens of a whole tile: the rows of one block of a GPU's kernel."""
Shape = tuple[int, int, int]
"""Frames, rows, columns."""


@dataclass(frozen=True)
class Sparse(Spelled):
    """What all of them have in common."""

    what: ClassVar[str] = "sparse"
    needs_content: ClassVar[bool] = False
    """Whether what is seen depends on queries and keys, so that it is chosen anew in every call."""

    tile: str = dataclasses.field(default=AUTO, kw_only=True)
    """Frames x rows x columns of a tile, in tokens: 4x8x4. Those at the ends of a video may be smaller. auto: 4x8x4,
    and where a video has fewer frames (or rows, or columns) as many more of the others."""
    grid: str = dataclasses.field(default=AUTO, kw_only=True)
    """Frames x rows x columns of the video's tokens: 21x45x80. auto: it is found out from a call of the model."""
    dense_steps: int = dataclasses.field(default=4, kw_only=True)
    """Steps at the start that see everything."""
    dense_layers: int = dataclasses.field(default=1, kw_only=True)
    """Attention layers at the start of the model that see everything, in every step."""

    def __post_init__(self) -> None:
        for name in ("tile", "grid"):
            given = getattr(self, name)
            if isinstance(given, (tuple, list)):
                object.__setattr__(self, name, "x".join(map(str, cast("tuple[Any, ...]", given))))
            self._shape(name)
        self._check("dense_steps", least=0)
        self._check("dense_layers", least=0)

    @property
    def tile_shape(self) -> Shape | None:
        """Of a tile; None: it goes by the grid (`tile_for`)."""
        return self._shape("tile")

    @property
    def grid_shape(self) -> Shape | None:
        """Of the video's tokens; None: it is found out."""
        return self._shape("grid")

    def _shape(self, name: str) -> Shape | None:
        text = getattr(self, name)
        if text == AUTO:
            return None
        parts = text.split("x") if isinstance(text, str) else []
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
            example = "4x8x4" if name == "tile" else "21x45x80"
            raise ConfigError(
                f"{self._named(name)}: must be frames x rows x columns in tokens, as {example}, or {AUTO}."
            )
        frames, rows, columns = map(int, parts)
        return frames, rows, columns

    def _check_share(self, name: str) -> None:
        """Raises ConfigError for a field that is no number above 0 and up to 1."""
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= 1:
            raise ConfigError(f"{self._named(name)}: must be a number above 0 and up to 1.")


@dataclass(frozen=True)
class Window(Sparse):
    """Each token sees what is at most so far from it in the video. Whole tiles: it sees a little more."""

    method: ClassVar[str] = "window"

    frames: int = 2
    """Frames before and after."""
    rows: int = 8
    """Rows of tokens above and below."""
    columns: int = 8
    """Columns of tokens to both sides."""
    sink_frames: int = dataclasses.field(default=0, kw_only=True)
    """First frames that every token sees, of a video that has more of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frames", "rows", "columns", "sink_frames"):
            self._check(name, least=0)


@dataclass(frozen=True)
class Radial(Sparse):
    """Each token sees less of a frame the further that is in time (after Radial Attention, Li et al. 2025,
    arXiv:2506.19852, whose bands are of the flattened frame; here they are of rows and of columns)."""

    method: ClassVar[str] = "radial"

    reach: float = 0.5
    """Of a frame's rows and columns: how far a token sees to all sides in its own and the next frames. 1 sees all of
    these."""
    decay: float = dataclasses.field(default=1.0, kw_only=True)
    """The reach is divided by 2**decay each time the distance in frames doubles: 2, 4, 8..."""
    sink_frames: int = dataclasses.field(default=1, kw_only=True)
    """First frames that every token sees, of a video that has more of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("reach")
        self._check("decay", least=0, whole=False)
        self._check("sink_frames", least=0)


@dataclass(frozen=True)
class Content(Sparse):
    """Each tile sees the tiles that matter most to it, by the means of queries and keys in tiles, head by head."""

    method: ClassVar[str] = "content"
    needs_content: ClassVar[bool] = True

    mass: float = 0.9
    """The fewest tiles of keys are taken whose weights, as the means give them, add up to so much."""
    least: float = dataclasses.field(default=0.1, kw_only=True)
    """Part of the tiles of keys that is taken in any case: means are surer of themselves than attention is."""
    keep: float | None = dataclasses.field(default=None, kw_only=True)
    """Instead of a mass: this part of the tiles of keys, equally many for every tile of queries; none goes by mass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("mass")
        self._check_share("least")
        if self.keep is not None:
            self._check_share("keep")


METHODS: dict[str, type[Sparse]] = {one.method: one for one in (Window, Radial, Content)}
ALLOWED = "a text such as 'radial:0.5', a parafuse.Radial or another method, or None"


def sparse_of(value: Any) -> Sparse | None:
    """The sparse attention that a text names, or the value itself. Raises ConfigError with what is allowed."""
    return None if value is None else chosen("sparse", value, METHODS, ALLOWED)


def tile_for(grid: Shape) -> Shape:
    """What `tile=auto` stands for: 4x8x4 of at most the grid's size, doubled along columns and rows (then frames) in
    turn while that makes it no larger than 128 tokens and the grid has more."""
    tile = [min(size, limit) for size, limit in zip((4, 8, 4), grid, strict=True)]
    grows = True
    while grows:
        grows = False
        for dim in sorted((2, 1, 0), key=lambda d: (d == 0, tile[d])):
            larger = [min(2 * size, grid[d]) if d == dim else size for d, size in enumerate(tile)]
            if larger != tile and math.prod(larger) <= TILE_TOKENS:
                tile, grows = larger, True
                break
    return tile[0], tile[1], tile[2]
