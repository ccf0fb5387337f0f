"""The record saved with an output: plan, seed, versions, timings, what was applied and exchanged."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import parafuse

if TYPE_CHECKING:
    from PIL.Image import Image

PNG_KEY = "parafuse"
PACKAGES = ("torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """parafuse and the libraries that decide the picture."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"parafuse": parafuse.__version__, **found}


def plain(value: Any) -> Any:
    """A value as JSON can hold it; objects by their type's name."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return f"<{type(value).__name__}>"


def save_image(image: Image, path: str | Path, receipt: dict[str, Any]) -> None:
    """Writes `image`; a PNG carries the receipt in the text chunk `parafuse`. Beside it goes `<name>.json`.

    One rank calls it. The picture is written whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    path = Path(path)
    text = json.dumps(receipt, indent=2)
    options: dict[str, Any] = {}
    if path.suffix.lower() == ".png":
        info = PngInfo()
        info.add_itxt(PNG_KEY, text)
        options["pnginfo"] = info
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        image.save(partial, **options)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    path.with_suffix(".json").write_text(text + "\n")


def read_receipt(path: str | Path) -> dict[str, Any]:
    """The receipt in a PNG's text chunk. Raises KeyError when there is none."""
    from PIL import Image

    with Image.open(path) as image:
        return json.loads(image.info[PNG_KEY])
