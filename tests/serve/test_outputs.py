"""Files that a server gives out: whole, right, and with nothing in them but the receipt's id."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from parafuse.errors import ConfigError, UnsupportedError
from parafuse.launch.serve import outputs

SECRET = "a picture of my house"


def picture(width: int = 48, height: int = 32, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth, with words about itself."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    made = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    made.info |= {"prompt": SECRET, "comment": SECRET.encode(), "exif": b"Exif\0\0" + SECRET.encode()}
    return made


def written(painting: Any, folder: Path, format: str = "png", fps: int = 8) -> Path:
    name = outputs.write(painting, folder, "0-0", format=format, receipt_id="job-17", fps=fps)
    assert [one.name for one in folder.iterdir()] == [name]
    return folder / name


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_pictures(tmp_path: Path, format: str, mode: str) -> None:
    made = picture(mode=mode)
    file = written(made, tmp_path, format)
    assert SECRET.encode() not in file.read_bytes()
    with Image.open(file) as found:
        assert found.format == format.upper()
        difference = np.abs(np.asarray(found.convert("RGB")).astype(int) - np.asarray(made.convert("RGB")).astype(int))
        if format == "png":
            assert found.info == {"parafuse": "job-17"}
            assert found.mode == mode
            assert not difference.any()
        else:
            assert found.getexif()[outputs.IMAGE_DESCRIPTION] == "parafuse job-17"
            assert set(found.getexif()) == {outputs.IMAGE_DESCRIPTION}
            assert difference.mean() < 4


@pytest.mark.parametrize("size", [(48, 32), (45, 31)])
def test_videos(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = [picture(*size, seed=seed) for seed in range(6)]
    file = written(frames, tmp_path, "mp4", fps=12)
    assert SECRET.encode() not in file.read_bytes()
    with av.open(str(file)) as found:
        stream = found.streams.video[0]
        assert stream.average_rate == 12
        assert found.metadata["comment"] == "parafuse job-17"
        decoded = [np.asarray(frame.to_image().crop((0, 0, *size))).astype(int) for frame in found.decode(stream)]
    assert len(decoded) == 6
    for got, frame in zip(decoded, frames, strict=True):
        assert np.abs(got - np.asarray(frame).astype(int)).mean() < 8
    again = tmp_path / "again"
    again.mkdir()
    assert written(frames, again, "mp4", fps=12).read_bytes() == file.read_bytes()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for painting, format, why in (
        (picture(), "mp4", "the model paints pictures"),
        ([picture(), picture()], "png", "the model paints videos"),
        (picture(), "gif", "must be one of png, jpeg, webp, mp4"),
    ):
        with pytest.raises(ConfigError, match=why):
            outputs.write(painting, tmp_path, "0-0", format=format, receipt_id="x", fps=8)
    with pytest.raises(ConfigError, match="frames_per_second=0"):
        outputs.write([picture(), picture()], tmp_path, "0-0", format="mp4", receipt_id="x", fps=0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        outputs.write(picture(), tmp_path, "0-0", format="png", receipt_id="x", fps=8)
    assert not list(tmp_path.iterdir())


def test_paintings_of_all_kinds_of_outputs() -> None:
    one, frames = picture(), [picture(seed=1), picture(seed=2)]
    assert outputs.paintings(SimpleNamespace(images=[one])) == [one]
    assert outputs.paintings(SimpleNamespace(frames=[frames])) == [frames]
    array = np.stack([np.asarray(x) for x in frames])[None] / 255.0
    [found] = outputs.paintings(SimpleNamespace(frames=array))
    assert isinstance(found, list)
    for got, frame in zip(found, frames, strict=True):
        assert np.array_equal(np.asarray(got), np.asarray(frame))
    with pytest.raises(UnsupportedError, match="no pictures"):
        outputs.paintings(SimpleNamespace(images=[]))
    with pytest.raises(UnsupportedError, match="sound"):
        outputs.paintings(SimpleNamespace(frames=[frames], audio=array))


def test_a_text_in_a_picture_would_be_seen(tmp_path: Path) -> None:
    """The control of the tests above: what they look for is found where a file holds it."""
    info = PngInfo()
    info.add_text("prompt", SECRET)
    picture().save(tmp_path / "x.png", pnginfo=info)
    assert SECRET.encode() in (tmp_path / "x.png").read_bytes()
