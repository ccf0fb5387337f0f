"""Around every request: an id, a line in the log, numbers for metrics, and whose key it came with.

Nothing of a request but its method, route and outcome is logged: never a prompt, never a key."""

from __future__ import annotations

import base64
import re
import secrets
import time
from typing import Any, Protocol
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parafuse.launch.serve.http.errors import GONE, ApiError, as_api_error, response_of
from parafuse.launch.serve.http.limits import ClientStalledError, log_stalled
from parafuse.launch.serve.http.metrics import Metrics
from parafuse.launch.serve.http.page import FILES
from parafuse.launch.serve.keys import Key
from parafuse.launch.serve.settings import LOOPBACK

REQUEST_ID = re.compile(r"[\w.-]{1,100}", re.ASCII)
OPEN = ("/health/live", "/health/ready")
"""What needs no key, beside the page's files."""
CODING = "/v1/vae/"
SECURE = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


class Keys(Protocol):
    """The server's keys."""

    @property
    def none_needed(self) -> bool:
        """No keys are set: whoever reaches the server is `local`."""
        ...

    def owner_of(self, authorization: str | None) -> Key | None:
        """By the Authorization header; None where it holds none of the keys."""
        ...


class Access:
    """ASGI middleware: id, log, metrics. The outermost, so that it sees every answer, and answers what nobody has."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics):
        self.app, self.metrics = app, metrics
        self._log = structlog.get_logger("parafuse.http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        scope["parafuse.id"], begun_s, status = request_id, time.perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in SECURE.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except ClientStalledError as error:
            log_stalled(request_id, error)
            raise
        except Exception as error:
            self._log.error("failed", request_id=request_id, exc_info=error)
            if status:
                raise  # the answer has begun: the server closes the connection
            await response_of(as_api_error(error))(scope, receive, sent)
        finally:
            self._note(scope, status or GONE, time.perf_counter() - begun_s)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        self.metrics.request(scope["method"], route, status, seconds)
        if route in OPEN:
            return  # asked every second; the supervisor logs how it stands
        owner: Any = scope.get("parafuse.owner")
        self._log.info(
            "request",
            request_id=scope["parafuse.id"],
            method=scope["method"],
            route=route,
            status=status,
            seconds=round(seconds, 4),
            key=getattr(owner, "id", None),
            job=scope.get("parafuse.job"),
            code=scope.get("parafuse.code"),
        )


class Door:
    """ASGI middleware: who asks. Before any byte of a body is read."""

    def __init__(self, app: ASGIApp, *, keys: Keys):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"] in FILES:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = _foreign(headers) if self.keys.none_needed else None
        if error is None:
            owner = self.keys.owner_of(_authorization(scope["path"], headers))
            if owner is not None:
                scope["parafuse.owner"] = owner
                await self.app(scope, receive, send)
                return
            error = ApiError(
                401,
                "A key is needed, as in Authorization: Bearer KEY; none came, or one that is not known here.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        scope["parafuse.code"] = error.code
        await response_of(error)(scope, receive, send)


def _authorization(path: str, headers: Headers) -> str | None:
    """As `Keys.owner_of` takes it. For the autoencoder a password is taken for a key: diffusers' client can be given no
    header, but its HTTP library sends what ~/.netrc, or a URL, has. Not elsewhere: browsers send passwords by
    themselves, whatever page asks."""
    given = headers.get("authorization")
    scheme, _, encoded = (given or "").partition(" ")
    if scheme.lower() != "basic" or not path.startswith(CODING):
        return given
    try:
        return f"Bearer {base64.b64decode(encoded, validate=True).decode().partition(':')[2]}"
    except ValueError:
        return given


def _foreign(headers: Headers) -> ApiError | None:
    """Why a request to a server without keys comes from a web page of another host: a browser on this machine would
    send it for anybody."""
    for name, host in (("host", headers.get("host", "")), ("origin", _host_of(headers.get("origin", "")))):
        try:
            bare = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            bare = "?"
        if bare not in ("", *LOOPBACK):
            return ApiError(
                401,
                f"{name}: without keys this server answers {', '.join(LOOPBACK)} alone. Start it with --keys, and send "
                "a key.",
                code="foreign_host",
            )
    return None


def _host_of(origin: str) -> str:
    return origin.partition("://")[2] or origin
