"""Folders of pictures and files of prompts, as `parafuse score` reads them. Imports no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parafuse.errors import ConfigError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
KINDS = "PNG, JPEG or WebP"
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")
"""Of 8 bits or fewer a channel: what `convert` brings to RGB without cutting values off."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pictures of one folder."""

    field: str
    """What the folder was given as: `FOLDER`, `--against`."""
    folder: Path
    sizes: dict[str, tuple[int, int]]
    """File name -> (width, height), sorted by name."""

    @property
    def names(self) -> list[str]:
        return list(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, name: str) -> Image:
        """The picture, decoded, as RGB; what is transparent keeps its colour. Raises ConfigError."""
        from PIL import Image

        path = self.folder / name
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ConfigError(_unreadable(self.field, path, error)) from error


def look(field: str, folder: str) -> Gallery:
    """Lists a folder's pictures and reads their sizes. Other files, folders in it, and hidden files are passed over.

    Raises ConfigError where there is none, or one that is no still picture of 8 bits a channel."""
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"{field} {folder!r}: {what}; give a folder of {KINDS} pictures.")
    found = sorted(one for one in path.iterdir() if one.suffix.lower() in SUFFIXES and one.name[0] != ".")
    if not found:
        raise ConfigError(f"{field} {folder!r}: has no picture; give a folder with {KINDS} files in it.")
    return Gallery(field=field, folder=path, sizes={one.name: _size(field, one) for one in found})


def _size(field: str, path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            # cameras put a small copy behind a JPEG (MPO): that is no second frame
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            mode, size = image.mode, image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(_unreadable(field, path, error)) from error
    if frames > 1:
        raise ConfigError(f"{field} {str(path)!r}: has {frames} frames; must be a still picture: save them as files.")
    if mode not in MODES:
        raise ConfigError(f"{field} {str(path)!r}: is of mode {mode}; must have 8 bits a channel: save it as RGB.")
    return size


def _unreadable(field: str, path: Path, error: Exception) -> str:
    why = " ".join(str(error).split())
    return f"{field} {str(path)!r}: is no readable picture ({why}); must be {KINDS}: save it again or take it away."


def check_pairs(gallery: Gallery, against: Gallery, smallest: int) -> None:
    """Both folders must have the same file names, and the two pictures of a name the same size.

    `smallest`: pixels that each side must have. Raises ConfigError at the first fault."""
    for one, other in ((gallery, against), (against, gallery)):
        alone = [name for name in one.names if name not in other.sizes]
        if alone:
            raise ConfigError(
                f"{one.field} {str(one.folder)!r}: {_few(alone)} without a picture of that name in "
                f"{str(other.folder)!r}; pairs have the same file name: add what is missing, or give --unpaired."
            )
    for name, size in gallery.sizes.items():
        if size != against.sizes[name]:
            wide, high = against.sizes[name]
            raise ConfigError(
                f"{gallery.field} {str(gallery.folder / name)!r}: is {size[0]} x {size[1]} pixels, but "
                f"{str(against.folder / name)!r} is {wide} x {high}; must be the same: scale one of them."
            )
        if min(size) < smallest:
            raise ConfigError(
                f"{gallery.field} {str(gallery.folder / name)!r}: is {size[0]} x {size[1]} pixels; must have at least "
                f"{smallest} a side for SSIM: scale both pictures up."
            )


def _few(names: list[str]) -> str:
    """At most three names, and how many more."""
    shown = ", ".join(names[:3])
    return (
        f"{shown} and {len(names) - 3} more are" if len(names) > 3 else f"{shown} {'is' if len(names) == 1 else 'are'}"
    )


def unlike_counted(names: list[str]) -> tuple[str, str] | None:
    """The first two neighbours of sorted names that are the other way round when numbers in them are counted."""

    def counted(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

    return next((pair for pair in pairwise(names) if counted(pair[0]) > counted(pair[1])), None)


def read_prompts(field: str, file: str, names: list[str]) -> tuple[dict[str, str], bool]:
    """(file name -> prompt, in the order of `names`; whether they went by line).

    Raises ConfigError where the file does not have one for each.

    The file has a prompt in each line (empty lines are passed over), in the order of the sorted names, or is a
    JSON object from file name to prompt."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise ConfigError(f"{field} {file!r}: cannot be read ({why}); give a text file of prompts.") from error
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        return _from_json(field, file, text, names), False
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if len(prompts) != len(names):
        raise ConfigError(
            f"{field} {file!r}: has {len(prompts)} prompts for {len(names)} pictures; must have one line for each, in "
            "the order of the sorted file names, or be a JSON object from file name to prompt."
        )
    return dict(zip(names, prompts, strict=True)), True


def _from_json(field: str, file: str, text: str, names: list[str]) -> dict[str, str]:
    try:
        pairs: Any = json.loads(text, object_pairs_hook=tuple)
    except ValueError as error:
        raise ConfigError(f"{field} {file!r}: is no readable JSON ({error}); must be an object of prompts.") from error
    if not isinstance(pairs, tuple):
        raise ConfigError(
            f"{field} {file!r}: must be a JSON object from file name to prompt, or have one in each line."
        )
    found: dict[str, str] = {}
    for name, prompt in pairs:
        if name not in names:
            hint = nearest(name, names) or f"; there are {len(names)} pictures, the first is {names[0]!r}."
            raise ConfigError(f"{field} {file!r}: has a prompt for {name!r}, which is no picture of the folder{hint}")
        if name in found:
            raise ConfigError(f"{field} {file!r}: has {name!r} twice; give one prompt for each picture.")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f"{field} {file!r}: {name!r} has {prompt!r}; must be a prompt, as text.")
        found[name] = prompt.strip()
    lacking = [name for name in names if name not in found]
    if lacking:
        raise ConfigError(f"{field} {file!r}: {_few(lacking)} without a prompt; give one for each picture.")
    return {name: found[name] for name in names}
