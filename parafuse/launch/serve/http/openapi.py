"""What the routes say of themselves: bodies that they read on their own, and every answer that they may give."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from parafuse.launch.serve.http.wire import EditBody, ImageBody, VideoBody

COMPONENTS = "#/components/schemas/{model}"
WORDS = {
    400: "What was asked is wrong.", 401: "No key came, or one that is not known.", 403: "This key may not have it.",
    404: "There is no such thing.",
    408: "The body did not come in time, or the job was not done before its deadline.",
    409: "The idempotency key was used for another request, or the job was cancelled.",
    413: "Larger than is taken, or than fits into memory.", 429: "Too much is queued already, or the quota is used up.",
    500: "The job failed, for a reason that is told.", 503: "Not now: starting, ending, or the ranks were lost.",
}  # fmt: skip
PICTURE = {"type": "string", "format": "binary"}
BYTES = "application/octet-stream"


class ErrorDetail(BaseModel):
    """One error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside what it is for. 400, 401, 408, 413 and 503 come from below every route."""
    found = sorted({400, 401, 408, 413, 503, *statuses})
    return {status: {"model": ErrorBody, "description": WORDS[status]} for status in found}


def json_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Documents a body of JSON that the route reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _reference(kind)}}}}


def form_body(kind: type[BaseModel], pictures: dict[str, Any], *, needed: list[str], json: bool) -> dict[str, Any]:
    """The same of a form: the fields of `kind`, and pictures. `json`: whether JSON is taken too."""
    schema = kind.model_json_schema(ref_template=COMPONENTS)
    fields = {name: one for name, one in schema["properties"].items() if one != {"default": None, "type": "null"}}
    form = {"type": "object", "properties": fields | pictures, "required": needed, "additionalProperties": False}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if json:
        content["application/json"] = {"schema": _reference(kind)}
    return {"requestBody": {"required": True, "content": content}}


def query(kind: type[BaseModel]) -> dict[str, Any]:
    """Documents a query that the route reads itself, beside a body of plain bytes."""
    schema = kind.model_json_schema(ref_template=COMPONENTS)
    needed = schema.get("required", [])
    parameters = [
        {"name": name, "in": "query", "required": name in needed, "schema": _not_null(one)}
        for name, one in schema["properties"].items()
    ]
    return {"parameters": parameters, "requestBody": {"required": True, "content": {BYTES: {"schema": PICTURE}}}}


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query has no null: what is not given is left out."""
    left = [one for one in schema.get("anyOf", []) if one != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf" and value is not None}
    return rest | left[0] if left else rest


def describe(app: FastAPI) -> dict[str, Any]:
    """The description of the whole API."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for kind in (ImageBody, EditBody, VideoBody):
            schema = kind.model_json_schema(ref_template=COMPONENTS)
            schemas.update(schema.pop("$defs", {}))
            schemas[kind.__name__] = schema
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}, {}]
        app.openapi_schema = found
    return app.openapi_schema


def _reference(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": COMPONENTS.format(model=kind.__name__)}
