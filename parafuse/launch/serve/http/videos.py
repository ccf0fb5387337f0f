"""/v1/videos: made in the background, asked after, fetched and deleted, as OpenAI's."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

from parafuse.launch.serve.card import IMAGE
from parafuse.launch.serve.http import answers, openapi
from parafuse.launch.serve.http.errors import ApiError, invalid
from parafuse.launch.serve.http.files import file_response
from parafuse.launch.serve.http.images import brought, plain_fields
from parafuse.launch.serve.http.service import Service, digest_of
from parafuse.launch.serve.http.uploads import form_of, json_of
from parafuse.launch.serve.http.wire import VideoBody, read_form, read_json

PICTURES = {"input_reference": "input_reference", "input_reference[image_url]": "input_reference"}
ENDING_S = 15.0
"""How long deleting waits for a running job to leave its ranks."""


class Videos:
    """Videos of one server."""

    def __init__(self, service: Service):
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/videos", tags=["videos"])
        body = openapi.form_body(VideoBody, {"input_reference": openapi.PICTURE}, needed=["prompt"], json=True)
        new, one = openapi.answers(404, 409, 429), openapi.answers(404)
        router.add_api_route("", self.create, methods=["POST"], responses=new, openapi_extra=body)
        router.add_api_route("", self.list, methods=["GET"], responses=one)
        router.add_api_route("/{video}", self.get, methods=["GET"], responses=one)
        router.add_api_route("/{video}", self.delete, methods=["DELETE"], responses=openapi.answers(404, 409))
        router.add_api_route(
            "/{video}/content", self.content, methods=["GET"], responses=openapi.answers(404, 409, 500),
            response_class=FileResponse, response_model=None,
        )  # fmt: skip
        return router

    async def create(self, request: Request) -> dict[str, Any]:
        """A new video, queued."""
        service = self._service
        service.painting.must_be("video")
        images: dict[str, tuple[str, ...]] = {}
        hashes: dict[str, list[str]] = {}
        if request.headers.get("content-type", "").startswith("application/json"):
            body = read_json(VideoBody, await json_of(request))
        else:
            async with form_of(request, PICTURES) as form:
                body = read_form(VideoBody, plain_fields(form))
                service.painting.video(body, loras=await service.loras(body))  # wrong words cost no decoding
                images, hashes = await brought(service, form.pictures, {"input_reference": IMAGE})
        wanted = service.painting.video(body, images, loras=await service.loras(body))
        job = await service.submit(request, body, wanted, digest=digest_of("video", body, hashes))
        return answers.video_object(job)

    async def list(
        self, request: Request, limit: int = 20, after: str | None = None, order: str = "desc"
    ) -> dict[str, Any]:
        """This key's videos, newest first."""
        service = self._service
        if not 1 <= limit <= 100:
            raise invalid("limit", f"must be from 1 to 100, and it is {limit}.")
        if order != "desc":
            raise invalid("order", "must be desc: newest first is the only order here.")
        owner = request.scope["parafuse.owner"].id
        found = await service.stored(service.store.of_owner, owner, kind="video", limit=limit + 1, after=after)
        data = [answers.video_object(job) for job in found[:limit]]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > limit,
        }

    async def get(self, request: Request, video: str) -> dict[str, Any]:
        """How it stands."""
        return answers.video_object(await self._service.find(request, video, "video", "video"))

    async def content(self, request: Request, video: str, variant: str = "video") -> Response:
        """The MP4, once it is done."""
        if variant != "video":
            raise invalid("variant", "must be video: there is nothing else of it.")
        job = await self._service.find(request, video, "video", "video")
        return await file_response(self._service, job, 0)

    async def delete(self, request: Request, video: str) -> dict[str, Any]:
        """Takes it away; where it is not over yet, it is cancelled first."""
        service = self._service
        job = await service.find(request, video, "video", "video")
        if not job.state.is_over:
            await service.cancel(job)
            await service.over_within(job, ENDING_S)
        if not await service.stored(service.store.delete, job.id, job.owner):
            message = f"The video {job.id} is being cancelled, and its ranks still work; ask again."
            raise ApiError(409, message, code="not_over")
        return {"id": job.id, "object": "video.deleted", "deleted": True}
