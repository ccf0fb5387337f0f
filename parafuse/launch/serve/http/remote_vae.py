"""POST /v1/vae/decode and /v1/vae/encode: the model's autoencoder for pipelines elsewhere, as diffusers'
`remote_decode` and `remote_encode` ask for it: parameters in the query, plain bytes in the body, and the answer's shape
and dtype in headers."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from parafuse.errors import ConfigError
from parafuse.launch.serve.http import openapi
from parafuse.launch.serve.http.errors import GONE, ApiError, cancelled, invalid, of_job
from parafuse.launch.serve.http.files import file_response
from parafuse.launch.serve.http.images import until_over
from parafuse.launch.serve.http.painting import FRAMES_PER_SECOND
from parafuse.launch.serve.http.service import Service, digest_of
from parafuse.launch.serve.http.uploads import plain_picture
from parafuse.launch.serve.http.wire import CodeQuery, DecodeQuery, EncodeQuery, read_query
from parafuse.launch.serve.jobs import Job, JobRequest, State
from parafuse.launch.serve.latents import check_shape, num_bytes
from parafuse.launch.serve.messages import Coding

TENSOR = "tensor/binary"
"""What diffusers calls the plain bytes of a tensor."""
TENSOR_FORMAT = "safetensors"
JPEG = {"jpg": "jpeg", "png": "png"}
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "U8": "uint8"}
"""As safetensors names them -> as diffusers does."""
CHUNK_BYTES = 1 << 20
JOB_HEADER = "x-job"


class RemoteVae:
    """The autoencoder of one server's model. Each request is a job, and is waited for."""

    def __init__(self, service: Service):
        self._service = service

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1/vae", tags=["vae"])
        told = openapi.answers(404, 409, 429, 500)
        for path, make, kind in (("/decode", self.decode, DecodeQuery), ("/encode", self.encode, EncodeQuery)):
            router.add_api_route(
                path, make, methods=["POST"], responses=told, response_class=StreamingResponse, response_model=None,
                openapi_extra=openapi.query(kind),
            )  # fmt: skip
        return router

    async def decode(self, request: Request) -> Response:
        """Latents to a picture, a video or a tensor."""
        self._check_model(request)
        query = read_query(DecodeQuery, request.query_params)
        coding = self._decoding(query, gives_of(query, request.headers.get("accept", "")))
        data = await body_of(request, num_bytes(coding))
        wanted = JobRequest(
            kind="decode",
            prompt="",
            seed=0,
            coding=coding,
            format={"picture": JPEG[query.image_format], "video": "mp4"}.get(coding.gives, TENSOR_FORMAT),
            frames_per_second=query.fps or FRAMES_PER_SECOND,
        )
        return await self._answer(request, query, wanted, {"tensor": data})

    async def encode(self, request: Request) -> Response:
        """A picture, or pixels, to latents."""
        self._check_model(request)
        query = read_query(EncodeQuery, request.query_params)
        if (query.shape is None) != (query.dtype is None):
            raise invalid("dtype", "and shape are given both, with pixels, or neither, with a picture.")
        if query.shape is not None:
            coding = self._encoding(query)
            name, data = "tensor", await body_of(request, num_bytes(coding))
        else:
            most = self._service.settings.max_pixels
            name, sent = "image", await body_of(request)
            data, (width, height) = await self._service.worked(_plain, sent, most)
            coding = self._encoding(query, height=height, width=width)
        wanted = JobRequest(kind="encode", prompt="", seed=0, coding=coding, format=TENSOR_FORMAT)
        return await self._answer(request, query, wanted, {name: data})

    def _check_model(self, request: Request) -> None:
        """Raises ApiError (400) where the model has no VAE, or where it is asked in another form."""
        card = self._service.card
        if not card.may_have_vae:
            raise invalid(None, f"The model {card.name!r} has no component vae.", "unsupported_parameter")
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent.startswith(("application/json", "multipart/")):
            message = f"The body must be plain bytes ({TENSOR}), with their shape in the query; it is {sent[:80]}."
            raise invalid(None, message, "wrong_content_type")

    def _decoding(self, query: DecodeQuery, gives: str) -> Coding:
        if query.partial_postprocess and query.output_type != "pt":
            raise invalid("partial_postprocess", "is for output_type=pt; leave it out.")
        if query.fps is not None and query.output_type != "mp4":
            raise invalid("fps", "is for output_type=mp4; leave it out.")
        latents = {"shape": tuple(query.shape), "dtype": query.dtype, "height": query.height, "width": query.width}
        return self._checked(Coding(task="decode", gives=gives, **latents, **self._common(query)))

    def _encoding(self, query: EncodeQuery, *, height: int | None = None, width: int | None = None) -> Coding:
        shape, dtype = tuple(query.shape or ()), query.dtype or ""
        return self._checked(
            Coding(task="encode", shape=shape, dtype=dtype, height=height, width=width, **self._common(query))
        )

    def _common(self, query: CodeQuery) -> dict[str, Any]:
        own = query.do_scaling is True
        for name in ("scaling_factor", "shift_factor"):
            if own and getattr(query, name) is not None:
                message = "cannot stand beside do_scaling, which takes the model's own; with diffusers' client, give "
                raise invalid(name, f"{message}scaling_factor too, or neither.")
        settings = self._service.settings
        return {
            "own_scaling": own,
            "scaling_factor": query.scaling_factor,
            "shift_factor": query.shift_factor,
            "max_pixels": settings.max_pixels,
            "max_frames": settings.max_frames,
        }

    def _checked(self, coding: Coding) -> Coding:
        """Raises ApiError (400) for shapes that the model cannot take, as far as that is known here."""
        facts = self._service.card.autoencoder
        try:
            if coding.shape or coding.task == "decode":
                check_shape(coding, self._service.settings.max_outputs)
            if facts is not None:
                facts.check(coding)
        except ConfigError as error:
            name, _, rest = str(error).partition(": ")
            raise invalid(name, rest) from error
        return coding

    async def _answer(
        self, request: Request, query: CodeQuery, wanted: JobRequest, brought: dict[str, bytes]
    ) -> Response:
        """Stores what was brought and a job for it; its outcome. Raises ApiError."""
        service = self._service
        ((name, data),) = brought.items()
        suffix = ".png" if name == "image" else ".bin"
        sent = (await service.worked(hashlib.sha256, data)).hexdigest()
        file = await service.worked(service.folders.add_input, data, suffix)
        wanted = msgspec.structs.replace(wanted, images={name: (file,)}, asked={"model": service.card.name})
        gives = wanted.coding.gives if wanted.coding else ""
        job = await service.submit(
            request, query, wanted, digest=digest_of(f"{wanted.kind} {gives}", query, {name: [sent]})
        )
        over = await until_over(service, request, job)
        if over is None:
            return Response(status_code=GONE)
        if over.state is not State.DONE:
            raise cancelled(over.id) if over.state is State.CANCELLED else of_job(over.id, over.error)
        if wanted.format != TENSOR_FORMAT:
            answer = await file_response(service, over, 0)
            answer.headers[JOB_HEADER] = over.id
            return answer
        return await self._tensor(over)

    async def _tensor(self, job: Job) -> Response:
        path = self._service.output(job, 0)
        dtype, shape, begins, size = await self._service.worked(read_header, path)
        headers = {
            "shape": json.dumps(shape), "dtype": dtype, "content-length": str(size), JOB_HEADER: job.id,
        }  # fmt: skip
        return StreamingResponse(_pieces(path, begins), media_type=TENSOR, headers=headers)


