"""Architectures without weights: `random:NAME` in true size, `tiny:NAME` with tiny parts. Read without torch."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from parafuse.errors import ModelError, nearest

ARCHITECTURES = Path(__file__).parents[1] / "models" / "architectures"
RANDOM, TINY = "random:", "tiny:"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pipeline as data, in one of its two sizes."""

    path: Path
    pipeline_class: str
    components: dict[str, dict[str, Any]]
    """Name -> library, class and config; a tokenizer has a `stand_in` too, a processor `parts`."""
    keywords: dict[str, Any]
    """Arguments of the pipeline that are no components."""
    call: dict[str, Any]
    """Keywords of the call that hold when they are not given."""
    parameters: dict[str, int]
    """Component -> number of its parameters in true size."""

    def config(self, name: str) -> dict[str, Any] | None:
        return self.components.get(name, {}).get("config")

    def canonical(self) -> str:
        """What two architectures have in common if they are the same."""
        return json.dumps([self.pipeline_class, self.keywords, self.components], sort_keys=True)


def architectures() -> list[str]:
    return sorted(path.stem for path in ARCHITECTURES.glob("*.json"))


def is_architecture(model: str) -> bool:
    return model.startswith((RANDOM, TINY))


def read_architecture(model: str) -> Architecture:
    """The architecture named `random:NAME` or `tiny:NAME`. Raises ModelError for a name that is not there."""
    form, _, name = model.partition(":")
    known = architectures()
    if name not in known:
        raise ModelError(
            f"model={model!r}: is no known architecture{nearest(name, known) or '.'} There are {', '.join(known)}."
        )
    path = ARCHITECTURES / f"{name}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    tiny = f"{form}:" == TINY
    call = data["call"] | (data["tiny_call"] if tiny else {})
    return Architecture(
        path=path,
        pipeline_class=data["pipeline_class"],
        components={name: _sized(part, tiny) for name, part in data["components"].items()},
        keywords=data["keywords"],
        call={name: _picture(*value["picture"]) if _is_picture(value) else value for name, value in call.items()},
        parameters=data["parameters"],
    )


def _sized(part: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """A component without its values for the tiny form, which replace those of its config there."""
    part = copy.deepcopy(part)
    changes = part.pop("tiny", {})
    if tiny:
        _replace(part["config"], changes)
    inner = part.get("parts", {})
    part |= {"parts": {k: _sized(v, tiny) if isinstance(v, dict) else v for k, v in inner.items()}} if inner else {}
    return part


def _replace(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if key not in values:
            raise KeyError(f"tiny: {key!r} is not in the config that it changes")
        if isinstance(value, dict):
            _replace(values[key], cast("dict[str, Any]", value))
        else:
            values[key] = value


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and "picture" in value


def _picture(width: int, height: int) -> Any:
    """A PIL image of this size to edit: a ramp in each of its three colours."""
    from PIL import Image

    ramp, round_ramp = Image.linear_gradient("L"), Image.radial_gradient("L")
    picture = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_90), round_ramp))
    return picture.resize((width, height))
