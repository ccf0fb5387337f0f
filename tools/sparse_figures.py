"""The figures of docs/notes/sparse.md: what block-sparse attention costs on a CPU, and what it changes of attention.

`python tools/sparse_figures.py speed`: the CPU's backend against dense attention over densities, on one thread, in
turns, medians of CPU time. `error`: on queries, keys and values of tiny video models with random weights, and of emoji,
which is trained. `tiles`: densities and errors that shapes of tiles give.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parafuse
from parafuse.kernels.attention import Call, attention_math
from parafuse.kernels.block_sparse import block_sparse_attention
from parafuse.kernels.patterns import choose, density, tile_sums
from parafuse.kernels.tiles import Segment, Tiles, tiles_of
from parafuse.parallel.attention_mode import AttentionMode
from parafuse.sparse import Shape, Sparse, sparse_of

SPEED_GRIDS: dict[Shape, int] = {(9, 16, 16): 9, (13, 24, 32): 3}
"""Grid -> rounds."""
TEXT, HEADS, SIZE = 77, 4, 64
SPEED = (
    "window:2,16,16", "window:1,8,8", "window:0,8,4", "window:0,0,0", "content:keep=0.5", "content:keep=0.25",
    "content:keep=0.1", "window:0,8,4,tile=4x16x8", "content:keep=0.25,tile=4x16x8",
)  # fmt: skip
ERROR = (
    "window:4,8,8", "window:2,4,4", "window:1,2,2", "radial:0.5", "radial:0.25", "radial:0.25,decay=0.5", "radial:0.1",
    "content:0.95", "content:0.9", "content:0.7", "content:0.9,least=0.25", "content:0.7,least=0.25",
    "content:keep=0.5", "content:keep=0.25", "content:keep=0.1",
)  # fmt: skip
Attended = tuple[Tensor, Tensor, Tensor, Call]


def named(text: str) -> Sparse:
    sparse = sparse_of(text)
    if sparse is None:
        raise ValueError(text)
    return sparse


def chosen_for(sparse: Sparse, tiles: Tiles, q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    means = [tile_sums(x, tiles.tile_of, tiles.num_tiles) / tiles.sizes.unsqueeze(-1) for x in (q, k)]
    return choose(sparse, tiles, tiles, means[0], means[1], scale)


def speed() -> None:
    generator = torch.Generator().manual_seed(0)
    for grid, rounds in SPEED_GRIDS.items():
        segments = [Segment(TEXT), Segment(math.prod(grid), grid)]
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = torch.randn(3, 1, HEADS, TEXT + math.prod(grid), SIZE, generator=generator).to(dtype)
            ways: dict[str, tuple[float, Callable[[], Any]]] = {
                "dense": (1.0, lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
            }
            for text in SPEED:
                tiles = tiles_of(segments, named(text).tile_shape)
                chosen = chosen_for(named(text), tiles, q, k)
                share = float(density(chosen, tiles.sizes, tiles.sizes).mean())
                ways[text] = (share, partial(_attend, named(text), chosen, tiles, q, k, v))
            times = in_turns({name: run for name, (_, run) in ways.items()}, rounds)
            print(f"\n{grid} + {TEXT} tokens, {HEADS} heads of {SIZE}, {dtype}, dense {times['dense'] * 1e3:.0f} ms")
            for name, (share, _) in ways.items():
                print(f"| `{name}` | {share:.3f} | {times[name] / times['dense']:.3f} |")


def _attend(sparse: Sparse, chosen: Tensor, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What goes by the content is chosen anew, as in every call; the rest is kept."""
    chosen = chosen_for(sparse, tiles, q, k) if sparse.needs_content else chosen
    return block_sparse_attention(q, k, v, chosen, tiles.tile_of, tiles.tile_of)


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of this thread: other processes on a shared machine count for little."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            start = time.thread_time()
            run()
            if turn:
                taken[name].append(time.thread_time() - start)
    return {name: statistics.median(some) for name, some in taken.items()}


def captured(model: nn.Module, values: dict[str, Any]) -> list[Attended]:
    """What every attention of one call is given."""
    found: list[Attended] = []

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor, call: Call, given: dict[str, Any]) -> Tensor:
        found.append((q.clone(), k.clone(), v.clone(), call))
        return F.scaled_dot_product_attention(**given)

    with torch.no_grad(), AttentionMode(attend):
        model(**values)
    return found


