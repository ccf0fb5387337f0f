"""From a request's fields to what is to be painted, in the pipeline's own keywords, checked against the model."""

from __future__ import annotations

import re
from typing import Any

from parafuse.engine.request import fresh_seed
from parafuse.errors import ConfigError, nearest
from parafuse.launch.serve.card import ModelCard
from parafuse.launch.serve.http.errors import ApiError, invalid
from parafuse.launch.serve.http.wire import Common, EditBody, ImageBody, VideoBody
from parafuse.launch.serve.jobs import JobRequest
from parafuse.launch.serve.messages import Adapter
from parafuse.launch.serve.settings import Serving

SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
FRAMES_PER_SECOND = 16
SECONDS = 4.0
"""Of a video that says nothing of its length, as OpenAI's."""
FIELDS = {"num_inference_steps": "steps", "num_frames": "frames", "width": "size", "height": "size"}
Images = dict[str, tuple[str, ...]]


class Painting:
    """Makes requests of one model under one server's limits."""

    def __init__(self, settings: Serving, card: ModelCard):
        self.settings, self.card = settings, card

    def must_be(self, kind: str) -> None:
        """Raises ApiError (400) where the model makes the other kind."""
        if self.card.kind != kind:
            other = "/v1/videos" if kind == "image" else "/v1/images/generations"
            raise invalid(
                None, f"The model {self.card.name!r} makes {self.card.kind}s; use {other}.", "wrong_model_kind"
            )

    def image(self, body: ImageBody, images: Images | None = None, loras: list[str] | None = None) -> JobRequest:
        """One request for pictures. `images`: files by the pipeline's keyword. `loras`: names that there are, needed
        where the request has one. Raises ApiError (400, 404)."""
        count = body.n or 1
        if count > self.settings.max_outputs:
            raise invalid("n", f"must be at most {self.settings.max_outputs}, and it is {count}.")
        previews = body.partial_images or 0
        if previews and not (body.stream or body.is_background):
            raise invalid("partial_images", "needs stream, or background: there is nowhere else to send them.")
        if body.stream and body.is_background:
            raise invalid("background", "cannot be true with stream; leave one out.")
        if body.stream and body.response_format == "url":
            raise invalid("response_format", "must be b64_json with stream.")
        settings = self._settings(body)
        if isinstance(body, EditBody) and body.strength is not None:
            settings["strength"] = self._taken("strength", "strength", body.strength)
        return self._request(
            body,
            settings,
            kind="edit" if images else "image",
            num_outputs=count,
            images=images or {},
            loras=loras,
            previews=previews,
            format=body.output_format or "png",
        )

    def video(self, body: VideoBody, images: Images | None = None, loras: list[str] | None = None) -> JobRequest:
        """One request for a video."""
        fps = body.fps or FRAMES_PER_SECOND
        settings = self._settings(body)
        if body.seconds is not None and body.frames is not None:
            raise invalid("frames", "cannot be given with seconds; leave one out.")
        frames = body.frames or (None if body.seconds is not None else self.card.defaults.get("num_frames"))
        if frames is None:
            # one more, because a video VAE makes its first frame of a latent of its own
            frames = round(_seconds(body.seconds) * fps) + 1
        if frames > self.settings.max_frames:
            name = "seconds" if body.seconds is not None else "frames"
            raise invalid(name, f"makes {frames} frames; at most {self.settings.max_frames} are allowed.")
        settings["num_frames"] = frames
        if self.card.accepted is not None and self.card.takes("frame_rate"):
            settings["frame_rate"] = fps
        return self._request(
            body,
            settings,
            kind="video",
            num_outputs=1,
            images=images or {},
            loras=loras,
            format="mp4",
            frames_per_second=fps,
        )

    def _request(
        self, body: Common, settings: dict[str, Any], *, images: Images, loras: list[str] | None, **rest: Any
    ) -> JobRequest:
        self._check_texts(body)
        self._check_model(body)
        lora = tuple(Adapter(name=one.name, scale=one.scale) for one in body.lora or ())
        for index, one in enumerate(lora):
            known = loras or []
            if one.name not in known:
                hint = nearest(one.name, known) or f"; there are {', '.join(known) or 'none'}."
                raise invalid(f"lora.{index}.name", f"there is no LoRA {one.name[:80]!r}{hint}")
        given = settings | {"prompt": body.prompt}
        if body.negative_prompt is not None:
            given["negative_prompt"] = self._taken("negative_prompt", "negative_prompt", body.negative_prompt)
        try:
            self.card.check(given)
        except ConfigError as error:
            raise as_asked(error) from error
        seed = fresh_seed() if body.seed is None else body.seed
        asked = {name: getattr(body, name) for name in ("size", "user") if getattr(body, name) is not None}
        if isinstance(body, ImageBody) and body.safety_identifier:
            asked["safety_identifier"] = body.safety_identifier
        return JobRequest(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            seed=seed,
            settings=settings,
            images=images,
            lora=lora,
            cache=body.cache is not False,
            asked=asked | {"model": body.model or self.card.name},
            **rest,
        )

    def _settings(self, body: Common) -> dict[str, Any]:
        """Keywords of the call: what the model sets by itself, and over it what is asked."""
        settings = self.card.settings
        if body.size is not None and body.size != "auto":
            found = SIZE.fullmatch(body.size)
            if not found:
                raise invalid("size", f"must be WIDTHxHEIGHT, such as 512x768, or auto, and it is {body.size!r}.")
            settings["width"] = self._taken("size", "width", int(found[1]))
            settings["height"] = self._taken("size", "height", int(found[2]))
        pixels = settings.get("width", 1) * settings.get("height", 1)
        if pixels > self.settings.max_pixels:
            raise invalid("size", f"has {pixels} pixels; at most {self.settings.max_pixels} are allowed.")
        if body.steps is not None:
            settings["num_inference_steps"] = self._taken("steps", "num_inference_steps", body.steps)
        if settings.get("num_inference_steps", 0) > self.settings.max_steps:
            raise invalid("steps", f"must be at most {self.settings.max_steps}, and it is {body.steps}.")
        if body.guidance is not None:
            keyword = self.card.guidance
            settings[keyword or ""] = self._taken("guidance", keyword or "guidance_scale", body.guidance)
        return settings

    def _taken(self, name: str, keyword: str, value: Any) -> Any:
        """The value, where the pipeline has a keyword for it."""
        if not self.card.takes(keyword):
            raise invalid(name, f"the model {self.card.name!r} takes none; leave it out.", "unsupported_parameter")
        return value

    def _check_texts(self, body: Common) -> None:
        most = self.settings.max_prompt_characters
        for name in ("prompt", "negative_prompt"):
            text = getattr(body, name)
            if text is not None and len(text) > most:
                raise invalid(name, f"has {len(text)} characters; at most {most} are allowed.", "string_too_long")
            if text is not None and not _is_text(text):
                raise invalid(name, "holds half of a character, which is no text.")

    def _check_model(self, body: Common) -> None:
        if body.model is not None and not self.card.is_called(body.model):
            raise ApiError(
                404,
                f"model: there is no {body.model[:80]!r} here; this server has {self.card.name!r}. Leave it out.",
                code="model_not_found",
                param="model",
            )


def as_asked(error: ConfigError) -> ApiError:
    """The error of a pipeline's keyword under the name that the request has for it."""
    keyword, sign, rest = str(error).partition("=")
    if not sign or keyword not in FIELDS:
        return invalid(None, str(error))
    return invalid(FIELDS[keyword], f"{keyword}={rest}" if FIELDS[keyword] == "size" else f"{rest}")


def _seconds(text: float | str | None) -> float:
    try:
        value = SECONDS if text is None else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 600:
        raise invalid("seconds", f"must be a number above 0 and at most 600, and it is {str(text)[:40]!r}.")
    return value


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
