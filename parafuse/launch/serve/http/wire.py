"""The fields of requests, and what each may hold. Unknown ones are refused by name; none is accepted and ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import QueryParams

from parafuse.errors import nearest
from parafuse.launch.serve.http.errors import ApiError, invalid

NOT_OFFERED = {
    "quality": "leave it out, or auto; more steps paint more carefully",
    "style": "describe the style in the prompt",
    "output_compression": "choose output_format png, jpeg or webp",
    "input_fidelity": "use strength, where the model takes it",
    "complexity": "use steps",
    "frame_count": "ask for a video at /v1/videos",
    "frame_duration_ms": "ask for a video at /v1/videos",
    "svg": "choose output_format png, jpeg or webp",
    "markup": "draw on the picture that you send",
}
"""Fields of OpenAI's of which these values would change nothing here, and what does; null is taken."""
SHOWN = 60
MAX_SEED = 2**53 - 1
"""What JSON carries whole in every language."""


class Lora(BaseModel):
    """A LoRA of the server's folder."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=200, description="A file of --loras, without .safetensors.")
    scale: float = Field(default=1.0, ge=-10, le=10, allow_inf_nan=False, description="How strong it is.")


class Common(BaseModel):
    """What requests of every kind have."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(description="What is to be seen; at most --max-prompt-characters.")
    model: str | None = Field(default=None, description="The model served; not needed.", max_length=500)
    size: str | None = Field(
        default=None,
        max_length=20,
        description="WIDTHxHEIGHT in pixels, at most --max-pixels, or auto: the model's own size.",
    )
    user: str | None = Field(default=None, max_length=200, description="Your own word for who asked; the job says it.")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Output i of a request has seed + i. Not given: drawn, and told."
    )
    steps: int | None = Field(default=None, ge=1, description="Denoising steps, at most --max-steps.")
    guidance: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        allow_inf_nan=False,
        description="The pipeline's guidance_scale, or true_cfg_scale where the model sets that.",
    )
    negative_prompt: str | None = Field(default=None, description="What is not to be seen, where the model takes it.")
    lora: list[Lora] | None = Field(default=None, max_length=8, description="Adapters for this request alone.")
    cache: bool | None = Field(default=None, description="false: without the cache that the server was started with.")
    priority: int | None = Field(
        default=None, ge=-10, le=10, description="Higher goes first; at most the key's priority_max."
    )
    deadline_s: float | None = Field(
        default=None,
        gt=0,
        le=86400 * 30,
        allow_inf_nan=False,
        description="Seconds from now until it is worth nothing: refused where that is known before, else failed.",
    )
    webhook_url: str | None = Field(
        default=None, max_length=2000, description="Told of the job's end; of --webhook-hosts, for keys that may."
    )


class ImageBody(Common):
    """POST /v1/images/generations."""

    n: int | None = Field(default=None, ge=1, description="Pictures, at most --max-outputs.")
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None, description="Pictures in the answer, or where this key fetches them. Not given: b64_json."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        default=None, description="Not given: png. jpeg and webp are lossy."
    )
    stream: bool | None = Field(default=None, description="true: answered with events.")
    partial_images: int | None = Field(
        default=None, ge=0, le=3, description="Previews on the way; with stream or background."
    )
    background: bool | Literal["opaque", "auto"] | None = Field(
        default=None, description="true: answered at once with a job."
    )
    quality: Literal["auto"] | None = Field(default=None, description="Use steps.")
    moderation: Literal["auto"] | None = Field(default=None, description="There is none here.")
    safety_identifier: str | None = Field(default=None, max_length=200, description="As user.")
    # OpenAI's, which would change nothing here: NOT_OFFERED says what does
    style: None = None
    output_compression: None = None
    input_fidelity: None = None
    complexity: None = None
    frame_count: None = None
    frame_duration_ms: None = None
    svg: None = None
    markup: None = None

    @property
    def is_background(self) -> bool:
        return self.background is True


class EditBody(ImageBody):
    """POST /v1/images/edits, beside its pictures."""

    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="How far from the picture that was sent, where the model takes it.",
    )


class VideoBody(Common):
    """POST /v1/videos, beside its picture."""

    seconds: float | str | None = Field(
        default=None,
        description="Length, at most --max-frames. Neither it nor frames: the model's own, or 4 where it has none.",
    )
    frames: int | None = Field(default=None, ge=1, description="Length in pictures, in place of seconds.")
    fps: int | None = Field(default=None, ge=1, le=120, description="Pictures a second. Not given: 16.")


