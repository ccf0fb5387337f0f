"""GET /v1/queue: how the server stands, for the key that asks. Of other keys it tells how many jobs they have waiting,
and nothing else."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from parafuse.launch.serve.http import openapi
from parafuse.launch.serve.http.health import standing
from parafuse.launch.serve.http.service import Service
from parafuse.launch.serve.supervisor_client import FRESH_S


class Queue:
    """The queue of one server."""

    def __init__(self, service: Service):
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(tags=["jobs"])
        router.add_api_route("/v1/queue", self.get, methods=["GET"], responses=openapi.answers())
        return router

    async def get(self, request: Request) -> dict[str, Any]:
        """What waits, and how far the call is that runs."""
        service = self._service
        state, why = standing(service)
        owner = request.scope["parafuse.owner"].id
        return {
            "object": "queue",
            "state": state,
            "why": why,
            "queued": await service.stored(service.store.num_queued),
            "queued_of_key": await service.stored(service.store.num_queued, owner),
            "running": self._running(),
        }

    def _running(self) -> dict[str, Any] | None:
        status, age_s = self._service.supervisor.status, self._service.supervisor.status_age_s
        if status is None or not status.call or age_s > FRESH_S:
            return None
        left_s = max(0.0, status.call_left_s - age_s)
        return {"step": status.step, "steps": status.num_steps, "seconds_left": round(left_s, 2)}
