"""Pictures, videos and tensors of a call as files: each written whole or not at all, and with no word of its prompt in
it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from parafuse.engine.receipt import PNG_KEY
from parafuse.errors import ConfigError, UnsupportedError

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
VIDEO = "mp4"
TENSOR = "safetensors"
TENSOR_NAME = "tensor"
"""In the file."""
QUALITY = 95
IMAGE_DESCRIPTION = 0x010E
"""Exif's tag for the receipt's id in JPEG and WebP."""
VIDEO_THREADS = 4
"""Of the encoder, whose bits depend on it: the same on every machine."""
VIDEO_CODECS = ("libx264", "libopenh264", "mpeg4")
"""The first that the library was built with."""
CRF = "18"

Painting = Image.Image | list[Image.Image]
"""A picture, or the frames of a video."""


def paintings(output: Any) -> list[Painting]:
    """The pictures of a pipeline's output, or the frames of its videos. Raises UnsupportedError where there are none,
    or where they have sound, which is not written."""
    if getattr(output, "audio", None) is not None:
        raise UnsupportedError("the pipeline's output has sound, which is not served; use parafuse.Engine from Python.")
    found = getattr(output, "images", None)
    found = getattr(output, "frames", None) if found is None else found
    if found is None or not len(found):
        raise UnsupportedError(f"the pipeline's output ({type(output).__name__}) holds no pictures to serve.")
    return [painting(one) for one in found]


def first_frame(painting: Painting) -> Image.Image:
    return painting if isinstance(painting, Image.Image) else painting[0]


def painting(one: Any) -> Painting:
    """Of what a pipeline gives for one: pictures, or (H, W, C), (F, H, W, C) of 0 to 1, or of whole numbers to 255.
    Raises UnsupportedError for what is none."""
    if isinstance(one, Image.Image):
        return one
    array = one
    if hasattr(one, "detach"):
        array = (one if one.dtype == torch.uint8 else one.float()).detach().cpu().numpy()
    if isinstance(array, np.ndarray):
        if array.ndim == 3:
            return _of_array(array)
        return [_of_array(frame) for frame in array]
    frames = list(one)
    if not frames or not all(isinstance(frame, Image.Image) for frame in frames):
        raise UnsupportedError(f"the pipeline's output holds {type(one).__name__}, which is no picture or video.")
    return frames


def _of_array(array: np.ndarray) -> Image.Image:
    """From (H, W, C), or (C, H, W), of 0 to 1 or of whole numbers to 255."""
    if array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    whole = array if array.dtype == np.uint8 else (array.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(whole.squeeze(-1) if whole.shape[-1] == 1 else whole)


def check_format(format: str) -> None:
    """Raises ConfigError for one that is not written."""
    if format not in (*FORMATS, VIDEO):
        raise ConfigError(f"format={format!r}: must be one of {', '.join((*FORMATS, VIDEO))}.")


def write(painting: Painting, folder: Path, name: str, *, format: str, receipt_id: str, fps: int) -> str:
    """Writes one painting as `name` with the format's suffix, which it returns. It is there when this returns, on disk,
    and holds the receipt's id alone beside what is to be seen. `fps`: of videos. Raises ConfigError for a picture that
    is to be a video, or the other way round; OSError where the disk says no."""
    check_format(format)
    frames = [painting] if isinstance(painting, Image.Image) else painting
    if len(frames) > 1 and format != VIDEO:
        raise ConfigError(f"format={format!r}: the model paints videos; ask for {VIDEO}.")
    if isinstance(painting, Image.Image) and format == VIDEO:
        raise ConfigError(f"format={format!r}: the model paints pictures; ask for one of {', '.join(FORMATS)}.")
    with _whole(folder, name, format) as partial:
        if format == VIDEO:
            _write_video(frames, partial, receipt_id, fps)
        else:
            _write_picture(frames[0], partial, format, receipt_id)
    return f"{name}.{format}"


def write_tensor(x: torch.Tensor, folder: Path, name: str, *, receipt_id: str) -> str:
    """The same for a tensor, of any shape and dtype, as safetensors."""
    with _whole(folder, name, TENSOR) as partial:
        save_file({TENSOR_NAME: x.detach().cpu().contiguous()}, partial, metadata={PNG_KEY: receipt_id})
    return f"{name}.{TENSOR}"


@contextmanager
def _whole(folder: Path, name: str, format: str) -> Iterator[Path]:
    """A place to write a file at, which is on disk under its name afterwards, or not there."""
    partial = folder / f".{name}.partial.{format}"
    try:
        yield partial
        _to_disk(partial)
        partial.replace(folder / f"{name}.{format}")
        _to_disk(folder)
    finally:
        partial.unlink(missing_ok=True)


def _write_picture(picture: Image.Image, path: Path, format: str, receipt_id: str) -> None:
    bare = Image.new(picture.mode, picture.size)  # without what the picture may say of itself
    bare.paste(picture)
    if format == "png":
        info = PngInfo()
        info.add_text(PNG_KEY, receipt_id)
        bare.save(path, format=FORMATS[format], pnginfo=info)
        return
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = f"{PNG_KEY} {receipt_id}"
    wide = bare if bare.mode in ("L", "RGB") or (format == "webp" and bare.mode == "RGBA") else bare.convert("RGB")
    more: dict[str, Any] = {"subsampling": 0} if format == "jpeg" else {"method": 4}
    wide.save(path, format=FORMATS[format], quality=QUALITY, exif=exif, **more)


def _write_video(frames: Sequence[Image.Image], path: Path, receipt_id: str, fps: int) -> None:
    import av

    if fps < 1:
        raise ConfigError(f"frames_per_second={fps}: must be at least 1.")
    codec = next((name for name in VIDEO_CODECS if name in av.codecs_available), None)
    if codec is None:
        raise UnsupportedError(f"videos: PyAV was built without {', '.join(VIDEO_CODECS)}; install one from PyPI.")
    width, height = frames[0].size
    with av.open(str(path), "w", format=VIDEO, options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = f"{PNG_KEY} {receipt_id}"
        stream = cast("av.VideoStream", container.add_stream(codec, rate=fps))
        stream.width, stream.height = width + width % 2, height + height % 2  # colours are for 2 x 2 pixels
        stream.pix_fmt = "yuv420p"
        stream.thread_count = VIDEO_THREADS
        if codec == "libx264":
            stream.options = {"crf": CRF}
        else:
            stream.bit_rate = 8 * stream.width * stream.height
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(_even(frame.convert("RGB")))))
        container.mux(stream.encode())


def _even(frame: Image.Image) -> Image.Image:
    """With the last row or column once more, where their number is odd."""
    width, height = frame.width + frame.width % 2, frame.height + frame.height % 2
    if (width, height) == frame.size:
        return frame
    pixels = np.pad(np.asarray(frame), ((0, height - frame.height), (0, width - frame.width), (0, 0)), mode="edge")
    return Image.fromarray(pixels)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
