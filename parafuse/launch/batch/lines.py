"""Lines of a batch file: where they are, and what each asks for. One JSON object in a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from parafuse.errors import ConfigError, nearest
from parafuse.launch.serve.card import ModelCard
from parafuse.launch.serve.http.errors import ApiError
from parafuse.launch.serve.http.painting import Painting
from parafuse.launch.serve.http.wire import ImageBody, VideoBody, read_json
from parafuse.launch.serve.jobs import JobRequest
from parafuse.launch.serve.settings import Serving

FIELDS = ("prompt", "negative_prompt", "size", "seed", "steps", "guidance", "lora", "cache")
IMAGE_FIELDS = (*FIELDS, "n", "output_format")
VIDEO_FIELDS = (*FIELDS, "seconds", "frames", "fps")
ID = "id"
"""A line's own name, which its result repeats."""
MAX_LINE_BYTES = 1 << 20
MANY = 1 << 30
FREE = Serving(max_prompt_characters=MAX_LINE_BYTES, max_pixels=MANY, max_steps=MANY, max_outputs=MANY, max_frames=MANY)
"""Limits of a server are for strangers; a file is its owner's."""


@dataclass(frozen=True)
class Place:
    """Where a line is."""

    number: int
    """From 1, as editors count."""
    offset: int
    """Of its first byte in the file."""
    digest: str
    """Of its text: a line that was changed is another one."""

    @property
    def stem(self) -> str:
        """What its files are called."""
        return f"{self.number:09d}-{self.digest}"


def places(file: Path) -> Iterator[Place]:
    """Of all lines that are not blank. Raises ConfigError."""
    try:
        with file.open("rb") as lines:
            offset = 0
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Place(number, offset, hashlib.sha256(line.strip()).hexdigest()[:12])
                offset += len(line)
    except OSError as error:
        raise ConfigError(f"{str(file)!r}: cannot be read ({error.strerror}).") from error


def text_at(file: Path, place: Place) -> bytes:
    """The line. Raises ConfigError where the file is not what it was."""
    with file.open("rb") as lines:
        lines.seek(place.offset)
        line = lines.readline().strip()
    if hashlib.sha256(line).hexdigest()[:12] != place.digest:
        raise ConfigError("the file was changed meanwhile; start the batch again.")
    return line


def read(line: bytes, place: Place, card: ModelCard) -> tuple[JobRequest, Any]:
    """What a line asks for, and its id. Without a seed it has its number: the same file gives the same pictures. Raises
    ConfigError in one line, without the line's number."""
    if len(line) > MAX_LINE_BYTES:
        raise ConfigError(f"has {len(line)} bytes; at most {MAX_LINE_BYTES} are read.")
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"is no JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise ConfigError(f'must be a JSON object, such as {{"prompt": "a red apple"}}, and is a {_kind(fields)}.')
    own = fields.pop(ID, None)
    if not isinstance(own, str | int | None):
        raise ConfigError(f"{ID}: must be a text or a whole number.")
    known = VIDEO_FIELDS if card.kind == "video" else IMAGE_FIELDS
    for name in fields:
        if name not in known:
            hint = nearest(name, (ID, *known)) or f"; there are {', '.join((ID, *known))}."
            raise ConfigError(f"{name[:80]}: there is no such field{hint}")
    if fields.get("seed") is None:
        fields["seed"] = place.number
    painting, body = Painting(FREE, card), json.dumps(fields).encode()
    loras = card.lora_names() if fields.get("lora") else None
    try:
        if card.kind == "video":
            return painting.video(read_json(VideoBody, body), loras=loras), own
        return painting.image(read_json(ImageBody, body), loras=loras), own
    except ApiError as error:
        raise ConfigError(error.message) from error


def _kind(value: Any) -> str:
    return {list: "list", str: "text", type(None): "null", bool: "truth value"}.get(type(value), "number")
