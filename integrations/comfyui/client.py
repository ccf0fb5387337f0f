"""A parafuse server, as the nodes use it: jobs, their events, what they made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

SERVER_ENV, KEY_ENV = "PARAFUSE_SERVER", "PARAFUSE_API_KEY"
LOCAL = "http://127.0.0.1:8000"
CONNECT_S = 10.0
ANSWER_S = 60.0
"""For an answer, and between two pieces of a stream; a server's streams say something every 15 s."""
CODE_S = 600.0
"""Until an autoencoder that waits in the queue has answered."""
TENSOR = "tensor/binary"
BACK_S, AGAIN_S = 120.0, 0.5
"""How long a server that went away is waited for, and between two looks."""
OVER = ("done", "failed", "cancelled")


class ServerError(RuntimeError):
    """What ComfyUI shows at a node: one line that says what to do."""


class UnreachableError(ServerError):
    """Nobody answers."""


@dataclass(frozen=True)
class Event:
    """One of a job."""

    name: str
    """progress, preview, or how it ended."""
    data: dict[str, Any]


class Server:
    """One server. Its key comes from the environment of ComfyUI, never from a graph: graphs are saved into pictures and
    passed on. It is sent to the server of the environment alone, whatever address a graph names."""

    def __init__(self, address: str = "", environ: Mapping[str, str] = os.environ):
        """`address`: http://HOST:PORT; empty: that of PARAFUSE_SERVER, or this machine's port 8000."""
        own = environ.get(SERVER_ENV, "") or LOCAL
        self.address = (address.strip() or own).rstrip("/")
        if urlsplit(self.address).scheme not in ("http", "https") or not urlsplit(self.address).hostname:
            raise ServerError(f"server {self.address!r}: must be an address such as {LOCAL}.")
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy, and no key from a netrc file
        if environ.get(KEY_ENV) and _origin(self.address) == _origin(own):
            self._session.headers["authorization"] = f"Bearer {environ[KEY_ENV]}"

    def submit(self, fields: Mapping[str, Any]) -> str:
        """A new job for pictures from a text; its id."""
        body = {name: value for name, value in fields.items() if value is not None}
        return self._ask("POST", "/v1/images/generations", json=body | {"background": True}).json()["id"]

    def submit_edit(self, fields: Mapping[str, Any], images: Sequence[bytes], mask: bytes | None) -> str:
        """A new job for pictures from pictures, which are PNG; its id."""
        form = {name: _as_text(value) for name, value in fields.items() if value is not None}
        files = [("image[]", (f"{number}.png", data, "image/png")) for number, data in enumerate(images)]
        files += [] if mask is None else [("mask", ("mask.png", mask, "image/png"))]
        return self._ask("POST", "/v1/images/edits", data=form | {"background": "true"}, files=files).json()["id"]

    def events(self, job: str) -> Iterator[Event]:
        """Until the job is over. A connection that breaks is opened again: jobs outlive their server."""
        until_s = time.monotonic() + BACK_S
        while True:
            try:
                with self._ask("GET", f"/v1/jobs/{job}/events", stream=True) as answer:
                    for event in _events(answer.iter_lines()):
                        until_s = time.monotonic() + BACK_S
                        yield event
                        if event.name in OVER:
                            return
            except UnreachableError:
                if time.monotonic() > until_s:
                    raise
            except requests.RequestException:  # while it was read
                pass
            time.sleep(AGAIN_S)

    def cancel(self, job: str) -> None:
        self._ask("DELETE", f"/v1/jobs/{job}")

    def pictures(self, job: Mapping[str, Any]) -> list[bytes]:
        """All outputs of a job that is done. Its `n` says how many; addresses in it are not followed."""
        return [self._ask("GET", f"/v1/files/{job['id']}/{number}").content for number in range(job["n"])]

    def receipt(self, job: str) -> str:
        """JSON: what was painted, and how."""
        return self._ask("GET", f"/v1/receipts/{job}").text

    def code(self, task: str, data: bytes, shape: Sequence[int], dtype: str) -> tuple[bytes, list[int], str]:
        """`decode` or `encode` by the server's autoencoder alone, of a tensor as plain bytes: the same of what it gave.
        Latents are as the autoencoder takes them, without a scaling."""
        query: dict[str, Any] = {"shape": list(shape), "dtype": dtype, "do_scaling": "false", "deadline_s": CODE_S}
        if task == "decode":
            query["output_type"] = "pt"
        answer = self._ask(
            "POST", f"/v1/vae/{task}", params=query, data=data, headers={"content-type": TENSOR},
            answer_s=CODE_S + ANSWER_S,
        )  # fmt: skip
        return answer.content, json.loads(answer.headers["shape"]), answer.headers["dtype"]

    def _ask(self, method: str, path: str, answer_s: float = ANSWER_S, **more: Any) -> requests.Response:
        """Raises ServerError with what the server says; ConnectionError only of a stream that is read."""
        try:
            answer = self._session.request(
                method, self.address + path, timeout=(CONNECT_S, answer_s), allow_redirects=False, **more
            )
        except requests.ConnectionError as error:
            raise UnreachableError(
                f"no parafuse server answers at {self.address}: start one (parafuse serve), or set {SERVER_ENV}."
            ) from error
        except requests.Timeout as error:
            raise UnreachableError(f"{self.address} has not answered for {answer_s:.0f} s.") from error
        if not 200 <= answer.status_code < 300:
            raise ServerError(_fault(answer, self.address))
        return answer


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _fault(answer: requests.Response, address: str) -> str:
    """What an answer that is an error says, in one line."""
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{address} answered {answer.status_code}, and is no parafuse server."
    hint = (
        f" Set {KEY_ENV}, and {SERVER_ENV} to this server, where ComfyUI starts." if answer.status_code == 401 else ""
    )
    return f"{message}{hint}"


def _events(lines: Iterator[bytes]) -> Iterator[Event]:
    """Of a stream of server-sent events; comments are left out."""
    name, data = "message", list[str]()
    for line in (one.decode() for one in lines):
        if not line:
            if data:
                yield Event(name, json.loads("\n".join(data)))
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        if field == "event":
            name = value.removeprefix(" ")
        elif field == "data":
            data.append(value.removeprefix(" "))
