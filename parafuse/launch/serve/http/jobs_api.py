"""/v1/jobs, /v1/files, /v1/receipts and /v1/models: what a key has made, and what it can make."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response, StreamingResponse

from parafuse.launch.serve.http import answers, openapi
from parafuse.launch.serve.http.errors import NO_RETRY, ApiError, invalid, missing
from parafuse.launch.serve.http.events import EventStream, job_events
from parafuse.launch.serve.http.files import file_response
from parafuse.launch.serve.http.offered import offered
from parafuse.launch.serve.http.service import Service


class Jobs:
    """Jobs of one server, each for its owner alone: another key's are not there."""

    def __init__(self, service: Service):
        self._service = service
        self._began_s = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter(tags=["jobs"])
        told, kept = openapi.answers(404), openapi.answers(404, 409)
        router.add_api_route("/v1/jobs", self.list, methods=["GET"], responses=told)
        router.add_api_route("/v1/jobs/{job}", self.get, methods=["GET"], responses=told)
        router.add_api_route("/v1/jobs/{job}", self.cancel, methods=["DELETE"], responses=told)
        router.add_api_route(
            "/v1/jobs/{job}/events", self.events, methods=["GET"], responses=told, response_class=StreamingResponse,
            response_model=None,
        )  # fmt: skip
        router.add_api_route(
            "/v1/files/{job}/{number}", self.file, methods=["GET"], responses=openapi.answers(404, 408, 409, 413, 500),
            response_class=FileResponse, response_model=None,
        )  # fmt: skip
        router.add_api_route("/v1/files/{job}", self.delete, methods=["DELETE"], responses=kept)
        router.add_api_route("/v1/receipts/{job}", self.receipt, methods=["GET"], responses=told, response_model=None)
        router.add_api_route("/v1/models", self.models, methods=["GET"], responses=openapi.answers())
        router.add_api_route("/v1/models/{model:path}", self.model, methods=["GET"], responses=told)
        return router

    async def list(self, request: Request, limit: int = 20, after: str | None = None) -> dict[str, Any]:
        """This key's jobs of all kinds, newest first."""
        service = self._service
        if not 1 <= limit <= 100:
            raise invalid("limit", f"must be from 1 to 100, and it is {limit}.")
        owner, base = request.scope["parafuse.owner"].id, str(request.base_url)
        found = await service.stored(service.store.of_owner, owner, limit=limit + 1, after=after)
        data = [answers.job_object(job, base) for job in found[:limit]]
        return {"object": "list", "data": data, "has_more": len(found) > limit}

    async def get(self, request: Request, job: str) -> dict[str, Any]:
        """How it stands."""
        return answers.job_object(await self._service.find(request, job), str(request.base_url))

    async def cancel(self, request: Request, job: str) -> dict[str, Any]:
        """Cancels it: at once where it waits, at a step's end where it runs; one that is over stays as it is."""
        found = await self._service.find(request, job)
        after = await self._service.cancel(found)
        if after is None:
            raise missing("job", job)
        return answers.job_object(after, str(request.base_url))

    async def events(self, request: Request, job: str) -> Response:
        """Server-sent events: progress and preview, and last done, failed or cancelled with the job."""
        found = await self._service.find(request, job)
        return EventStream(job_events(self._service, found, str(request.base_url)))

    async def file(self, request: Request, job: str, number: str) -> Response:
        """One output."""
        found = await self._service.find(request, job)
        if not (number.isascii() and number.isdecimal() and len(number) <= 4):
            raise missing("file", f"{job}/{number}")
        return await file_response(self._service, found, int(number))

    async def delete(self, request: Request, job: str) -> dict[str, Any]:
        """Takes away a job that is over: its outputs, its receipt, and what is known of it."""
        service = self._service
        found = await service.find(request, job)
        if not found.state.is_over:
            message = f"Job {found.id} is {found.state.value}; cancel it first: DELETE /v1/jobs/{found.id}."
            raise ApiError(409, message, code="not_over", headers=NO_RETRY)
        if not await service.stored(service.store.delete, found.id, found.owner):
            raise missing("job", job)
        return {"id": found.id, "object": "job.deleted", "deleted": True}

    async def receipt(self, request: Request, job: str) -> Response:
        """What was painted, how, and with what: holds the prompt."""
        found = await self._service.find(request, job)
        if not found.receipt:
            raise missing("receipt of job", job)
        return Response(found.receipt, media_type="application/json")

    async def models(self) -> dict[str, Any]:
        """The model that is served, once by each of its names."""
        return {"object": "list", "data": [await self._described(name) for name in self._service.card.names]}

    async def model(self, model: str) -> dict[str, Any]:
        """The same by its name."""
        if not self._service.card.is_called(model):
            raise missing("model", model)
        return await self._described(model)

    async def _described(self, name: str) -> dict[str, Any]:
        card = self._service.card
        return {
            "id": name,
            "object": "model",
            "created": self._began_s,
            "owned_by": "parafuse",
            "kind": card.kind,
            "pipeline": card.pipeline_class,
            "size_multiple": card.size_multiple,
            "takes_images": card.takes("image"),
            "takes_masks": card.takes("mask_image"),
            "loras": await self._service.worked(card.lora_names),
            **offered(self._service.settings, card),
        }