def gives_of(query: DecodeQuery, accept: str) -> str:
    """As `Coding.gives`. diffusers' client says by Accept that it was given a processor, and wants no picture then."""
    if query.output_type == "pt":
        return "bytes" if query.partial_postprocess else "raw"
    if query.output_type == "mp4":
        return "video"
    return "unit" if TENSOR in accept.lower() else "picture"


async def body_of(request: Request, expected: int | None = None) -> bytes:
    """The body. Raises ApiError (400) unless it has as many bytes as expected; it is not read further than that."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if expected is not None and len(body) > expected:
            break
    if not body:
        raise invalid(None, "The body is empty; it must be a tensor's bytes, or of encode a picture.")
    if expected is not None and len(body) != expected:
        there = f"more than {expected}" if len(body) > expected else str(len(body))
        raise invalid("shape", f"with this dtype has {expected} bytes, and {there} came.")
    return bytes(body)


def read_header(path: Path) -> tuple[str, list[int], int, int]:
    """(dtype, shape, where its values begin, their bytes) of the one tensor of a file that a rank has written. Blocks.
    Raises ApiError (500) for another."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        (tensor,) = (value for name, value in header.items() if name != "__metadata__")
        first, last = tensor["data_offsets"]
        return DTYPES[tensor["dtype"]], list(tensor["shape"]), 8 + length + first, last - first
    except (ValueError, KeyError, TypeError) as error:
        raise ApiError(500, "The tensor that was written cannot be read.", code="internal") from error


def _pieces(path: Path, begins: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begins)
        while piece := file.read(CHUNK_BYTES):
            yield piece


def _plain(data: bytes, max_pixels: int) -> tuple[bytes, tuple[int, int]]:
    """A picture as plain PNG, and its width and height. Blocks. Raises ApiError (400)."""
    from PIL import Image

    picture = plain_picture(data, "image", max_pixels, False)
    with Image.open(io.BytesIO(picture)) as found:
        return picture, found.size
