"""Events: what they say on the line, and where they are encoded."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from parafuse.launch.serve.http import answers, events
from tests.serve.http.serving import loop_runs_here, serving


def test_an_event_with_a_picture_is_written_as_any_other() -> None:
    data = {"type": "image_edit.completed", "b64_json": "QUJD/+==", "seed": 7, "usage": events.USAGE}
    assert events.picture_event("image_edit.completed", data) == events.event("image_edit.completed", data)


def test_finished_pictures_are_encoded_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    built, encoded = list[bool](), list[bool]()
    build, encode = answers.image_event, events.picture_event

    def told(*args: Any, **kwargs: Any) -> dict[str, Any]:
        built.append(loop_runs_here())
        return build(*args, **kwargs)

    def written(*args: Any) -> bytes:
        encoded.append(loop_runs_here())
        return encode(*args)

    monkeypatch.setattr(answers, "image_event", told)
    monkeypatch.setattr(events, "picture_event", written)
    with serving() as server, server.http() as http:
        answer = http.post("/v1/images/generations", json={"prompt": "x", "stream": True, "n": 2, "seed": 5})
    assert (built, encoded) == ([False, False], [False, False])
    parts = [part for part in answer.text.split("\n\n") if part.startswith("event: image_generation.completed\n")]
    found = [json.loads(part.partition("\ndata: ")[2]) for part in parts]
    assert [(one["image_index"], one["seed"], one["usage"]) for one in found] == [
        (0, 5, events.USAGE),
        (1, 6, events.USAGE),
    ]
    for one in found:
        with Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))) as picture:
            assert picture.format == "PNG"
