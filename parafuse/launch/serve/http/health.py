"""/health/live, /health/ready and /metrics: never waits for a rank, nor for the supervisor."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from parafuse.launch.serve.http import openapi
from parafuse.launch.serve.http.errors import ApiError
from parafuse.launch.serve.http.service import Service
from parafuse.launch.serve.supervisor_client import FRESH_S

LATELY_S = 300.0
"""Since each rank's last real step, for a server that is ready; where nobody asks for anything, probes make some."""


def standing(service: Service) -> tuple[str, str]:
    """How the server is, in a word, and why in a line where it is not ready."""
    status, age_s = service.supervisor.status, service.supervisor.status_age_s
    if service.draining or (status is not None and status.state == "draining"):
        return "draining", "the server is ending"
    if status is None:
        return "starting", "the supervisor of the ranks has said nothing yet"
    if age_s > FRESH_S:
        return "silent", f"the supervisor of the ranks has said nothing for {age_s:.1f} s"
    late = [one for one in status.ranks if (one.last_step_age_s or 0.0) + age_s > LATELY_S]
    if status.state == "ready" and late:
        return "slow", f"rank {late[0].rank} has made no step for {late[0].last_step_age_s:.0f} s"
    return status.state, status.why


class Health:
    """How the server is."""

    def __init__(self, service: Service):
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(tags=["health"])
        not_ready: dict[int | str, dict[str, Any]] = {
            503: {"description": "Not ready, and why.", "content": {"application/json": {}}}
        }
        router.add_api_route("/health/live", self.live, methods=["GET"])
        router.add_api_route("/health/ready", self.ready, methods=["GET"], responses=not_ready, response_model=None)
        router.add_api_route(
            "/metrics", self.metrics, methods=["GET"], response_class=PlainTextResponse, response_model=None,
            responses=openapi.answers(403),
        )  # fmt: skip
        return router

    async def live(self) -> dict[str, Any]:
        """This process answers."""
        return {"status": "live"}

    async def ready(self) -> JSONResponse:
        """200 where a real step ran on every rank lately; else 503 with the reason."""
        state, why = standing(self._service)
        return JSONResponse({"status": state, "why": why}, 200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus. Raises ApiError (403)."""
        service = self._service
        if not request.scope["parafuse.owner"].metrics:
            raise ApiError(
                403, "This key may not read metrics, which tell of all keys: serve-key --metrics makes one that may.",
                code="no_metrics",
            )  # fmt: skip
        counts = await service.stored(service.store.counts)
        return Response(await service.worked(service.metrics.page, counts), media_type=CONTENT_TYPE_LATEST)
