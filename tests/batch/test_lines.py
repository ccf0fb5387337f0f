"""Lines of a batch file: found where they are, read as requests, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parafuse.errors import ConfigError
from parafuse.launch.batch.lines import MAX_LINE_BYTES, Place, places, read, text_at
from parafuse.launch.serve.card import ModelCard, card_of

PLACE = Place(12, 0, "")


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return card_of("emoji")


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_lines_are_found_again(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    texts = [b'{"prompt": "\xc3\xa4"}', b"", b"  ", b'{"prompt": "b"}\r', b"last, without an end"]
    file.write_bytes(b"\n".join(texts))
    found = list(places(file))
    assert [one.number for one in found] == [1, 4, 5]
    assert [text_at(file, one) for one in found] == [text.strip() for text in (texts[0], texts[3], texts[4])]
    assert len({one.stem for one in found}) == 3
    file.write_bytes(file.read_bytes().replace(b'"b"', b'"c"'))
    assert [one.stem for one in places(file)][::2] == [one.stem for one in found][::2]
    with pytest.raises(ConfigError, match="was changed meanwhile"):
        text_at(file, found[1])
    with pytest.raises(ConfigError, match="cannot be read"):
        next(places(tmp_path))


def test_a_line_is_a_request_with_its_number_as_seed(card: ModelCard) -> None:
    request, own = read(line(prompt="x", steps=3, size="64x32", n=2, id="mine", output_format="webp"), PLACE, card)
    assert (request.seed, request.num_outputs, request.format, own) == (12, 2, "webp", "mine")
    assert (request.settings["width"], request.settings["num_inference_steps"]) == (64, 3)
    assert read(line(prompt="x", seed=0), PLACE, card)[0].seed == 0
    assert read(line(prompt="x", id=3), PLACE, card)[1] == 3


def test_limits_of_a_server_do_not_hold(card: ModelCard) -> None:
    request, _ = read(line(prompt="x" * 5000, n=50, steps=999), PLACE, card)
    assert (request.num_outputs, request.settings["num_inference_steps"]) == (50, 999)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "must be a JSON object.*and is a list"),
        (b'"x"', "is a text"),
        (b"null", "is a null"),
        (line(prompt="x", sted=1), "sted: there is no such field; did you mean 'seed'"),
        (line(prompt="x", stream=True), "stream: there is no such field"),
        (line(prompt="x", seed=-1), "seed: "),
        (line(prompt="x", size="63x64"), "size: "),
        (line(prompt="x", steps=0), "steps: "),
        (line(prompt="x", id=[1]), "id: must be"),
        (line(prompt="x", lora=[{"name": "none"}]), "there is no LoRA 'none'"),
        (line(prompt="x", frames=5), "frames: there is no such field"),
        (line(seed=1), "prompt: must be given"),
        (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}', "bytes; at most"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(card: ModelCard, text: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as found:
        read(text, PLACE, card)
    assert "\n" not in str(found.value)


def test_lines_for_a_video(card: ModelCard) -> None:
    video = card_of("tiny:wan2.1-14b")
    request, _ = read(line(prompt="x", frames=5, fps=8), PLACE, video)
    assert (request.kind, request.settings["num_frames"], request.frames_per_second) == ("video", 5, 8)
    with pytest.raises(ConfigError, match="n: there is no such field"):
        read(line(prompt="x", n=2), PLACE, video)