class CodeQuery(BaseModel):
    """What requests to the autoencoder have in common. All of it stands in the query, as diffusers' client sends it."""

    model_config = ConfigDict(extra="forbid")
    scaling_factor: float | None = Field(
        default=None, gt=0, le=1000, allow_inf_nan=False, description="Latents are divided by it; in encode multiplied."
    )
    shift_factor: float | None = Field(
        default=None,
        ge=-1e6,
        le=1e6,
        allow_inf_nan=False,
        description="Added to latents then; of encode, taken off first.",
    )
    do_scaling: bool | None = Field(
        default=None,
        description="true: scaled and shifted as the autoencoder's configuration says, in place of the two above.",
    )
    priority: int | None = Field(
        default=None, ge=-10, le=10, description="Higher goes first; at most the key's priority_max."
    )
    deadline_s: float | None = Field(
        default=None,
        gt=0,
        le=86400 * 30,
        allow_inf_nan=False,
        description="Seconds from now until it is worth nothing.",
    )

    @property
    def webhook_url(self) -> None:
        """Whoever asks waits for the answer."""


Dtype = Literal["float16", "bfloat16", "float32"]


class DecodeQuery(CodeQuery):
    """POST /v1/vae/decode."""

    shape: list[int] = Field(
        max_length=5, description="Of the latents: (B, C, H, W), (B, C, F, H, W), or packed (B, tokens, 4 C). Repeated."
    )
    dtype: Dtype = Field(description="Of the latents.")
    output_type: Literal["pil", "pt", "mp4"] = Field(
        default="pil", description="A picture; a tensor; a video. pil with Accept: tensor/binary: a tensor of 0 to 1."
    )
    image_format: Literal["png", "jpg"] = Field(default="jpg", description="Of a picture.")
    partial_postprocess: bool = Field(default=False, description="With pt. true: uint8, (N, H, W, C), as it is shown.")
    height: int | None = Field(default=None, ge=1, le=1 << 24, description="Needed with packed latents: in pixels.")
    width: int | None = Field(default=None, ge=1, le=1 << 24, description="Needed with packed latents: in pixels.")
    fps: int | None = Field(default=None, ge=1, le=120, description="Pictures a second, with mp4. Not given: 16.")


class EncodeQuery(CodeQuery):
    """POST /v1/vae/encode."""

    shape: list[int] | None = Field(
        default=None,
        max_length=5,
        description="Of pixels from -1 to 1: (B, C, H, W), (B, C, F, H, W). Repeated. Not given: a picture is sent.",
    )
    dtype: Dtype | None = Field(default=None, description="Of these pixels.")


Body = TypeVar("Body", bound=BaseModel)


def read_json(kind: type[Body], body: bytes) -> Body:
    """A body of JSON. Raises ApiError (400) for the first fault, by its field."""
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise told(error, kind) from error
    except (ValueError, RecursionError) as error:
        raise invalid(None, "The body is no JSON that can be read.", "invalid_json") from error


def read_form(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    """A form's fields, which are texts. Raises ApiError (400) for the first fault, by its field."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise told(error, kind) from error


def read_query(kind: type[Body], query: QueryParams) -> Body:
    """A query's parameters. Raises ApiError (400) for the first fault, by its name, and for one that is there twice."""
    fields: dict[str, Any] = {}
    for name in query:
        values = query.getlist(name)
        if name != "shape" and len(values) > 1:
            raise invalid(name[:80], "is given twice; leave one out.")
        fields[name] = values if name == "shape" else values[0]
    return read_form(kind, fields)


def told(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    """The first fault in one line."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"] if part not in ("bool", "float", "str") and "[" not in str(part)]
    name, value = ".".join(path)[: SHOWN * 2], repr(first.get("input"))
    if first["type"] == "json_invalid":
        return invalid(None, "The body is no JSON that can be read.", "invalid_json")
    if name in NOT_OFFERED:
        return invalid(name, f"is not offered here; {NOT_OFFERED[name]}.", "unsupported_parameter")
    if first["type"] == "extra_forbidden":
        allowed = sorted(kind.model_fields) if len(path) == 1 else sorted(Lora.model_fields)
        hint = nearest(name, allowed) or f"; there are {', '.join(allowed)}."
        return invalid(name, f"there is no such field{hint}", "unknown_parameter")
    if first["type"] == "missing":
        return invalid(name, "must be given.", "missing_required_parameter")
    shown = value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
    return invalid(name or None, f"{first['msg']}, and it is {shown}.")
