"""docs/serving-api.md has every field, as the server takes it. `python -m tests.serve.http.test_api_page` writes its
tables anew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from parafuse.launch.serve import http
from parafuse.launch.serve.http.wire import (
    CodeQuery,
    Common,
    DecodeQuery,
    EditBody,
    EncodeQuery,
    ImageBody,
    Lora,
    VideoBody,
)
from tests.serve.http.serving import serving

HTTP = Path(http.__file__ or "").parent
PAGE = Path(__file__).parents[3] / "docs" / "serving-api.md"
TABLES: dict[type[BaseModel], type[BaseModel] | None] = {
    ImageBody: None, Lora: None, EditBody: ImageBody, VideoBody: Common, DecodeQuery: None, EncodeQuery: CodeQuery,
}  # fmt: skip
"""Kind of body -> the one whose fields the page has already."""
NULL = {"type": "null"}


def table(kind: type[BaseModel], beside: type[BaseModel] | None) -> str:
    """A body's fields in Markdown. Those that may be null alone are left to the page's words."""
    shown = kind.model_json_schema()["properties"]
    known = set() if beside is None else set(beside.model_fields)
    lines = ["| field | takes | |", "|---|---|---|"]
    for name, one in shown.items():
        taken = [part for part in one.get("anyOf", [one]) if part != NULL and part.get("type") != "null"]
        if name not in known and taken:
            lines.append(f"| `{name}` | {', or '.join(map(words, taken))} | {one.get('description', '')} |")
    return "\n".join(lines)


def words(part: dict[str, Any]) -> str:
    """What a value may be."""
    if "enum" in part or "const" in part:
        return ", ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    if part.get("type") == "array":
        return f"a list of at most {part['maxItems']}"
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`"}[part["type"]]
    low, high = part.get("minimum"), part.get("maximum")
    above = f" above {part['exclusiveMinimum']:g}" if "exclusiveMinimum" in part else ""
    span = f" from {low:g}" if low is not None else above
    span += "" if high is None else f" to {high:.0f}" if low is not None else f", at most {high:.0f}"
    most = f" of at most {part['maxLength']} characters" if "maxLength" in part else ""
    return f"{kind}{span}{most}"


def filled(text: str) -> str:
    """The page with its tables as they are now."""
    for kind, beside in TABLES.items():
        mark = f"<!-- fields:{kind.__name__} -->"
        assert text.count(mark) == 2, mark
        block = f"{mark}\n{table(kind, beside)}\n{mark}"
        text = re.sub(f"{re.escape(mark)}.*{re.escape(mark)}", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def test_the_page_has_what_is_taken() -> None:
    assert PAGE.read_text() == filled(PAGE.read_text()), "python -m tests.serve.http.test_api_page writes it anew"


@pytest.mark.parametrize("kind", TABLES)
def test_every_field_says_what_it_is_for(kind: type[BaseModel]) -> None:
    told = table(kind, None)
    for name, one in kind.model_fields.items():
        assert one.description or one.annotation is type(None), name
        assert (f"| `{name}` |" in told) == (one.annotation is not type(None)), name


def test_every_error_code_is_on_the_page() -> None:
    """But for those of 400, which are many and say it all in words."""
    page = PAGE.read_text()
    for file in HTTP.glob("*.py"):
        for status, code in re.findall(r'ApiError\(\s*(\d+)[^=]*?code="(\w+)"', file.read_text()):
            assert status == "400" or f"`{code}`" in page, (file.name, code)


def test_every_route_is_on_the_page() -> None:
    page = PAGE.read_text() + (PAGE.parent / "serving.md").read_text()
    with serving() as server:
        paths = server.app.openapi()["paths"]
    for path in paths:
        assert re.sub(r"\{(job|video|model)\}", "{id}", path).replace("{number}", "{n}") + "`" in page, path


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
