"""Requests that are too large, too slow, too many or malformed: each is answered or ended, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from parafuse.launch.serve.http.protocol import BoundedProtocol
from tests.serve.http.serving import PATIENCE_S, Running, png, serving


class Hasty(BoundedProtocol):
    """The same with a short patience."""

    head_s = 1.0
    max_message_bytes = 8_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving("tiny:qwen-image-edit", body_s=1.5, protocol=Hasty, max_body_megabytes=2) as running:
        yield running


@pytest.fixture(autouse=True)
def goes_on(server: Running) -> Iterator[None]:
    yield
    with server.http() as http:
        assert http.get("/health/live").status_code == 200
        answer = http.post("/v1/images/edits", data={"prompt": "still there"}, files={"image": ("a.png", png())})
        assert answer.status_code == 200, answer.text


FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


def head(server: Running, path: str = "/v1/images/generations", method: str = "POST", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"authorization: Bearer {server.secrets[0]}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def answered(connection: socket.socket) -> bytes:
    """All that comes until the other side closes, or goes on waiting for a next request."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
        if b"\r\n\r\n" in data and b"content-length" in data.lower():
            length = int(data.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if len(data.split(b"\r\n\r\n", 1)[1]) >= length:
                break
    return data


def status(data: bytes) -> int:
    return int(data.split(b" ", 2)[1]) if data else 0


def closed(connection: socket.socket) -> None:
    """Passes once the server has closed the connection."""
    connection.settimeout(PATIENCE_S)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass


def test_a_body_of_100_megabytes_is_refused_by_its_length(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(head(server, content_type="application/json", content_length=str(100 << 20)))
        assert status(answered(connection)) == 413


def test_a_body_of_100_megabytes_without_a_length(server: Running) -> None:
    boundary = "multipart/form-data; boundary=x"
    with server.connect() as connection:
        connection.sendall(
            head(server, "/v1/images/edits", content_type=boundary, transfer_encoding="chunked")
            + b"%x\r\n" % len(PART)
            + PART
            + b"\r\n"
        )
        piece = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n"
        sent = 0
        try:
            while sent < 100:
                connection.sendall(piece)
                sent += 1
        except (ConnectionError, TimeoutError):
            pass
        assert sent < 100, "the whole body was read"


def test_a_body_without_a_length_is_counted(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(
            head(server, "/v1/images/edits", content_type=FORM, transfer_encoding="chunked")
            + b"%x\r\n" % len(PART) + PART + b"\r\n"
        )  # fmt: skip
        for _ in range(3):
            connection.sendall(b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n")
        assert status(answered(connection)) == 413


def test_the_whole_of_a_body_that_is_too_long_is_answered(server: Running) -> None:
    with server.http() as http:
        answer = http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", bytes(3_000_000))})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        text = json.dumps({"prompt": "x" * 1_500_000})
        answer = http.post("/v1/images/generations", content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 413


def test_a_form_of_ten_thousand_parts(server: Running) -> None:
    with server.http() as http:
        files = [(f"f{index}", (None, "x")) for index in range(10_000)]
        answer = http.post("/v1/images/edits", files=files)
        assert (answer.status_code, "Too many fields" in answer.text) == (400, True)
        files = [("image[]", ("a.png", b"x")) for _ in range(10_000)]
        answer = http.post("/v1/images/edits", files=files)
        assert (answer.status_code, "Too many files" in answer.text) == (400, True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x",
        b"--x--",
        b"--y\r\n\r\n--y--",
        b"--x\r\nContent-Disposition: form-data\r\n\r\nv\r\n--x--",
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nv',
        b'--x\r\nContent-Disposition: form-data; name="prompt"; name="n"\r\n\r\nv\r\n--x--\r\ntrailing',
        b"--x\r\n" + b"A" * 100_000 + b": b\r\n\r\nv\r\n--x--",
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"v" * 200_000 + b"\r\n--x--",
        b'--x\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\nv\r\n--x--',
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="../../etc/x\x00"\r\n\r\nv\r\n--x--',
        bytes(range(256)) * 40,
    ],
)
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data", "text/plain"])
def test_broken_multipart(server: Running, body: bytes, kind: str) -> None:
    with server.http() as http:
        answer = http.post("/v1/images/edits", content=body, headers={"content-type": kind})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 900_000, b'{"prompt":"\\ud800"}', b"\xff\xfe", b"null", b"1e999999"]
)
def test_broken_json(server: Running, body: bytes) -> None:
    with server.http() as http:
        answer = http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text


def test_a_body_that_does_not_come(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(head(server, content_type="application/json", content_length="100") + b'{"prompt":')
        data = answered(connection)
        assert status(data) == 408
        assert b"connection: close" in data.lower()
        closed(connection)


def test_a_body_that_comes_byte_by_byte(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(head(server, content_type="application/json", content_length="1000"))
        connection.settimeout(0.1)
        data, deadline = b"", time.monotonic() + PATIENCE_S
        while not data and time.monotonic() < deadline:
            try:
                connection.sendall(b" ")
                data = connection.recv(65536)
            except TimeoutError:
                continue
        assert status(data) == 408


@pytest.mark.parametrize(
    "start", [b"", b"GET /health/live HTTP/1.1\r\n", b"GET /health/live HTTP/1.1\r\nhost: x", b"\r\n"]
)
def test_a_head_that_does_not_come(server: Running, start: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(start)
        closed(connection)


def test_a_head_that_comes_byte_by_byte(server: Running) -> None:
    with server.connect() as connection:
        connection.settimeout(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        connection.sendall(b"GET /health/live HTTP/1.1\r\n")

        def dribble() -> None:
            while time.monotonic() < deadline:
                connection.sendall(b"a: b\r\n")
                time.sleep(0.1)

        with pytest.raises(ConnectionError):
            dribble()


@pytest.mark.parametrize(
    "flood",
    [
        b"".join(b"h%d: x\r\n" % index for index in range(5000)),
        b"a: " + b"x" * 300_000,
        b"a: " + b"x" * 40_000 + b"\r\n\r\n",
        b"a" * 300_000,
    ],
    ids=["many", "endless value", "long value", "endless name"],
)
def test_a_flood_of_headers(server: Running, flood: bytes) -> None:
    with server.connect() as connection:
        try:
            connection.sendall(b"GET /health/live HTTP/1.1\r\n" + flood)
            assert status(answered(connection)) in (0, 400, 431)
        except ConnectionError:
            pass
        closed(connection)


@pytest.mark.parametrize("start", [b"a: ", b"a", b"a: b\r\nc: "])
def test_half_of_a_header_is_counted(server: Running, start: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\n" + start)
        connection.sendall(b"x" * (33 << 10))
        assert status(answered(connection)) == 431


def test_an_endless_path(server: Running) -> None:
    with server.connect() as connection:
        try:
            connection.sendall(b"GET /" + b"a" * 300_000)
            assert status(answered(connection)) in (0, 400, 431)
        except ConnectionError:
            pass
        closed(connection)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/../../etc/passwd/0",
        "/v1/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd/0",
        "/v1/files/{job}/../0",
        "/v1/files/{job}/-1",
        "/v1/files/{job}/1",
        "/v1/files/{job}/0%00",
        "/v1/files/{job}/%30%2f..",
        "/v1/files/{job}/\u0660",
        "/v1/files/{job}/99999999999999999999",
        "/v1/receipts/..%2f{job}",
        "/v1/jobs/%00",
        "/v1/jobs/" + "a" * 5000,
        "/v1/jobs/{job}%0d%0ax-evil:%20y",
        "//v1/jobs/{job}",
        "/v1/images/generations/",
        "/%c0%ae%c0%ae/",
    ],
)
def test_paths(server: Running, path: str) -> None:
    with server.http() as http:
        made = http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", png())}).json()["id"]
    with server.connect() as connection:
        connection.sendall(head(server, path.format(job=made), method="GET").decode().encode("utf-8"))
        data = answered(connection)
        assert status(data) in (400, 404), data
        assert b"root:" not in data
        assert b"x-evil" not in data.split(b"\r\n\r\n")[0].lower()


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/jobs HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ],
)
def test_no_http(server: Running, data: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(data)
        assert status(answered(connection)) in (0, 400, 401, 404)


def test_a_request_id_is_taken_or_made(server: Running) -> None:
    with server.http() as http:
        assert http.get("/health/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        assert http.get("/health/live", headers={"x-request-id": "a b" * 99}).headers["x-request-id"].isalnum()
        assert http.get("/none").headers["x-request-id"]
