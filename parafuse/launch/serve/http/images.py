"""POST /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from parafuse.launch.serve.card import IMAGE, MASK
from parafuse.launch.serve.http import answers, openapi
from parafuse.launch.serve.http.errors import GONE, cancelled, invalid, of_job
from parafuse.launch.serve.http.events import PictureEvents
from parafuse.launch.serve.http.service import Service, digest_of
from parafuse.launch.serve.http.uploads import MAX_PICTURES, Form, form_of, json_of, keep
from parafuse.launch.serve.http.wire import EditBody, ImageBody, read_form, read_json
from parafuse.launch.serve.jobs import Job, State

PICTURES = {"image": "image", "image[]": "image", "mask": "mask"}


class Images:
    """Pictures: waited for, streamed, or as a job in the background."""

    def __init__(self, service: Service):
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(tags=["images"])
        one = openapi.PICTURE
        pictures = {"image": one, "image[]": {"type": "array", "items": one}, "mask": one}
        told = openapi.answers(404, 409, 429, 500) | {202: {"description": "A job, where background is true."}}
        router.add_api_route(
            "/v1/images/generations", self.generate, methods=["POST"], responses=told, response_model=None,
            openapi_extra=openapi.json_body(ImageBody),
        )  # fmt: skip
        router.add_api_route(
            "/v1/images/edits", self.edit, methods=["POST"], responses=told, response_model=None,
            openapi_extra=openapi.form_body(EditBody, pictures, needed=["prompt"], json=False),
        )  # fmt: skip
        return router

    async def generate(self, request: Request) -> Response:
        """Pictures from a text."""
        service = self._service
        body = read_json(ImageBody, await json_of(request))
        service.painting.must_be("image")
        wanted = service.painting.image(body, loras=await service.loras(body))
        job = await service.submit(request, body, wanted, digest=digest_of("image", body))
        return await self._answer(request, body, job)

    async def edit(self, request: Request) -> Response:
        """Pictures from a text and pictures, where the pipeline takes any."""
        service = self._service
        service.painting.must_be("image")
        if not service.card.takes(IMAGE):
            raise invalid("image", f"the model {service.card.name!r} takes no pictures; use /v1/images/generations.",
                          "unsupported_parameter")  # fmt: skip
        async with form_of(request, PICTURES) as form:
            body = read_form(EditBody, plain_fields(form))
            if not form.pictures.get("image"):
                raise invalid("image", "must be given.", "missing_required_parameter")
            service.painting.image(body, loras=await service.loras(body))  # wrong words cost no decoding
            images, hashes = await brought(service, form.pictures, {"image": IMAGE, "mask": MASK})
        wanted = service.painting.image(body, images, loras=await service.loras(body))
        job = await service.submit(request, body, wanted, digest=digest_of("edit", body, hashes))
        return await self._answer(request, body, job)

    async def _answer(self, request: Request, body: ImageBody, job: Job) -> Response:
        service, base = self._service, str(request.base_url)
        if body.is_background:
            return JSONResponse(answers.job_object(job, base), 202, {"location": f"/v1/jobs/{job.id}"})
        if body.stream:
            return PictureEvents(service, job).answer()
        over = await until_over(service, request, job)
        if over is None:
            return Response(status_code=GONE)
        if over.state is not State.DONE:
            raise cancelled(over.id) if over.state is State.CANCELLED else of_job(over.id, over.error)
        return Response(await service.worked(self._pictures, over, body, base), media_type="application/json")

    def _pictures(self, job: Job, body: ImageBody, base: str) -> bytes:
        """The whole answer, encoded: pictures of megabytes would hold up the loop."""
        if body.response_format == "url":
            data: list[dict[str, Any]] = [{"url": url} for url in answers.file_urls(job, base)]
        else:
            data = [{"b64_json": answers.as_base64(self._service.output(job, at))} for at in range(len(job.files))]
        data = [{**one, "seed": job.request.seed + index} for index, one in enumerate(data)]
        return msgspec.json.encode(answers.images_object(job, data))


async def until_over(service: Service, request: Request, job: Job) -> Job | None:
    """The job once it is over; None where the client went before, and its job with it."""
    gone = asyncio.create_task(_gone(request))
    over = asyncio.create_task(service.ended(job))
    try:
        await asyncio.wait((gone, over), return_when=asyncio.FIRST_COMPLETED)
        if over.done():
            return over.result()
    except asyncio.CancelledError:  # Ray Serve says so of a client that has gone
        await service.left_by(job)
        raise
    finally:
        for task in (gone, over):
            task.cancel()
        await asyncio.gather(gone, over, return_exceptions=True)
    await service.left_by(job)
    return None


async def _gone(request: Request) -> None:
    """Until the client has closed the connection: its body has been read, nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def plain_fields(form: Form) -> Mapping[str, Any]:
    """A form's fields, with the JSON that some of them hold."""
    fields = dict(form.fields)
    if "lora" in fields:
        try:
            fields["lora"] = msgspec.json.decode(fields["lora"])
        except msgspec.DecodeError as error:
            raise invalid("lora", 'must be JSON, such as [{"name": "X", "scale": 0.8}].') from error
    return fields


async def brought(
    service: Service, pictures: Mapping[str, list[Any]], keywords: Mapping[str, str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, list[str]]]:
    """Stores a form's pictures: files by the pipeline's keyword, and hashes of what came. Nothing stays where one of
    them is wrong. `keywords`: field -> keyword."""
    images: dict[str, tuple[str, ...]] = {}
    hashes: dict[str, list[str]] = {}
    try:
        for name, keyword in keywords.items():
            given = pictures.get(name, [])
            if given and not service.card.takes(keyword):
                raise invalid(
                    name, f"the model {service.card.name!r} takes none; leave it out.", "unsupported_parameter"
                )
            if len(given) > (MAX_PICTURES if name == "image" else 1):
                raise invalid(name, f"{len(given)} given; at most {MAX_PICTURES if name == 'image' else 1} are taken.")
            for one in given:
                file, digest = await keep(service, name, one, is_mask=keyword == MASK)
                images[keyword] = (*images.get(keyword, ()), file)
                hashes.setdefault(keyword, []).append(digest)
    except BaseException:
        await service.forget([file for files in images.values() for file in files])
        raise
    return images, hashes
