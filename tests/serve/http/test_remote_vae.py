"""What the server takes for its model's autoencoder, and refuses before anything is stored; by diffusers' clients where
these can say it. The numbers are in tests/serve/test_remote_vae.py."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

from parafuse.launch.serve.card import card_of
from parafuse.launch.serve.jobs import JobError, State
from tests.serve.http.serving import Running, png, serving, until

RIGHT: dict[str, Any] = {"shape": [1, 8, 4, 6], "dtype": "float32"}
BODY = bytes(4 * 8 * 4 * 6)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving("emoji", max_pixels=64 * 64, max_outputs=3, limits={"priority_max": 2}) as running:
        yield running


@pytest.fixture(scope="module")
def video() -> Iterator[Running]:
    with serving("tiny:wan2.1-14b", max_pixels=64 * 64, max_frames=9) as running:
        yield running


@pytest.fixture(autouse=True)
def as_new(server: Running) -> Iterator[None]:
    server.behaviour.__init__()
    yield
    server.behaviour.__init__()


def decode(server: Running, body: bytes = BODY, **query: Any) -> httpx2.Response:
    asked = {name: value for name, value in (RIGHT | query).items() if value is not None}
    with server.http() as http:
        return http.post("/v1/vae/decode", params=asked, content=body)


def encode(server: Running, body: bytes, **query: Any) -> httpx2.Response:
    with server.http() as http:
        return http.post("/v1/vae/encode", params=query, content=body)


def refused(server: Running, answer: httpx2.Response, *words: str, status: int = 400) -> None:
    """With one line that has these words, and nothing was stored."""
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message, message
    assert not unnamed(server)
    assert not server.behaviour.painted


def owners(server: Running) -> list[str]:
    return [key.id for key in server.app.state.service.keys.all()]


def unnamed(server: Running) -> set[str]:
    """Inputs that no job has."""
    jobs = [job for owner in owners(server) for job in server.store.of_owner(owner, limit=1000)]
    named = {file for job in jobs for files in job.request.images.values() for file in files}
    return {file.name for file in server.settings.inputs.iterdir()} - named


def named(value: Any) -> str:
    return "-".join(value) if isinstance(value, tuple) else ""


@pytest.mark.parametrize(
    ("query", "body", "words"),
    [
        ({}, BODY[:-1], ("shape", "768 bytes", "767 came")),
        ({}, BODY + b"\0", ("shape", "more than 768")),
        ({}, b"", ("body is empty",)),
        ({}, base64.b64encode(BODY)[:-3], ("shape", "more than 768")),
        ({"dtype": "float16"}, BODY, ("shape", "384 bytes")),
        ({"dtype": "float64"}, BODY, ("dtype", "float64")),
        ({"dtype": "object"}, BODY, ("dtype", "object")),
        ({"dtype": None}, BODY, ("dtype", "must be given")),
        ({"shape": None}, BODY, ("shape", "must be given")),
        ({"shape": [1, 8, "nan", 6]}, BODY, ("shape.2", "nan")),
        ({"shape": [1, 8, "inf", 6]}, BODY, ("shape.2", "inf")),
        ({"shape": [1, 8, "4.5", 6]}, BODY, ("shape.2", "4.5")),
        ({"shape": [1, 8, -4, 6]}, BODY, ("shape", "-4")),
        ({"shape": [-1, 8, -4, 6]}, BODY, ("shape", "-4")),
        ({"shape": [1, 8, 0, 6]}, b"", ("shape", "[1, 8, 0, 6]")),
        ({"shape": [1, 8, 10**12, 10**12]}, BODY, ("shape", "extent")),
        ({"shape": [1, 8, 10**5, 10**5]}, BODY, ("pixels", "4096")),
        ({"shape": ["9" * 5000, 8, 4, 6]}, BODY, ("shape",)),
        ({"shape": [192]}, BODY, ("dims",)),
        ({"shape": [1, 1, 1, 8, 4, 6]}, BODY, ("shape",)),
        ({"shape": [1, 4, 8, 6]}, BODY, ("4 channels", "have 8")),
        ({"shape": [1, 8, 1, 4, 6]}, BODY, ("video", "for pictures")),
        ({"shape": [4, 8, 2, 3], "output_type": "pt"}, BODY, ("4 samples", "at most 3")),
        ({"shape": [2, 8, 2, 6]}, BODY, ("2 samples", "output_type=pt")),
        ({"shape": [1, 8, 16, 17]}, BODY, ("68x64 pixels", "4096")),
        ({"shape": [1, 6, 32]}, BODY, ("height", "packed")),
        ({"shape": [1, 6, 32], "height": 16}, BODY, ("height", "packed")),
        ({"shape": [1, 6, 16], "height": 16, "width": 24}, BODY, ("16 channels", "32")),
        ({"shape": [1, 6, 32], "height": 16, "width": 16}, BODY, ("6 tokens", "16x16 has 4")),
        ({"shape": [1, 6, 32], "height": 1, "width": 1}, BODY, ("6 tokens", "1x1 has 0")),
        ({"height": 16, "width": 32}, BODY, ("width", "is 32")),
        ({"height": 0, "width": 24}, BODY, ("height",)),
        ({"output_type": "np"}, BODY, ("output_type", "np")),
        ({"output_type": "mp4"}, BODY, ("mp4", "video")),
        ({"image_format": "gif"}, BODY, ("image_format", "gif")),
        ({"partial_postprocess": True}, BODY, ("partial_postprocess", "pt")),
        ({"fps": 8}, BODY, ("fps", "mp4")),
        ({"scaling_factor": 0}, BODY, ("scaling_factor",)),
        ({"scaling_factor": "nan"}, BODY, ("scaling_factor", "nan")),
        ({"shift_factor": "inf"}, BODY, ("shift_factor", "inf")),
        ({"do_scaling": "maybe"}, BODY, ("do_scaling", "maybe")),
        ({"do_scaling": True, "shift_factor": 1}, BODY, ("shift_factor", "do_scaling")),
        ({"priority": 3}, BODY, ("priority", "at most 2")),
        ({"scaling_facto": 1}, BODY, ("scaling_facto", "scaling_factor")),
        ({"dtype": ["float32", "float16"]}, BODY, ("dtype", "twice")),
    ],
    ids=named,
)
def test_what_is_wrong_with_latents(
    server: Running, query: dict[str, Any], body: bytes, words: tuple[str, ...]
) -> None:
    refused(server, decode(server, body, **query), *words)


@pytest.mark.parametrize(
    ("query", "body", "words"),
    [
        ({}, b"", ("body is empty",)),
        ({}, b"no picture", ("image", "cannot be read")),
        ({}, png((16, 16))[:-40], ("image", "cannot be read")),
        ({}, png((18, 16)), ("18x16", "multiples of 4")),
        ({}, png((68, 64)), ("68x64", "4096")),
        ({"dtype": "float32"}, png(), ("dtype", "shape")),
        ({"shape": [1, 3, 16, 16]}, png(), ("dtype", "shape")),
        ({"shape": [1, 3, 16, 16], "dtype": "uint8"}, bytes(768), ("dtype", "uint8")),
        ({"shape": [1, 3, 16, 16], "dtype": "float16"}, bytes(1535), ("shape", "1536 bytes", "1535")),
        ({"shape": [1, 4, 16, 16], "dtype": "float16"}, bytes(2048), ("4 channels", "have 3")),
        ({"shape": [1, 3, 16, 18], "dtype": "float16"}, bytes(1728), ("18x16", "multiples of 4")),
        ({"shape": [1, 3, 64, 68], "dtype": "float16"}, b"0", ("68x64", "4096")),
        ({"shape": [3, 16, 16], "dtype": "float16"}, bytes(1536), ("3 dims", "4, 5")),
        ({"shape": [1, 3, 5, 16, 16], "dtype": "float16"}, bytes(7680), ("video", "for pictures")),
        ({"shape": [4, 3, 4, 4], "dtype": "float16"}, bytes(384), ("4 samples",)),
        ({"output_type": "pt"}, png(), ("output_type",)),
    ],
    ids=named,
)
def test_what_is_wrong_with_pixels(server: Running, query: dict[str, Any], body: bytes, words: tuple[str, ...]) -> None:
    refused(server, encode(server, body, **query), *words)


def test_what_is_wrong_with_a_video(video: Running) -> None:
    size = {"dtype": "float16", "output_type": "mp4"}
    refused(video, decode(video, b"0", shape=[1, 16, 4, 4, 4], **size), "13 frames", "at most 9")
    refused(video, decode(video, b"0", shape=[2, 16, 2, 4, 4], **size), "2 samples")
    refused(video, decode(video, b"0", shape=[1, 16, 4, 4], **size), "mp4", "5 dims")
    refused(video, decode(video, b"0", shape=[1, 16, 2, 4, 4], dtype="float16"), "one picture", "mp4")
    post = size | {"output_type": "pt", "partial_postprocess": True}
    refused(video, decode(video, b"0", shape=[2, 16, 2, 4, 4], **post), "2 samples")
    refused(video, encode(video, b"0", shape=[1, 3, 6, 16, 16], dtype="float16"), "6 frames", "multiple of 4")
    assert decode(video, bytes(2 * 16 * 2 * 16), shape=[1, 16, 2, 4, 4], **size).headers["content-type"] == "video/mp4"


def test_other_forms_of_a_body(server: Running) -> None:
    with server.http() as http:
        for kind in ("application/json", "multipart/form-data; boundary=x"):
            answer = http.post("/v1/vae/decode", params=RIGHT, content=BODY, headers={"content-type": kind})
            refused(server, answer, "plain bytes", kind.partition(";")[0])
        assert http.post("/v1/vae/decode", params=RIGHT, content=bytes(33 * 10**6)).status_code == 413
        assert http.get("/v1/vae/decode").status_code == 405


def test_a_model_without_an_autoencoder_and_one_that_nobody_has_read() -> None:
    card = card_of("emoji")
    assert card.autoencoder is not None
    bare = replace(card, autoencoder=None, source=replace(card.source, components=("transformer",)))
    with serving(bare) as running:
        refused(running, decode(running), "no component vae")
    unread = replace(card, autoencoder=None)
    with serving(unread, max_outputs=2) as running:  # what can be seen is seen; ranks see the rest
        refused(running, decode(running, shape=[1, 8, 10**7, 10**7]), "768 came")
        refused(running, decode(running, shape=[3, 8, 4, 2]), "3 samples")
        assert decode(running, shape=[1, 4, 8, 6]).status_code == 200


def test_diffusers_is_told_what_is_wrong(server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc(monkeypatch, tmp_path, server.secrets[0])
    with pytest.raises(RuntimeError, match="this model's latents have 8"):
        remote_decode(f"{server.base}/v1/vae/decode", torch.zeros(1, 4, 8, 6), scaling_factor=1.0)
    with pytest.raises(RuntimeError, match="multiples of 4"):
        remote_encode(f"{server.base}/v1/vae/encode", Image.new("RGB", (18, 16)))
    server.behaviour.fail = JobError(kind="memory", message="out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        remote_decode(f"{server.base}/v1/vae/decode", torch.zeros(1, 8, 4, 6), scaling_factor=1.0)


def netrc(monkeypatch: pytest.MonkeyPatch, folder: Path, secret: str) -> None:
    file = folder / "netrc"
    file.write_text(f"machine 127.0.0.1 login any password {secret}\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))


def test_keys(server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """diffusers' client can be given no header; its HTTP library takes a password from a URL, or from ~/.netrc."""
    endpoint, latents = f"{server.base}/v1/vae/decode", torch.zeros(1, 8, 4, 6)
    with pytest.raises(RuntimeError, match="invalid_api_key"):
        remote_decode(endpoint, latents, scaling_factor=1.0)
    by_url = endpoint.replace("http://", f"http://any:{server.secrets[1]}@")
    assert remote_decode(by_url, latents, scaling_factor=1.0)
    netrc(monkeypatch, tmp_path, server.secrets[0])
    assert remote_decode(endpoint, latents, scaling_factor=1.0)
    assert [job.owner for job in server.behaviour.painted] == owners(server)[::-1]
    netrc(monkeypatch, tmp_path, "pf_wrong")
    with pytest.raises(RuntimeError, match="invalid_api_key"):
        remote_decode(endpoint, latents, scaling_factor=1.0)
    with server.http(None) as http:  # a browser would send it for any page
        auth = ("any", server.secrets[0])
        assert http.get("/v1/models", auth=auth).status_code == 401
        assert http.post("/v1/vae/decode", headers={"authorization": "Basic %%%"}).status_code == 401
        assert http.post("/v1/vae/decode", auth=auth).status_code == 400


