"""The nodes. What ComfyUI asks of them: https://docs.comfy.org/custom-nodes/backend/server_overview."""

from __future__ import annotations

import base64
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from .client import OVER, Event, Server, ServerError
from .pictures import as_picture, from_bytes, from_files, from_pixels, to_bytes, to_pixels, to_png

CATEGORY = "parafuse"
T = TypeVar("T")
MAX_SEED = 2**53 - 1
LOOK_S = 0.1
"""How often it is looked whether the user has pressed Cancel."""
PREVIEW_PIXELS = 512
SERVER = (
    "STRING",
    {"default": "", "tooltip": "http://HOST:PORT; empty: PARAFUSE_SERVER, or this machine"},
)
PROMPT = ("STRING", {"multiline": True, "default": "", "tooltip": "What is to be seen"})
SEED = ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True,
                "tooltip": "Picture i of a batch has seed + i"})  # fmt: skip
STEPS = ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: as many as the model takes by itself"})
OPTIONAL: dict[str, tuple[str, dict[str, Any]]] = {
    "negative_prompt": ("STRING", {"multiline": True, "default": "", "tooltip": "Only for models that take one"}),
    "width": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": "0: the model's own size"}),
    "height": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": "0: the model's own size"}),
    "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1,
                           "tooltip": "Below 0: the model's own"}),
    "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
    "previews": ("INT", {"default": 3, "min": 0, "max": 3, "tooltip": "How many on the way"}),
    "lora": ("STRING", {"default": "", "tooltip": "NAME:SCALE, ... of the server's folder of LoRAs"}),
    "server": SERVER,
}  # fmt: skip


class Generate:
    """Pictures from a text."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Paints on a parafuse server. Progress and previews are shown here; Cancel stops it there."
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "receipt")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"prompt": PROMPT, "seed": SEED, "steps": STEPS}, "optional": OPTIONAL}

    def generate(self, prompt: str, seed: int, steps: int, server: str = "", **more: Any) -> tuple[torch.Tensor, str]:
        """([B, H, W, 3], JSON). Raises ServerError."""
        found = Server(server)
        return painted(found, lambda: found.submit(fields_of(prompt, seed, steps, more)))


class Edit:
    """Pictures from a text and pictures."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Sends pictures, and a mask where there is one, to a parafuse server whose model takes them."
    FUNCTION = "edit"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "receipt")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01,
                              "tooltip": "How far from the picture that was sent; 0: the model's own"})  # fmt: skip
        return {
            "required": {"images": ("IMAGE",), "prompt": PROMPT, "seed": SEED, "steps": STEPS},
            "optional": {"mask": ("MASK",), "strength": strength} | OPTIONAL,
        }

    def edit(
        self,
        images: torch.Tensor,
        prompt: str,
        seed: int,
        steps: int,
        mask: torch.Tensor | None = None,
        strength: float = 0.0,
        server: str = "",
        **more: Any,
    ) -> tuple[torch.Tensor, str]:
        """([B, H, W, 3], JSON). `images` [B, H, W, C]: all go with one request; `mask` [H, W] or [1, H, W]: 1 where it
        is to be painted anew. Raises ServerError."""
        found = Server(server)
        if mask is not None and mask.ndim == 3 and len(mask) != 1:
            raise ServerError(f"mask: has {len(mask)} pictures; a request takes one.")
        sent = None if mask is None else to_png(mask.reshape(mask.shape[-2:]))
        fields = fields_of(prompt, seed, steps, more) | {"strength": strength or None}
        return painted(found, lambda: found.submit_edit(fields, [to_png(one) for one in images], sent))


class Decode:
    """Pictures from latents."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Has the autoencoder of a parafuse server decode a graph's latents. It must be that of their model."
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",)}, "optional": {"server": SERVER}}

    def decode(self, samples: dict[str, Any], server: str = "") -> tuple[torch.Tensor]:
        """([B, H, W, 3],), of videos all frames. `samples`: {"samples": [B, C, H, W] or [B, C, F, H, W]}. Raises
        ServerError."""
        return (from_pixels(coded(Server(server), "decode", samples["samples"])),)


class Encode:
    """Latents from pictures."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Has the autoencoder of a parafuse server encode pictures, for a sampler of the same model here."
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        as_video = ("BOOLEAN", {"default": False, "tooltip": "The pictures are the frames of one video"})
        return {"required": {"images": ("IMAGE",)}, "optional": {"as_video": as_video, "server": SERVER}}

    def encode(
        self, images: torch.Tensor, as_video: bool = False, server: str = ""
    ) -> tuple[dict[str, torch.Tensor]]:  # fmt: skip
        """({"samples": ...},). `images` [B, H, W, C]. Raises ServerError."""
        return ({"samples": coded(Server(server), "encode", to_pixels(images, as_video)).float()},)


