"""Outputs as answers, to the key that made them."""

from __future__ import annotations

from pathlib import Path

from fastapi.responses import FileResponse

from parafuse.launch.serve.http import answers
from parafuse.launch.serve.http.errors import missing
from parafuse.launch.serve.http.service import Service
from parafuse.launch.serve.jobs import Job


async def file_response(service: Service, job: Job, index: int) -> FileResponse:
    """One output. Raises ApiError (404), also where it has been taken away since."""
    path = service.output(job, index)
    if not await service.worked(path.is_file):
        raise missing("file", f"{job.id}/{index}")
    name = Path(path).name
    headers = {"content-disposition": f'inline; filename="{job.id}-{index}{path.suffix}"'}
    return FileResponse(path, media_type=answers.MEDIA.get(Path(name).suffix, "application/octet-stream"),
                        headers=headers)  # fmt: skip