def test_a_job_like_every_other(server: Running) -> None:
    answer = decode(server, priority=1, deadline_s=60, output_type="pt")
    job = server.store.get(answer.headers["x-job"])
    assert job is not None
    assert job.id.startswith("dec_")
    assert (job.state, job.owner, job.priority, job.request.kind) == (State.DONE, owners(server)[0], 1, "decode")
    assert job.deadline_s is not None
    assert (answer.headers["shape"], answer.headers["dtype"], len(answer.content)) == ("[1, 2, 2, 3]", "uint8", 12)
    with server.http(1) as other:
        assert other.get(f"/v1/jobs/{job.id}").status_code == 404
        assert other.get(f"/v1/files/{job.id}/0").status_code == 404
    with server.http() as http:
        told = http.get(f"/v1/jobs/{job.id}").json()
        assert (told["kind"], told["seed"], told["status"]) == ("decode", None, "done")
        assert 'parafuse_jobs_total{kind="decode",state="done"}' in http.get("/metrics").text
        (file,) = job.request.images["tensor"]
        assert (server.settings.inputs / file).read_bytes() == BODY
        assert http.delete(f"/v1/files/{job.id}").status_code == 200
    assert not (server.settings.inputs / file).exists(), "what it brought goes with it"


def test_the_same_key_is_the_same_job(server: Running) -> None:
    with server.http() as http:

        def ask(body: bytes = BODY, **headers: str) -> httpx2.Response:
            own = {"idempotency-key": "one"} | headers
            return http.post("/v1/vae/decode", params=RIGHT, content=body, headers=own)

        first = ask().headers["x-job"]
        assert ask().headers["x-job"] == first
        for other in (ask(b"\1" + BODY[1:]), ask(accept="tensor/binary")):
            assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_mismatch")
    assert len(server.behaviour.painted) == 1
    assert not unnamed(server)


