"""Outputs as answers, to the key that made them."""

from __future__ import annotations

from fastapi.responses import FileResponse

from parafuse.launch.serve.http import answers
from parafuse.launch.serve.http.errors import ApiError, cancelled, missing, of_job
from parafuse.launch.serve.http.service import Service
from parafuse.launch.serve.jobs import Job, State


async def file_response(service: Service, job: Job, index: int) -> FileResponse:
    """One output. Raises ApiError: the job's own where it failed or was cancelled, 409 where it is not over, 404 where
    it has no such output, or no more."""
    if job.state is State.FAILED:
        raise of_job(job.id, job.error)
    if job.state is State.CANCELLED:
        raise cancelled(job.id)
    if job.state is not State.DONE:
        message = f"Job {job.id} is {job.state.value}; what it makes can be fetched once it is done."
        raise ApiError(409, message, code="not_done", headers={"x-should-retry": "false"})
    path = service.output(job, index)
    if not await service.worked(path.is_file):
        raise missing("file", f"{job.id}/{index}")
    headers = {"content-disposition": f'inline; filename="{job.id}-{index}{path.suffix}"'}
    return FileResponse(path, media_type=answers.MEDIA.get(path.suffix, "application/octet-stream"), headers=headers)
