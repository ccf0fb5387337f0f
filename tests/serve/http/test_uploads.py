"""Pictures as they come from cameras and scanners, and where the work on them is done."""

from __future__ import annotations

import hashlib
import io
from types import SimpleNamespace

import pytest
from PIL import Image

from parafuse.launch.serve.http import uploads
from parafuse.launch.serve.http.errors import ApiError
from parafuse.launch.serve.http.uploads import plain_picture
from tests.serve.http.serving import loop_runs_here, png, serving

VALUES = [0, 257 * 5, 32768, 65535]
GREYS = [0, 5, 128, 255]


def deep(transparency: int | None = None) -> bytes:
    """A PNG of 16-bit grey, 4x1."""
    picture, out = Image.new("I;16", (4, 1)), io.BytesIO()
    for x, value in enumerate(VALUES):
        picture.putpixel((x, 0), value)
    picture.save(out, "PNG", **({} if transparency is None else {"transparency": transparency}))
    return out.getvalue()


def read(data: bytes, *, is_mask: bool = False) -> Image.Image:
    return Image.open(io.BytesIO(plain_picture(data, "image", 10_000, is_mask)))


def greys(picture: Image.Image) -> list[object]:
    return [picture.getpixel((x, 0)) for x in range(picture.width)]


def test_grey_of_16_bits_keeps_its_shades() -> None:
    with read(deep()) as found:
        assert (found.mode, greys(found)) == ("RGB", [(grey, grey, grey) for grey in GREYS])


def test_a_mask_of_16_bits() -> None:
    with read(deep(), is_mask=True) as found:
        assert (found.mode, greys(found)) == ("L", GREYS)
    with read(deep(transparency=32768), is_mask=True) as found:
        assert (found.mode, greys(found)) == ("L", [0, 0, 255, 0])


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16L", "I;16B"])
def test_every_mode_of_16_bits(mode: str) -> None:
    picture = Image.new(mode, (1, 1), 32768)
    assert uploads._in_8_bits(picture).getpixel((0, 0)) == 128


def several(form: str, exif: Image.Exif | None = None) -> bytes:
    """Two pictures in one file; with `exif`, of the first."""
    out = io.BytesIO()
    more = {} if exif is None else {"exif": exif}
    second = Image.new("RGB", (16, 8), (0, 0, 200))
    Image.new("RGB", (16, 8), (200, 0, 0)).save(out, form, save_all=True, append_images=[second], **more)
    return out.getvalue()


@pytest.mark.parametrize("is_mask", [False, True])
def test_a_photo_with_a_depth_map(is_mask: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    with Image.open(io.BytesIO(several("MPO", exif))) as picture:
        assert (picture.format, getattr(picture, "n_frames", 1)) == ("MPO", 2)
    with read(several("MPO", exif), is_mask=is_mask) as found:
        assert found.size == (8, 16)
        red = found.convert("RGB").getpixel((4, 8))
        assert isinstance(red, tuple)
        assert red[2] < 100


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_what_moves_is_refused(form: str) -> None:
    with pytest.raises(ApiError, match="moves"):
        read(several(form))


def test_an_upload_is_hashed_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    on_loop = list[bool]()

    def sha256(data: bytes) -> object:
        on_loop.append(loop_runs_here())
        return hashlib.sha256(data)

    monkeypatch.setattr(uploads, "hashlib", SimpleNamespace(sha256=sha256))
    with serving("tiny:qwen-image-edit") as server, server.http() as http:
        answer = http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", png())})
    assert answer.status_code == 200, answer.text
    assert on_loop == [False]