def test_a_client_that_goes_away_cancels_its_job(server: Running) -> None:
    server.behaviour.hold = True
    query = "&".join(f"shape={extent}" for extent in RIGHT["shape"])
    with server.connect() as connection:
        lines = [f"POST /v1/vae/decode?dtype=float32&{query} HTTP/1.1", "host: x", f"content-length: {len(BODY)}"]
        lines.append(f"authorization: Bearer {server.secrets[0]}")
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + BODY)
        job = until(lambda: server.behaviour.painted)[-1]
        connection.shutdown(socket.SHUT_RDWR)
    server.wait(job.id, State.CANCELLED)


def test_a_full_queue_keeps_nothing(server: Running) -> None:
    with serving("emoji", max_queued=1) as running:
        running.pause()
        with running.http() as http:
            body = {"prompt": "a red apple", "background": True}
            assert http.post("/v1/images/generations", json=body).status_code == 202
        refused(running, decode(running), "queue", status=429)


def test_what_a_processor_changes(server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same request with a processor is one for a tensor: the header Accept says so."""
    netrc(monkeypatch, tmp_path, server.secrets[0])
    endpoint, latents = f"{server.base}/v1/vae/decode", torch.zeros(1, 8, 4, 6)
    remote_decode(endpoint, latents, scaling_factor=1.0)
    remote_decode(endpoint, latents, scaling_factor=1.0, return_type="pt", processor=VaeImageProcessor())
    asked = [job.request for job in server.behaviour.painted]
    assert [(one.coding.gives, one.format) for one in asked if one.coding] == [
        ("picture", "jpeg"), ("unit", "safetensors"),
    ]  # fmt: skip
