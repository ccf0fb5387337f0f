"""Sparse attention on ranks that share tokens: what one rank gives, no more sent than is seen, work spread evenly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import parafuse
from parafuse.config import Config
from parafuse.engine.engine import Engine
from parafuse.engine.extras import Extras
from parafuse.errors import ConfigError, UnsupportedError
from parafuse.kernels import block_sparse
from parafuse.kernels.patterns import choose
from parafuse.kernels.tiles import Segment, tiles_of
from parafuse.parallel import sparse_ring
from parafuse.parallel.sparse import SparseAttention, Video
from parafuse.sparse import sparse_of
from tests.dist.ranks import run_ranks
from tests.models import FAMILIES as MODELS
from tests.models import Sizes, build, call, inputs
from tests.sparse.layouts import FAMILIES, FIELDS, GRID, LAYOUTS, LONG, METHODS, SIZES, painted, plain, relative
from tests.sparse.zoo import METHOD, VIDEO, error, run
from tests.zoo.collect import cases, inputs_of, randomized

EXACT = 1e-5


def with_grid(family: str, method: str) -> str:
    return METHODS[method] + FAMILIES[family]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_one_rank_leaves_out_what_the_pattern_says(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with every pair of tokens masked by hand, by fp32 products."""

    def dense(
        q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, q_tiles: Tensor, k_tiles: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        seen = chosen[:, :, q_tiles][..., k_tiles]
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    found = painted(family, with_grid(family, method), {})
    monkeypatch.setattr(block_sparse, "_gathered", dense)
    want = painted(family, with_grid(family, method), {})
    assert relative(found["result"], want["result"]) < EXACT
    assert 1e-3 < relative(found["result"], plain(family)) < 1.0  # lossy, and at work
    assert relative(found["after"], plain(family)) == 0.0
    assert found["report"]["whole_calls"] == {}
    assert 0.1 < found["report"]["density"] < 0.95
    assert found["report"]["work_skipped"] == pytest.approx(1 - found["report"]["density"], abs=1e-3)


@pytest.mark.sweep(one_in=5)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_give_what_one_gives(family: str, layout: dict[str, int]) -> None:
    for method in METHODS:
        want = painted(family, with_grid(family, method), {})
        found = run_ranks(painted, math.prod(layout.values()), family, with_grid(family, method), layout)
        assert all(relative(one["result"], want["result"]) < EXACT for one in found), method
        assert {one["report"]["sparse_calls"] for one in found} == {want["report"]["sparse_calls"]}
        assert sum(one["report"]["density"] for one in found) / len(found) == pytest.approx(
            want["report"]["density"], abs=0.08
        )


def turned(degrees: dict[str, int]) -> dict[str, Any]:
    """With the rows that come taken in the opposite order."""
    original = sparse_ring._Coming.arrived

    def wrong(self: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, *parts = original(self, k, v)
        return rows.flip(0), parts[0], parts[1]

    sparse_ring._Coming.arrived = wrong
    try:
        return painted("wan", METHODS["window"], degrees)
    finally:
        sparse_ring._Coming.arrived = original


def test_rows_in_another_place_are_seen() -> None:
    want = painted("wan", METHODS["window"], {})
    assert any(relative(one["result"], want["result"]) > 1e-3 for one in run_ranks(turned, 2, {"ring": 2}))


def test_a_ring_sends_only_what_is_seen() -> None:
    """Four ranks of three frames each; a window of one frame to both sides, in tiles of one frame."""
    fields = "tile=1x4x4,dense_steps=0,dense_layers=0"
    degrees = {"ring": 4}
    near = run_ranks(painted, 4, "wan", f"window:1,4,4,{fields}", degrees, LONG)
    everything = run_ranks(painted, 4, "wan", f"window:12,4,4,{fields}", degrees, LONG)
    want = painted("wan", f"window:1,4,4,{fields}", {}, LONG)
    assert all(relative(one["result"], want["result"]) < EXACT for one in near)
    frame = 2 * 16 * 2 * 3 * MODELS["wan"].head_size * 4  # batch, tokens, keys and values, heads, head size, fp32
    calls = 2 * 2  # layers, calls that are counted
    sent = [one["sent"]["ring.ring"][1] / frame / calls for one in near]
    assert sent == [1, 2, 2, 1]  # the last frame to the next rank, the first to the one before
    assert [one["sent"]["ring.ring"][1] / frame / calls for one in everything] == [9, 9, 9, 9]


def test_heads_of_different_density_are_spread() -> None:
    found = run_ranks(painted, 2, "wan", f"content:0.6,{FIELDS}", {"ulysses": 2}, SIZES, 8)
    assert found[0]["report"]["heaviest_rank_over_mean"] == found[1]["report"]["heaviest_rank_over_mean"]
    state = SparseAttention(sparse_of("content:0.6"), ulysses=2)  # pyright: ignore[reportArgumentType]
    state._shares = {0: [0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1], 1: [0.5, 0.2, 0.3]}
    order = state.head_order(0, 8)
    assert sorted(order) == list(range(8))
    loads = [sum(state._shares[0][head] for head in half) for half in (order[:4], order[4:])]
    assert abs(loads[0] - loads[1]) < 0.11
    assert state._balance({0: state._shares[0]}) == (pytest.approx(max(loads) / 1.7), pytest.approx(3.0 / 1.7))
    assert state.head_order(1, 3) == [1, 2, 0]  # two heads on the first rank: the light ones
    assert state.head_order(2, 4) == [0, 1, 2, 3]  # nothing is known of it


def test_first_steps_and_layers_are_whole() -> None:
    method = METHODS["window"].replace("dense_steps=0,dense_layers=0", "dense_steps=2,dense_layers=1")
    found = painted("wan", method, {})
    assert found["report"]["whole_calls"] == {"first steps": 4, "first layers": 1}
    assert found["report"]["sparse_calls"] == 1
    everything = painted("wan", METHODS["window"].replace("dense_steps=0", "dense_steps=9"), {})
    assert relative(everything["result"], plain("wan")) < EXACT
    assert everything["report"]["density"] is None


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("layout", [{}, {"ulysses": 2}, {"ring": 2}], ids=str)
def test_compiled_blocks_give_the_same(layout: dict[str, int]) -> None:
    want = painted("wan", METHODS["content"], {})
    if not layout:
        assert relative(painted("wan", METHODS["content"], {}, compile=True)["result"], want["result"]) < EXACT
        return
    for one in run_ranks(painted, 2, "wan", METHODS["content"], layout, SIZES, 3, True):
        assert relative(one["result"], want["result"]) < EXACT


def test_the_segment_of_a_video_among_equal_ones() -> None:
    def where(place: int | None) -> Video:
        known = None if place is None else (place, place)
        return Video((1, 5, 7), 0, 35, "x", lambda number: known if number == 2 else None)

    assert [s.grid for s in where(1).segments((35, 35)) or ()] == [None, (1, 5, 7)]
    assert where(None).segments((35, 35)) is None
    assert [s.grid for s in where(None).segments((13, 35)) or ()] == [None, (1, 5, 7)]
    assert where(None).segments((13, 34)) is None
    pieces = where(None).segments((14, 21, 9)) or ()
    assert [(s.length, s.grid) for s in pieces] == [(35, (1, 5, 7)), (9, None)]
    inside = Video((1, 5, 7), 4, 42, "x", lambda number: None).segments((42, 9))
    assert [(s.length, s.grid) for s in inside or ()] == [(4, None), (35, (1, 5, 7)), (3, None), (9, None)]


def test_text_as_long_as_the_video() -> None:
    """Which of two streams of one length is the video follows from the first block."""
    sizes = Sizes(grid=GRID, text=math.prod(GRID))
    method = with_grid("flux", "window")
    model, values = build("flux"), inputs("flux", sizes)
    with parafuse.apply(model, Config(sparse=method)) as handle:
        call(model, values)
        state = handle.sparse()["FluxTransformer2DModel"].attention
        layouts = [one for one in state._layouts.values() if one is not None]
        report = state.report()
    assert report is not None
    assert report["whole_calls"] == {}
    assert layouts
    of_text, of_video = (tiles_of([Segment(len(GRID) and 105)]), tiles_of([Segment(105, GRID)], (2, 2, 3)))
    assert all(one.host_queries.num_tiles == of_text.num_tiles + of_video.num_tiles for one in layouts)
    assert all(int(one.host_queries.video[0]) == -1 for one in layouts)  # text first, as the model has it


def test_what_cannot_be_had_is_refused() -> None:
    extras = Extras(sparse=sparse_of("window"), cuda_graphs=True, compile=True)
    with pytest.raises(ConfigError, match="not with sparse=window"):
        extras.check("cuda", lambda axis: 1)
    with pytest.raises(ConfigError, match=r"sparse='win': .*there are window, radial, content"):
        Config(sparse="win")
    model, values = build("flux"), inputs("flux", SIZES)
    with (
        parafuse.apply(model, Config(sparse=METHODS["window"])),
        pytest.raises(UnsupportedError, match="give it with grid="),
    ):
        call(model, values)


def test_of_patterns_that_see_everything_nothing_is_lost() -> None:
    found = painted("wan", f"window:3,5,7,{FIELDS}", {})
    assert relative(found["result"], plain("wan")) < EXACT
    assert found["report"]["density"] == 1.0
    tiles = tiles_of([Segment(105, GRID)], (2, 2, 3))
    assert not bool(choose(sparse_of(METHODS["window"]), tiles, tiles).all())  # pyright: ignore[reportArgumentType]


def emoji(ranks: dict[str, int]) -> tuple[Any, dict[str, Any], list[str]]:
    from parafuse.config import Parallel

    config = Config(sparse="window:0,4,4,tile=1x4x4,dense_steps=1", parallel=Parallel(**ranks))
    with Engine.from_pretrained("emoji", config) as engine:
        picture = engine("a red heart", seed=1, output_type="np", num_inference_steps=4).images[0]
        return picture, engine.receipt, list(engine.receipt["applied"])


def test_emoji_with_a_window() -> None:
    """A picture is a video of one frame; the receipt tells what was left out."""
    picture, receipt, applied = emoji({})
    told = receipt["sparse"]["transformer"]
    assert told["sparse_calls"] > 0
    assert told["whole_calls"]["first steps"] > 0
    assert 0.1 < told["density"] < 0.9
    assert receipt["plan"]["sparse"].startswith("window:")
    assert any(line.startswith("sparse attention on transformer: window") for line in applied)
    for other, _, _ in run_ranks(emoji, 2, {"ulysses": 2}):
        assert abs(other - picture).max() < 1 / 255


@pytest.mark.parametrize(
    "name", ["MochiTransformer3DModel", "HunyuanVideo15Transformer3DModel", "Cosmos3OmniTransformer"]
)
def test_odd_ones(name: str) -> None:
    """Text that comes and goes with a mask's values; masks of all pairs; queries of the video alone."""
    one, plain_run = run(name, {}), run(name, {}, "")
    assert one.sparse_calls > 0
    assert error(one.outputs, plain_run.outputs) > 1e-4
    for layout in ({"ulysses": 2}, {"ring": 2}):
        for rank in run_ranks(run, 2, name, layout):
            assert error(rank.outputs, one.outputs) < EXACT
    with torch.inference_mode():
        assert error(run(name, {}).outputs, one.outputs) < EXACT


def test_rows_that_come_and_go_beside_compile() -> None:
    case = cases()["MochiTransformer3DModel"]
    model, values = randomized(case.build()), inputs_of(case, VIDEO)
    method = METHOD
    with parafuse.apply(model, Config(sparse=method)), torch.no_grad():
        want = tree_leaves(model(**values))
    with parafuse.apply(model, Config(sparse=method, compile=True)), torch.no_grad():
        assert error(tree_leaves(model(**values)), want) < EXACT


def test_layouts_are_made_once() -> None:
    model, values = build("wan"), inputs("wan", SIZES)
    with parafuse.apply(model, Config(sparse=METHODS["window"])) as handle:
        call(model, values)
        state = handle.sparse()["WanTransformer3DModel"].attention
        before = list(state._layouts.values())
        call(model, values)
        assert [id(one) for one in state._layouts.values()] == [id(one) for one in before]


def by_hand(degrees: dict[str, int]) -> list[Tensor]:
    """Three calls of a model without a scheduler, of which the first two are whole."""
    method = METHODS["window"].replace("dense_steps=0", "dense_steps=2")
    model, values = build("wan"), inputs("wan", SIZES)
    parallel = parafuse.Parallel(**{"ulysses": 1, **degrees})
    with parafuse.apply(model, Config(sparse=method, parallel=parallel)):
        return [call(model, values).clone() for _ in range(3)]


def test_calls_that_are_made_to_learn_are_no_steps() -> None:
    want = by_hand({})
    assert relative(want[1], want[0]) == 0.0
    assert relative(want[2], want[0]) > 1e-3
    for found in run_ranks(by_hand, 2, {"data": 2}):
        assert max(relative(a, b) for a, b in zip(found, want, strict=True)) < EXACT


def test_beside_backends() -> None:
    with pytest.raises(ConfigError, match="kernel of its own"):
        Extras(sparse=sparse_of("window"), attention=parafuse.Attention("fp8-reference")).check("cpu", lambda axis: 1)
    model, values = build("wan"), inputs("wan", SIZES)
    want = call(build("wan"), values)
    method = METHODS["window"].replace("dense_steps=0", "dense_steps=1")
    with parafuse.apply(model, Config(sparse=method, attention="math")) as handle:
        assert relative(call(model, values), want) < EXACT
        call(model, values)
        ran = handle.choices()["WanTransformer3DModel"].report()
    assert {one["backend"] for one in ran} == {"math"}
