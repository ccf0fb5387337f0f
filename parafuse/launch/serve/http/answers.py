"""What clients are told of jobs: the shapes of OpenAI's objects, and this server's own job object."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parafuse.launch.serve.jobs import Job, State

VIDEO_STATUS = {
    State.QUEUED: "queued", State.RUNNING: "in_progress", State.DONE: "completed", State.FAILED: "failed",
    State.CANCELLED: "failed",
}  # fmt: skip
MEDIA = {".png": "image/png", ".jpeg": "image/jpeg", ".jpg": "image/jpeg", ".webp": "image/webp", ".mp4": "video/mp4"}


def size_of(job: Job) -> str:
    """WIDTHxHEIGHT where the request or the model says it, else auto."""
    settings = job.request.settings
    if "width" in settings and "height" in settings:
        return f"{settings['width']}x{settings['height']}"
    return "auto"


def file_urls(job: Job, base: str) -> list[str]:
    """Where its outputs are fetched, with the key that made them."""
    return [f"{base}v1/files/{job.id}/{index}" for index in range(len(job.files))]


def job_object(job: Job, base: str) -> dict[str, Any]:
    """What /v1/jobs says of a job. Times are Unix seconds; no prompt is in it."""
    request = job.request
    return {
        "id": job.id,
        "object": "job",
        "kind": request.kind,
        "status": job.state.value,
        "model": request.asked.get("model"),
        "user": request.asked.get("user"),
        "created_at": job.created_s,
        "started_at": job.started_s,
        "finished_at": job.finished_s,
        "deadline_at": job.deadline_s,
        "expires_at": job.expires_s,
        "progress": 1.0 if job.state is State.DONE else round(job.progress, 4),
        "priority": job.priority,
        "tries": job.tries,
        "cancel_asked": job.cancel_asked,
        "seed": request.seed if request.coding is None else None,
        "size": size_of(job),
        "n": request.num_outputs,
        "rank_seconds": round(job.rank_seconds, 4),
        "error": None if job.error is None else {"code": f"job_{job.error.kind}", "message": job.error.message},
        "data": [{"url": url} for url in file_urls(job, base)],
    }


def images_object(job: Job, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer to a request for pictures. Its id is the job's and the receipt's."""
    answer: dict[str, Any] = {
        "id": job.id,
        "created": int(job.finished_s or job.created_s),
        "background": "opaque",
        "data": list(data),
        "output_format": job.request.format,
        "seed": job.request.seed,
        "size": size_of(job),
    }
    if "safety_identifier" in job.request.asked:
        answer["safety_identifier"] = job.request.asked["safety_identifier"]
    return answer


def as_base64(path: Path) -> str:
    """A file's bytes. Blocks."""
    return base64.b64encode(path.read_bytes()).decode("ascii")


def image_event(job: Job, *, about: str, b64: str, created_s: float, form: str, **more: Any) -> dict[str, Any]:
    """What events with a picture have in common. `about`: image_generation or image_edit, and what of it."""
    return {
        "type": about,
        "id": job.id,
        "b64_json": b64,
        "background": "opaque",
        "created_at": int(created_s),
        "output_format": form,
        "quality": "auto",
        "size": size_of(job),
    } | more


def video_object(job: Job) -> dict[str, Any]:
    """OpenAI's Video. A cancelled one has failed, in OpenAI's words."""
    request = job.request
    frames, fps = request.settings.get("num_frames", 1), request.frames_per_second
    error = None if job.error is None else {"code": f"job_{job.error.kind}", "message": job.error.message}
    if job.state is State.CANCELLED:
        error = {"code": "job_cancelled", "message": "It was cancelled."}
    return {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created_s),
        "completed_at": int(job.finished_s) if job.state is State.DONE and job.finished_s else None,
        "expires_at": int(job.expires_s) if job.expires_s else None,
        "error": error,
        "model": request.asked.get("model", ""),
        "progress": 100 if job.state is State.DONE else round(100 * job.progress),
        "prompt": request.prompt,
        "remixed_from_video_id": None,
        "seconds": f"{(frames - 1) / fps:g}",
        "seed": request.seed,
        "size": size_of(job),
        "status": VIDEO_STATUS[job.state],
    }
