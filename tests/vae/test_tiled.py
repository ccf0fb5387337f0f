"""Tiles over ranks: bitwise what one rank gives, each computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parafuse.engine.vae.tiled import TiledAutoencoder
from parafuse.errors import ConfigError, RankError, UnsupportedError
from parafuse.parallel.bundle import HEAD
from parafuse.parallel.comm import counters
from tests.dist.ranks import run_ranks
from tests.vae import case as zoo
from tests.vae.zoo import CASES

BY_NAME = {case.name: case for case in CASES}
KINDS = {
    "AutoencoderKL": "rows of tiles, and a convolution beside the decoder",
    "AutoencoderTiny": "tiles are written into a picture as they come",
    "AutoencoderKLWan": "a tile is several calls, with a list that the decoder fills",
    "AutoencoderKLCogVideoX": "a tile is several calls, which hand on a dict",
    "AutoencoderVidTok": "a tile is several calls, with attributes that layers fill",
    "AutoencoderKLHunyuanVideo": "tiles in time, of tiles in space",
    "AutoencoderKLAllegro": "after all tiles a convolution over the whole",
    "AutoencoderOobleck": "sound",
}


@contextmanager
def spread(module: Any) -> Iterator[TiledAutoencoder]:
    one = TiledAutoencoder("vae", module, dist.group.WORLD)
    one.install()
    try:
        yield one
    finally:
        one.remove()


@contextmanager
def counted(module: Any, part: str) -> Iterator[list[tuple[int, ...]]]:
    """The shapes with which a part computes."""
    shapes: list[tuple[int, ...]] = []

    def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if not given[0].is_meta:
            shapes.append(tuple(given[0].shape))

    first = next(one for one in getattr(module, part).modules() if not list(one.children()))
    hook = first.register_forward_pre_hook(see)
    try:
        yield shapes
    finally:
        hook.remove()


def held(name: str, method: str, sliced: bool) -> dict[str, Any]:
    """On one rank: whether it is bitwise, and how often the part computed here and on one rank alone."""
    case = BY_NAME[name]
    module = zoo.tile(case, zoo.build(case))
    if sliced:
        module.enable_slicing()
    make, run, part = (
        (zoo.latents, zoo.decode, "decoder") if method == "decode" else (zoo.picture, zoo.encode, "encoder")
    )
    x = make(case, batch=2, odd=True)
    with counted(module, part) as alone:
        want = run(case, module, x)
    before = x.clone()
    with spread(module) as one, counted(module, part) as here:
        got = run(case, module, x)
    return {
        "bitwise": torch.equal(got, want) and got.dtype == want.dtype,
        "undone": torch.equal(run(case, module, x), want) and not {"decode", "encode"} & set(vars(module)),
        "untouched": torch.equal(x, before),
        "alone": len(alone),
        "here": len(here),
        "tiles": one.seen["tiles"],
        "tiles here": one.seen["tiles here"],
    }


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("name", KINDS)
def test_decode_is_bitwise_and_nothing_is_computed_twice(name: str, num_ranks: int) -> None:
    found = run_ranks(held, num_ranks, name, "decode", False)
    assert all(one["bitwise"] and one["undone"] and one["untouched"] for one in found), found
    assert sum(one["here"] for one in found) == found[0]["alone"]
    assert sum(one["tiles here"] for one in found) == found[0]["tiles"] >= num_ranks
    assert max(one["tiles here"] for one in found) <= -(-found[0]["tiles"] // num_ranks) + 2


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLAllegro", "AutoencoderOobleck"])
def test_encode_is_bitwise_and_nothing_is_computed_twice(name: str) -> None:
    found = run_ranks(held, 3, name, "encode", False)
    assert all(one["bitwise"] and one["undone"] and one["untouched"] for one in found), found
    assert sum(one["here"] for one in found) == found[0]["alone"]


def test_slices_are_tiles_of_their_own() -> None:
    found = run_ranks(held, 2, "AutoencoderKL", "decode", True)
    assert all(one["bitwise"] for one in found)
    assert found[0]["tiles"] == 2 * run_ranks(held, 2, "AutoencoderKL", "decode", False)[0]["tiles"]


def exchanged() -> tuple[int, int, int]:
    """Calls, bytes, and those of the largest share of tiles."""
    case = BY_NAME["AutoencoderKL:plain"]
    module = zoo.tile(case, zoo.build(case))
    kinds = counters(dist.group.WORLD).kinds  # pyright: ignore[reportArgumentType]
    before = (kinds["all_gather"].calls, kinds["all_gather"].bytes) if "all_gather" in kinds else (0, 0)
    with spread(module):
        zoo.decode(case, module, zoo.latents(case, batch=1))
    # 16 x 16 latents: tiles of 8 every 6 are 3 x 3, of which the last row and column have 4; 2 pixels for each latent
    large, edge, corner = 3 * 16 * 16 * 4, 3 * 16 * 8 * 4, 3 * 8 * 8 * 4
    shares = sorted([4 * large + 4 * edge + corner - (2 * large + 2 * edge + corner), 2 * large + 2 * edge + corner])
    return kinds["all_gather"].calls - before[0], kinds["all_gather"].bytes - before[1], HEAD + shares[-1]


def test_one_exchange_brings_all_tiles_and_is_counted() -> None:
    for calls, sent, largest in run_ranks(exchanged, 2):
        assert (calls, sent) == (1, largest)


def broken() -> bool:
    """Whether the result is right though this rank's tiles are spoilt."""
    case = BY_NAME["AutoencoderKL"]
    module = zoo.tile(case, zoo.build(case))
    x = zoo.latents(case)
    want = zoo.decode(case, module, x)
    if dist.get_rank() == 1:
        module.decoder.conv_out.bias.add_(1.0)
    with spread(module):
        return torch.equal(zoo.decode(case, module, x), want)


