"""Which tiles of queries see which tiles of keys: by place in the video, or by what queries and keys are.

Legend: B batch, H heads, D head size, Tq and Tk tiles of queries and keys. `chosen` is (B or 1, H or 1, Tq, Tk) bool.
Tiles that are no video's see all and are seen by all; so do videos of different grids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from parafuse.errors import UnsupportedError
from parafuse.kernels.tiles import Tiles
from parafuse.sparse import Content, Radial, Sparse, Window


def choose(
    sparse: Sparse,
    queries: Tiles,
    keys: Tiles,
    q_means: Tensor | None = None,
    k_means: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`chosen` of a method, on the device of the tiles. `q_means` (B, H, Tq, D) and `k_means` (B, H, Tk, D), fp32, and
    the attention's scale are for methods that need the content alone."""
    if isinstance(sparse, Window):
        box = (sparse.frames, sparse.rows, sparse.columns)
        return window(queries, keys, box, sink_frames=sparse.sink_frames)
    if isinstance(sparse, Radial):
        return radial(queries, keys, sparse.reach, decay=sparse.decay, sink_frames=sparse.sink_frames)
    if not isinstance(sparse, Content) or q_means is None or k_means is None:
        raise UnsupportedError(f"sparse attention {sparse}: needs the means of queries and keys")
    return content(queries, keys, q_means, k_means, mass=sparse.mass, least=sparse.least, keep=sparse.keep, scale=scale)


def window(queries: Tiles, keys: Tiles, reach: tuple[int, int, int], *, sink_frames: int = 0) -> Tensor:
    """Tiles that have two tokens at most `reach` frames, rows and columns from each other. (1, 1, Tq, Tk)."""
    distance = _distances(queries, keys)
    near = (distance <= torch.tensor(reach, device=distance.device)).all(dim=-1)
    return _completed(near | _sinks(keys, sink_frames), queries, keys)


def radial(queries: Tiles, keys: Tiles, reach: float, *, decay: float = 1.0, sink_frames: int = 1) -> Tensor:
    """Tiles at most `reach / 2**(decay * octave)` of the frame's rows and columns apart, where the octave is that of
    the distance in frames: 0 for 0 and 1, 1 for 2 and 3, 2 for 4 to 7... (1, 1, Tq, Tk)."""
    distance = _distances(queries, keys)
    octave = torch.log2(distance[..., 0].clamp_min(1).double()).floor()
    sizes = torch.tensor([grid[1:] for grid in keys.grids] or [(1, 1)], device=distance.device)
    extent = sizes[keys.video.clamp_min(0)]  # (Tk, 2): rows and columns of a frame
    limit = reach * extent * torch.exp2(-decay * octave).unsqueeze(-1)
    near = (distance[..., 1:] <= limit).all(dim=-1)
    return _completed(near | _sinks(keys, sink_frames), queries, keys)


def content(
    queries: Tiles,
    keys: Tiles,
    q_means: Tensor,
    k_means: Tensor,
    *,
    mass: float = 0.9,
    least: float = 0.0,
    keep: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """For each head and tile of queries the fewest tiles of the video's keys that have `mass` of the attention, and are
    at least the part `least` of their number; or the part `keep` of it. (B, H, Tq, Tk).

    A tile of n keys weighs n * exp(scale * mean query * mean key), as if all its tokens were the mean. Of equal weights
    the first tile comes first. A tile's own tokens are always seen. After SpargeAttention, Zhang et al. 2025,
    arXiv:2502.18137, without its test of similarity inside of a tile."""
    scale = float(q_means.shape[-1] ** -0.5) if scale is None else scale
    is_video = keys.video >= 0
    logits = q_means.float() @ k_means.float().transpose(-1, -2) * scale + keys.sizes.float().log()
    weights = torch.softmax(logits.masked_fill(~is_video, -math.inf), dim=-1).nan_to_num(0.0)
    ordered, place = torch.sort(weights, dim=-1, descending=True, stable=True)
    count = ((least if keep is None else keep) * is_video.sum()).ceil()
    taken = torch.arange(len(is_video), device=count.device).expand_as(ordered) < count
    if keep is None:
        taken |= ordered.cumsum(dim=-1) - ordered < mass
    chosen = torch.zeros_like(taken).scatter_(-1, place, taken)
    own = (_distances(queries, keys) == 0).all(dim=-1)
    return _completed(chosen | own, queries, keys)


def tile_sums(x: Tensor, tiles: Tensor, num_tiles: int) -> Tensor:
    """(B, H, T, D) fp64: what the rows of x (B, H, S, D) in each tile add up to. `tiles` (S,): of each, in any order.

    Ranks that have parts of the rows add theirs up; divided by `Tiles.sizes` and rounded to fp32 these are the means of
    one rank, whatever the number of ranks. Rows are added in their order. Asks the device nothing."""
    batch, heads, rows, width = x.shape
    ordered, order = torch.sort(tiles, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_tiles, device=x.device))
    sample = torch.arange(batch, device=x.device).unsqueeze(-1) * rows
    places, starts = (sample + order).flatten(), (sample + starts).flatten()
    out = x.new_zeros((heads, batch * num_tiles, width), dtype=torch.float64)
    for head in range(heads if rows else 0):  # one at a time: a copy of all in fp64 would take much memory
        table = x[:, head].reshape(-1, width).double()
        out[head] = F.embedding_bag(places, table, starts, mode="sum")
    return out.unflatten(1, (batch, num_tiles)).transpose(0, 1)


def density(chosen: Tensor, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    """(B or 1, H or 1) fp64: pairs of a query and a key that are attended, over all pairs."""
    seen = (chosen.double() @ k_sizes.double()) @ q_sizes.double()
    return seen / (q_sizes.sum() * k_sizes.sum())


def seen_by(chosen: Tensor, q_tiles: Tensor) -> Tensor:
    """(Tk,) bool: tiles of keys that some of these queries see, in any sample and head. `q_tiles` (S,): of each."""
    asking = torch.zeros(chosen.shape[2], dtype=torch.bool, device=chosen.device)
    asking[q_tiles] = True
    return (chosen & asking.unsqueeze(-1)).any(dim=2).flatten(0, 1).any(dim=0)


def _distances(queries: Tiles, keys: Tiles) -> Tensor:
    """(Tq, Tk, 3): the least distance of two of their tokens in frames, rows and columns; 0 where boxes overlap."""
    after = queries.first.unsqueeze(1) - keys.last
    before = keys.first - queries.last.unsqueeze(1)
    return torch.maximum(after, before).clamp_min(0)


def _sinks(keys: Tiles, frames: int) -> Tensor:
    """(Tk,): tiles with a token of the first frames, of videos that have more of them."""
    longer = torch.tensor([grid[0] > frames for grid in keys.grids] or [False], device=keys.first.device)
    return (keys.first[:, 0] < frames) & longer[keys.video.clamp_min(0)]


def _completed(near: Tensor, queries: Tiles, keys: Tiles) -> Tensor:
    """With the pairs that are not of one video, or of two alike; at least (1, 1, Tq, Tk)."""
    number = {grid: i for i, grid in enumerate(keys.grids)}
    same = torch.tensor([number.get(grid, -2) for grid in queries.grids] or [-2], device=near.device)
    of_query = same[queries.video.clamp_min(0)].where(queries.video >= 0, -2)
    alike = of_query.unsqueeze(-1) == keys.video
    out = near | ~alike
    return out[(None,) * (4 - out.ndim)]