def video_models() -> Iterator[tuple[str, list[Attended], list[Segment]]]:
    """Tiny models with random weights on a moving picture: each latent is like its neighbours, as in a video."""
    from tests.models import Sizes
    from tests.zoo.collect import cases, inputs_of, randomized

    sizes = Sizes(grid=(12, 16, 16), text=24, batch=1)
    video = Segment(sizes.image, sizes.grid)
    for name, segments in (
        ("WanTransformer3DModel", [video]),
        ("HunyuanVideoTransformer3DModel", [video, Segment(sizes.text)]),
    ):
        case = cases()[name]
        values = inputs_of(case, sizes)
        values["hidden_states"] = moving(values["hidden_states"])
        length = sum(segment.length for segment in segments)
        found = captured(randomized(case.build()), values)
        yield name, [one for one in found if one[0].shape[2] == one[1].shape[2] == length], segments


def moving(noise: Tensor) -> Tensor:
    """Noise (B, C, F, H, W) made smooth over 3 frames and 8 x 8 pixels, of its own size."""
    smooth = F.avg_pool3d(F.pad(noise, (4, 3, 4, 3, 1, 1), mode="replicate"), (3, 8, 8), stride=1)
    return smooth / smooth.std() * noise.std()


def emoji() -> Iterator[tuple[str, list[Attended], list[Segment]]]:
    """The joint attentions of emoji's denoiser in the first, a middle and the last step of a picture."""
    from diffusers import FluxPipeline

    from parafuse.engine.grid import video_stream

    folder = Path(parafuse.__file__).parent / "models" / "emoji"
    pipeline: Any = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    given: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: given.append(dict(kwargs)), with_kwargs=True
    )
    call = json.loads((folder / "parafuse.json").read_text(encoding="utf-8"))["call"]
    pipeline(**(call | dict(prompt="a red apple")), generator=torch.Generator().manual_seed(0))
    hook.remove()
    stream = video_stream(pipeline.transformer, (), given[0])
    text = given[0]["encoder_hidden_states"].shape[1]
    segments = [Segment(text), Segment(stream.length, stream.grid)]
    for name, step in (("first", 0), ("middle", len(given) // 2), ("last", -1)):
        yield f"emoji, {name} step, {stream.grid}", captured(pipeline.transformer, given[step]), segments


def errors(attended: list[Attended], tiles: Tiles, sparse: Sparse) -> tuple[float, float, float]:
    """(density, part of the attention's mass that is seen, |sparse - dense| / |dense| of outputs), over all layers."""
    shares, masses, wrong, whole = [], [], 0.0, 0.0
    for q, k, v, call in attended:
        mask = call.mask
        keys = None if mask is None else mask[(None,) * (4 - mask.ndim)][..., :1, :]
        chosen = chosen_for(sparse, tiles, q, k, call.scale)
        scale = float(q.shape[-1] ** -0.5) if call.scale is None else call.scale
        dense, dense_lse = attention_math(q, k, v, keys, scale)
        out, lse = block_sparse_attention(q, k, v, chosen, tiles.tile_of, tiles.tile_of, mask=keys, scale=scale)
        shares.append(float(density(chosen, tiles.sizes, tiles.sizes).mean()))
        masses.append(float((lse - dense_lse).exp().mean()))
        wrong += float((out - dense).square().sum())
        whole += float(dense.square().sum())
    return statistics.mean(shares), statistics.mean(masses), math.sqrt(wrong / whole)


def error(texts: tuple[str, ...] = ERROR, shapes: tuple[Shape | None, ...] = ((2, 4, 4),)) -> None:
    sources = [*video_models(), *emoji()]
    for name, attended, segments in sources:
        for shape in shapes:
            fit = shape and (min(shape[0], next(s.grid for s in segments if s.grid)[0]), *shape[1:])
            tiles = tiles_of(segments, fit)
            print(
                f"\n{name}: {len(attended)} attentions of {tiles.num_tokens} tokens, {tiles.num_tiles} tiles of {fit}"
            )
            for text in texts:
                sparse = named(text)
                share, mass, wrong = errors(attended, tiles, sparse)
                print(f"| `{text}` | {share:.2f} | {mass:.3f} | {wrong:.3f} |", flush=True)


def tile_shapes() -> None:
    shapes = ((1, 4, 4), (1, 8, 8), (2, 4, 4), (4, 4, 4), (2, 8, 8), (4, 8, 4), (8, 4, 4), (1, 8, 16))
    error(("window:2,4,4", "radial:0.25", "content:0.7", "content:keep=0.25"), shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "error", "tiles"))
    torch.set_num_threads(1)
    {"speed": speed, "error": error, "tiles": tile_shapes}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