def test_a_spoilt_tile_shows_on_every_rank() -> None:
    assert run_ranks(broken, 2) == [False, False]


def failing() -> str:
    case = BY_NAME["AutoencoderKL"]
    module = zoo.tile(case, zoo.build(case))

    def fail(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if dist.get_rank() == 1 and not given[0].is_meta:
            raise MemoryError("no room for a tile")

    module.decoder.conv_in.register_forward_pre_hook(fail)
    with spread(module):
        try:
            zoo.decode(case, module, zoo.latents(case))
        except (RankError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_fails_in_a_tile_fails_the_call_on_all() -> None:
    other, own = run_ranks(failing, 2)
    assert own == "MemoryError: no room for a tile"
    assert other.startswith("RankError: the part of rank 1")


def of_one_tile() -> tuple[bool, list[str], int]:
    case = BY_NAME["AutoencoderKL"]
    module = zoo.build(case)
    x = zoo.latents(case)[..., :6, :6]
    want = zoo.decode(case, module, x)
    module.tile_sample_min_size, module.tile_latent_min_size = 16, 8
    kinds = counters(dist.group.WORLD).kinds  # pyright: ignore[reportArgumentType]
    before = sum(count.calls for count in kinds.values())
    with spread(module) as one:
        same = torch.equal(zoo.decode(case, module, x), want)
        return same, one.lines(), sum(count.calls for count in kinds.values()) - before


def test_a_picture_of_one_tile_is_made_whole_by_each_rank() -> None:
    for same, lines, exchanges in run_ranks(of_one_tile, 2):
        assert same
        assert lines == ["vae: tiled, 1 calls of one tile on every rank"]
        assert exchanges == 0


class Tiles(nn.Module):
    """Two tiles, with something between them."""

    def __init__(self, between: str):
        super().__init__()
        self.decoder = nn.Conv2d(1, 1, 3, padding=1)
        self.use_tiling, self.between = True, between

    def enable_tiling(self) -> None:
        self.use_tiling = True

    def decode(self, z: Tensor) -> Tensor:
        left = self.decoder(z[..., :4])
        if self.between == "looks" and bool(left.sum() > 1e6):
            return left
        if self.between == "feeds":
            return torch.cat([left, self.decoder(left * 2)], -1)
        if self.between == "draws":
            left = left + torch.randn(left.shape)
        return torch.cat([left, self.decoder(z[..., 4:])], -1)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, device=x.device)


def between(kind: str) -> tuple[str, bool, bool]:
    """The error, whether the result is bitwise, and whether noise goes on as after a plain call."""
    torch.manual_seed(0)
    module = Tiles(kind).requires_grad_(False)
    if kind == "draws inside":
        module.decoder = Noisy()  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.randn(2, 1, 8, 8)
    torch.manual_seed(1)
    want, after = module.decode(x), torch.get_rng_state()
    torch.manual_seed(1)
    with spread(module):
        try:
            got = module.decode(x)
        except UnsupportedError as error:
            return str(error), False, False
    return "", torch.equal(got, want), torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("kind", ["nothing", "draws", "feeds"])
def test_what_is_between_tiles_runs_as_it_is(kind: str) -> None:
    assert run_ranks(between, 2, kind) == [("", True, True)] * 2


@pytest.mark.parametrize(
    ("kind", "operator"), [("looks", "aten._local_scalar_dense"), ("draws inside", "aten.randn.default")]
)
def test_an_operator_in_the_way_is_named_before_anything_is_exchanged(kind: str, operator: str) -> None:
    for error, _, _ in run_ranks(between, 2, kind):
        assert error.startswith("vae='tiled': vae (Tiles) cannot be spread over ranks: ")
        assert operator in error
        assert "use vae='sharded' or vae='replicated'" in error


def refused(what: str) -> str:
    module = zoo.build(BY_NAME["AutoencoderKL" if what == "gradient" else "VQModel"])
    try:
        with spread(module):
            module.decode(zoo.latents(BY_NAME["AutoencoderKL"]).requires_grad_())
    except (ConfigError, UnsupportedError) as error:
        return str(error)
    return ""


def test_a_class_without_tiles_and_a_gradient_are_refused() -> None:
    assert "VQModel, which has no tiling; use vae='sharded'" in run_ranks(refused, 2, "class")[0]
    assert "tiles of other ranks come without gradients" in run_ranks(refused, 2, "gradient")[0]