def coded(server: Server, task: str, x: torch.Tensor) -> torch.Tensor:
    """What the autoencoder gave. Cancel leaves it at once; what runs on the server goes on to its end."""
    from comfy.model_management import throw_exception_if_processing_interrupted  # pyright: ignore[reportMissingImports]

    def work() -> Iterator[torch.Tensor]:
        yield from_bytes(*server.code(task, to_bytes(x), x.shape, "float32"))

    for found in _looking(work()):
        throw_exception_if_processing_interrupted()
        if found is not None:
            return found
    raise ServerError(f"{task}: the server has said nothing.")


def fields_of(prompt: str, seed: int, steps: int, more: dict[str, Any]) -> dict[str, Any]:
    """A request's fields; None for what the model decides. `more`: of OPTIONAL. Raises ServerError."""
    asked = {name: options["default"] for name, (_, options) in OPTIONAL.items()} | more
    width, height = asked["width"], asked["height"]
    if bool(width) != bool(height):
        raise ServerError("width, height: give both, or 0 for both.")
    return {
        "prompt": prompt,
        "seed": seed,
        "steps": steps or None,
        "negative_prompt": asked["negative_prompt"] or None,
        "size": f"{width}x{height}" if width else None,
        "guidance": None if asked["guidance"] < 0 else asked["guidance"],
        "n": asked["batch_size"],
        "partial_images": asked["previews"],
        "lora": loras_of(asked["lora"]) or None,
    }


def loras_of(text: str) -> list[dict[str, Any]]:
    """`NAME:SCALE, NAME` as a request has it. Raises ServerError."""
    found: list[dict[str, Any]] = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, _, scale = part.partition(":")
        try:
            found.append({"name": name.strip(), "scale": float(scale or 1)})
        except ValueError as error:
            raise ServerError(f"lora {part!r}: must be NAME or NAME:SCALE.") from error
    return found


def painted(server: Server, submit: Callable[[], str]) -> tuple[torch.Tensor, str]:
    """What a job made, shown on the way. The user's Cancel ends it on the server too."""
    from comfy.model_management import throw_exception_if_processing_interrupted  # pyright: ignore[reportMissingImports]
    from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]

    job, bar = submit(), ProgressBar(100)
    try:
        for event in _looking(server.events(job)):
            throw_exception_if_processing_interrupted()
            if event is None:
                continue
            if event.name == "progress" and event.data["steps"]:
                bar.update_absolute(event.data["step"], event.data["steps"])
            elif event.name == "preview":
                shown = as_picture(base64.b64decode(event.data["b64_json"]))
                bar.update_absolute(event.data["step"], bar.total, ("JPEG", shown, PREVIEW_PIXELS))
            elif event.name in OVER:
                return _ended(server, event)
    except ServerError:
        raise
    except BaseException:
        server.cancel(job)
        raise
    raise ServerError(f"job {job}: the server says nothing of it any more.")


def _ended(server: Server, event: Event) -> tuple[torch.Tensor, str]:
    job = event.data
    if event.name == "failed":
        raise ServerError(f"job {job['id']}: {(job.get('error') or {}).get('message', 'it failed.')}")
    if event.name == "cancelled":
        raise ServerError(f"job {job['id']}: was cancelled on the server.")
    return from_files(server.pictures(job)), server.receipt(job["id"])


def _looking(events: Iterator[T]) -> Iterator[T | None]:
    """The events, and None several times a second where there are none: they are waited for in a thread."""
    found: queue.Queue[T | Exception | None] = queue.Queue()

    def read() -> None:
        try:
            for event in events:
                found.put(event)
            found.put(None)
        except Exception as error:
            found.put(error)

    threading.Thread(target=read, name="parafuse-events", daemon=True).start()
    while True:
        try:
            event = found.get(timeout=LOOK_S)
        except queue.Empty:
            yield None
            continue
        if isinstance(event, Exception):
            raise event
        if event is None:
            return
        yield event
