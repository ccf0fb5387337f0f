"""Pictures that requests bring, in a form or by URL from hosts on a list: decoded, and written again as plain PNG."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile

from parafuse.launch.serve.http.errors import ApiError, invalid
from parafuse.launch.serve.http.service import Service
from parafuse.launch.serve.outbound import RefusedUrlError, UnreachableError, fetch

FORMATS = ("PNG", "JPEG", "WEBP")
STEREO = "MPO"
"""Pillow's name for a JPEG with further pictures behind the first, as phones write them: a depth map, another eye's."""
MAX_PICTURES = 16
MAX_FIELDS = 64
MAX_FIELD_BYTES = 128 << 10
MAX_JSON_BYTES = 1 << 20


@dataclass
class Form:
    """A multipart form's fields, and the pictures among them."""

    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    pictures: dict[str, list[UploadFile | str]] = field(default_factory=dict[str, "list[UploadFile | str]"])
    """Field -> files, or URLs."""


@contextlib.asynccontextmanager
async def form_of(request: Request, pictures: Mapping[str, str]) -> AsyncIterator[Form]:
    """The request's form. `pictures`: names of fields that hold pictures, and what they are called (`image[]`: image).
    Raises ApiError (400) for one that is broken, has too many parts, or names a field twice."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise invalid(None, "The body must be multipart/form-data.", "wrong_content_type")
    try:
        data = await request.form(max_files=MAX_PICTURES + 1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except (ValueError, KeyError, UnicodeError) as error:
        raise invalid(None, "The form cannot be read.", "invalid_form") from error
    try:
        yield sorted_out(data, pictures)
    finally:
        await data.close()


def sorted_out(data: FormData, pictures: Mapping[str, str]) -> Form:
    """Fields and pictures apart."""
    form = Form()
    for name, value in data.multi_items():
        if name in pictures:
            form.pictures.setdefault(pictures[name], []).append(value)
        elif isinstance(value, UploadFile):
            raise invalid(name[:80], f"holds a file; files are taken as {', '.join(sorted(pictures))}.")
        elif name in form.fields:
            raise invalid(name[:80], "is given twice; leave one out.")
        else:
            form.fields[name] = value
    return form


async def json_of(request: Request) -> bytes:
    """A body of JSON, as it came. Raises ApiError (400, 413)."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise invalid(None, "The body must be application/json.", "wrong_content_type")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_JSON_BYTES:
            raise ApiError(413, f"The body has more than {MAX_JSON_BYTES} bytes, the most that is taken as JSON.",
                           code="body_too_large")  # fmt: skip
    return bytes(body)


async def keep(service: Service, name: str, given: UploadFile | str, *, is_mask: bool = False) -> tuple[str, str]:
    """One picture into the folder of inputs: its file's name, and the hash of what came. Raises ApiError (400)."""
    most = int(service.settings.max_body_megabytes * 1e6)
    if isinstance(given, str):
        try:
            data = await fetch(given, service.settings.image_hosts, name, max_bytes=most)
        except (RefusedUrlError, UnreachableError) as error:
            raise invalid(name, str(error).removeprefix(f"{name}: "), "invalid_image_url") from error
    else:
        data = await given.read()
    picture, digest = await service.worked(_taken, data, name, service.settings.max_pixels, is_mask)
    return await service.worked(service.folders.add_input, picture, ".png"), digest


def _taken(data: bytes, name: str, max_pixels: int, is_mask: bool) -> tuple[bytes, str]:
    """The picture as plain PNG, and the hash of what came. Blocks. Raises ApiError (400)."""
    return plain_picture(data, name, max_pixels, is_mask), hashlib.sha256(data).hexdigest()


def plain_picture(data: bytes, name: str, max_pixels: int, is_mask: bool) -> bytes:
    """A picture as PNG without anything beside its pixels; its size is checked before it is decoded. Blocks.

    A mask becomes grey: white where it is to be painted anew. One with transparency says it by that, as OpenAI's do.
    Grey of 16 bits becomes grey of 8. Of a JPEG with several pictures the first is taken. Raises ApiError (400)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise invalid(name, f"has {width}x{height} pixels; at most {max_pixels} are taken.", "image_too_large")
            if picture.format != STEREO and getattr(picture, "n_frames", 1) != 1:
                raise invalid(name, "moves; give a picture that does not.", "invalid_image")
            upright = ImageOps.exif_transpose(picture)
            plain = _mask(upright) if is_mask else _in_8_bits(upright).convert("RGB")
        out = io.BytesIO()
        Image.frombytes(plain.mode, plain.size, plain.tobytes()).save(out, "PNG", compress_level=1)
    except ApiError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit
        raise invalid(name, f"has too many pixels; at most {max_pixels} are taken.", "image_too_large") from error
    except Exception as error:  # decoders raise anything for what is broken
        raise invalid(name, f"cannot be read as {', '.join(FORMATS)}.", "invalid_image") from error
    return out.getvalue()


def _mask(picture: Any) -> Any:
    from PIL import ImageOps

    clear = picture.info.get("transparency")
    if clear is not None and _is_deep(picture):  # the one value that is transparent; Pillow has no such conversion
        return picture.convert("I").point([255 * (value == clear) for value in range(1 << 16)], "L")
    if "A" in picture.getbands() or clear is not None:
        return ImageOps.invert(picture.convert("RGBA").getchannel("A"))
    return _in_8_bits(picture).convert("L")


def _is_deep(picture: Any) -> bool:
    """Whether it is grey of 16 bits. FORMATS have nothing else in these modes."""
    return picture.mode == "I" or picture.mode.startswith("I;16")


def _in_8_bits(picture: Any) -> Any:
    """Grey of 16 bits as grey of 8, all else as it is: `convert` would cut off what is above 255, and leave white."""
    if not _is_deep(picture):
        return picture
    return picture.convert("I").point([(value + 128) // 257 for value in range(1 << 16)], "L")
