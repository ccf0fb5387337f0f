"""What sparse attention can be asked for, as text and as values."""

from __future__ import annotations

import math

import pytest

from parafuse.errors import ConfigError
from parafuse.sparse import METHODS, Content, Radial, Sparse, Window, sparse_of, tile_for

EXAMPLES: dict[str, Sparse] = {
    "window": Window(),
    "window:3,4,5": Window(3, 4, 5),
    "window:frames=2,rows=8,columns=8,tile=2x8x8": Window(2, 8, 8, tile="2x8x8"),
    "radial:reach=0.25,decay=0.5,sink_frames=0": Radial(0.25, decay=0.5, sink_frames=0),
    "content:mass=0.95,dense_steps=0,dense_layers=2": Content(0.95, dense_steps=0, dense_layers=2),
    "content:keep=0.2,grid=21x45x80": Content(keep=0.2, grid="21x45x80"),
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_texts_name_values_and_values_spell_themselves(text: str) -> None:
    value = sparse_of(text)
    assert value == EXAMPLES[text]
    assert sparse_of(str(value)) == value
    assert sparse_of(value.brief if value else "") == value


def test_nothing_and_values_pass() -> None:
    assert sparse_of(None) is None
    assert sparse_of(one := Radial(0.3)) is one


def test_shapes_may_be_given_as_numbers() -> None:
    given = Window(tile=(2, 8, 8), grid=[3, 4, 5])  # pyright: ignore[reportArgumentType]
    assert given == Window(tile="2x8x8", grid="3x4x5")
    assert given.tile_shape == (2, 8, 8)
    assert given.grid_shape == (3, 4, 5)
    assert Window().tile_shape is None
    assert Window().grid_shape is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("windo", ["'windo' is no sparse", "did you mean 'window'?"]),
        ("window:frame=2", ["unknown key 'frame'", "did you mean 'frames'?"]),
        ("window:rows=-1", ["sparse window: rows=-1: must be a whole number of at least 0."]),
        ("window:rows=1.5", ["rows='1.5': must be a whole number."]),
        ("window:tile=4x8", ["tile='4x8': must be frames x rows x columns", "as 4x8x4", "or auto"]),
        ("window:tile=0x8x8", ["tile='0x8x8'"]),
        ("radial:grid=2x3xx", ["grid='2x3xx'", "as 21x45x80"]),
        ("radial:0", ["reach=0.0: must be a number above 0 and up to 1."]),
        ("radial:0.5,decay=-1", ["decay=-1.0: must be a number of at least 0."]),
        ("content:1.5", ["mass=1.5: must be a number above 0 and up to 1."]),
        ("content:nan", ["mass=nan"]),
        ("content:keep=0", ["keep=0.0"]),
        ("content:least=2", ["least=2.0: must be a number above 0 and up to 1."]),
        ("content:dense_steps=-1", ["dense_steps=-1"]),
        ("content:dense_layers=x", ["dense_layers='x'"]),
        ("content:0.9,mass=0.9", ["mass is given twice"]),
    ],
)
def test_what_is_wrong_is_refused_by_name(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        sparse_of(text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("value", [True, 3, Sparse])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="sparse="):
        sparse_of(value)


@pytest.mark.parametrize(
    ("grid", "tile"),
    [
        ((21, 45, 80), (4, 8, 4)),
        ((1, 64, 64), (1, 8, 16)),
        ((2, 30, 52), (2, 8, 8)),
        ((8, 3, 9), (4, 3, 9)),
        ((1, 1, 3), (1, 1, 3)),
        ((1, 1, 1000), (1, 1, 128)),
        ((300, 1, 1), (128, 1, 1)),
    ],
)
def test_tiles_fit_the_grid(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    assert tile_for(grid) == tile
    assert math.prod(tile) <= 128


def test_methods_are_named_once() -> None:
    assert list(METHODS) == ["window", "radial", "content"]
    assert [one.needs_content for one in METHODS.values()] == [False, False, True]
