"""Errors as clients get them: the body that OpenAI's clients expect, with one clear line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from parafuse.errors import ConfigError, ParafuseError
from parafuse.launch.serve.jobs import IdempotencyError, JobError, QueueFullError

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 408: "timeout_error", 409: "conflict_error",
    413: "invalid_request_error", 429: "rate_limit_error",
    500: "server_error", 503: "service_unavailable_error",
}  # fmt: skip
NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients try 408, 409, 429 and 5xx again by themselves; this tells them not to."""
RETRY_S = 5.0
GONE = 499
"""Never sent: the client has gone. For the log and for metrics."""


class ApiError(ParafuseError):
    """What a request is answered with. `message`: one line for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ):
        """`extra`: more fields of the body's error."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers, self.extra = dict(headers or {}), dict(extra or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error | self.extra}


class BodyError(HTTPException):
    """A body that is too long or too slow: raised where it is read, and known to the libraries that read it."""


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A 400: what was asked is wrong, and will be wrong again."""
    return ApiError(400, f"{param}: {message}" if param else message, code=code, param=param)


def missing(what: str, name: str) -> ApiError:
    """A 404, the same for what is not there and for what is another key's."""
    return ApiError(404, f"There is no {what} {name[:80]!r}.", code="not_found")


def retry_after(seconds: float | None) -> dict[str, str]:
    """The header that says when to ask again."""
    return {"retry-after": str(max(1, math.ceil(RETRY_S if seconds is None else seconds)))}


def unavailable(message: str, *, code: str = "unavailable", seconds: float | None = None) -> ApiError:
    """A 503: the same request may succeed later."""
    return ApiError(503, message, code=code, headers=retry_after(seconds))


def of_job(job: str, error: JobError | None) -> ApiError:
    """What a client that waits for a job is told of its failure."""
    kind, message = (error.kind, error.message) if error else ("internal", "it failed without a reason.")
    status = {"invalid": 400, "unsupported": 400, "memory": 413, "deadline": 408, "lost": 503}.get(kind, 500)
    return ApiError(status, f"Job {job}: {message}", code=f"job_{kind}", headers=NO_RETRY, extra={"job": job})


def cancelled(job: str) -> ApiError:
    """What a client that waits for a job is told when somebody has cancelled it."""
    return ApiError(409, f"Job {job} was cancelled.", code="job_cancelled", headers=NO_RETRY, extra={"job": job})


def response_of(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any error of a handler as what the client gets; one that nobody expected becomes a 500 that says nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="key_queue_full" if error.of_key else "queue_full",
                        headers=retry_after(None))  # fmt: skip
    if isinstance(error, IdempotencyError):
        return ApiError(409, str(error), code="idempotency_mismatch", param="Idempotency-Key", headers=NO_RETRY)
    if isinstance(error, ConfigError):
        return invalid(None, str(error))
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        return ApiError(error.status_code, str(error.detail), code=_code(error.status_code), headers=headers)
    if isinstance(error, OSError):  # the store's too: a full disk, a locked database
        return unavailable("The server cannot read or write its jobs at the moment.", code="store")
    return ApiError(500, "The server met an error that it did not expect; its log says more.", code="internal")


def _code(status: int) -> str:
    return {404: "not_found", 405: "method_not_allowed", 408: "body_too_slow", 413: "body_too_large"}.get(
        status, "invalid_request"
    )


async def answer(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for all errors of routes."""
    told = as_api_error(error)
    request.scope["parafuse.code"] = told.code
    if told.status >= 500 and not isinstance(error, ApiError):
        log = structlog.get_logger("parafuse.http")
        log.error("store", request_id=request.scope.get("parafuse.id"), error=f"{type(error).__name__}: {error}")
    return response_of(told)


def install(app: FastAPI) -> None:
    """Every error of a route gets the one body."""
    for kind in (ParafuseError, HTTPException, OSError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnect, _nobody)


async def _nobody(_: Request, __: Exception) -> Response:
    """The client went before its body was whole: nobody reads this, and it is no error of ours."""
    return Response(status_code=GONE)
