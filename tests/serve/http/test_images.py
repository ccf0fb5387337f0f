"""Pictures by the official client of OpenAI, against a server on a loopback port."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from parafuse.launch.serve.http.images import until_over
from parafuse.launch.serve.jobs import JobError, State
from tests.serve.http.serving import Running, png, serving, until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def as_new(server: Running) -> Iterator[None]:
    yield
    server.behaviour.__init__()


def opened(b64: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64 or "")))


def test_a_picture(server: Running) -> None:
    answer = server.client().images.generate(prompt="a red apple", size="64x32", extra_body={"seed": 7, "steps": 3})
    assert answer.data is not None
    assert len(answer.data) == 1
    assert opened(answer.data[0].b64_json).size == (64, 32)
    job = server.store.get(answer.id)  # type: ignore[attr-defined]
    assert job is not None
    assert job.request.settings["num_inference_steps"] == 3
    assert (job.request.seed, answer.seed, answer.size) == (7, 7, "64x32")  # type: ignore[attr-defined]


def test_two_by_url_are_fetched_with_the_key_alone(server: Running) -> None:
    answer = server.client().images.generate(prompt="two", n=2, response_format="url", output_format="webp")
    urls = [one.url or "" for one in answer.data or []]
    assert len(urls) == 2
    with server.http() as mine, server.http(1) as other, server.http(None) as nobody:
        found = mine.get(urls[1])
        assert found.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(found.content)).format == "WEBP"
        assert other.get(urls[1]).status_code == 404
        assert nobody.get(urls[1]).status_code == 401


def test_a_stream_with_partial_images(server: Running) -> None:
    events = list(server.client().images.generate(prompt="slowly", stream=True, partial_images=2))
    kinds = [event.type for event in events]
    assert kinds.count("image_generation.partial_image") == 2
    assert kinds[-1] == "image_generation.completed"
    assert "image_generation.progress" in kinds
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert opened(partial[0].b64_json).size == (8, 8)
    assert opened(events[-1].b64_json).size == (128, 128)


def test_a_stream_tells_a_failure(server: Running) -> None:
    server.behaviour.fail = JobError(kind="memory", message="it needs more memory than there is.")
    with pytest.raises(openai.APIError, match="more memory"):
        list(server.client().images.generate(prompt="large", stream=True))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("invalid", openai.BadRequestError),
        ("memory", openai.APIStatusError),
        ("lost", openai.InternalServerError),
        ("internal", openai.InternalServerError),
    ],
)
def test_a_failed_job_is_an_error_by_name(server: Running, kind: str, error: type[openai.APIStatusError]) -> None:
    server.behaviour.fail = JobError(kind=kind, message="the reason.")
    with pytest.raises(error, match=r"the reason\.") as found:
        server.client(max_retries=2).images.generate(prompt="x")
    assert found.value.code == f"job_{kind}"
    assert len(server.behaviour.painted) == 1, "a job that failed is not asked for again by itself"


def test_events_that_are_lost_are_looked_up(server: Running) -> None:
    server.behaviour.tell = False
    assert server.client().images.generate(prompt="unheard").data


def test_in_the_background(server: Running) -> None:
    server.behaviour.hold = True
    with server.http() as http:
        made = http.post("/v1/images/generations", json={"prompt": "later", "background": True, "n": 2, "user": "u1"})
        assert made.status_code == 202
        job = made.json()
        assert job["user"] == "u1"
        server.wait(job["id"], State.RUNNING)
        server.behaviour.hold = False
        server.wait(job["id"], State.DONE)
        after = http.get(made.headers["location"]).json()
        assert (after["status"], after["progress"], len(after["data"])) == ("done", 1.0, 2)
        assert http.get(after["data"][1]["url"]).content.startswith(b"\x89PNG")
        assert http.get(f"/v1/receipts/{job['id']}").json() == {"prompt": "later"}
        assert "later" not in http.get("/v1/jobs").text


def test_events_of_a_job_also_after_its_end(server: Running) -> None:
    server.behaviour.hold = True
    with server.http() as http:
        body = {"prompt": "watched", "background": True, "partial_images": 1}
        job = http.post("/v1/images/generations", json=body).json()["id"]
        with http.stream("GET", f"/v1/jobs/{job}/events") as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith(":")
            server.behaviour.hold = False
            seen = [line for line in lines if line.startswith("event:")]
        assert seen[-1] == "event: done"
        again = http.get(f"/v1/jobs/{job}/events", headers={"last-event-id": "999999"})
        assert again.headers["content-type"].startswith("text/event-stream")
        assert [line for line in again.text.splitlines() if line.startswith("event:")] == ["event: done"]


def test_a_client_that_goes_cancels_what_it_waits_for(server: Running) -> None:
    server.behaviour.hold = True
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=1.0).images.generate(prompt="impatient")
    job = until(lambda: server.behaviour.painted)[-1]
    assert server.wait(job.id, State.CANCELLED)


def test_a_stream_that_is_left_cancels_its_job(server: Running) -> None:
    server.behaviour.hold = True
    stream = server.client().images.generate(prompt="left", stream=True)
    next(iter(stream))
    stream.close()
    job = until(lambda: server.behaviour.painted)[-1]
    assert server.wait(job.id, State.CANCELLED)


def test_background_jobs_and_those_with_an_idempotency_key_go_on(server: Running) -> None:
    server.behaviour.hold = True
    client = server.client(timeout=1.0)
    with pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="asked again", extra_headers={"Idempotency-Key": "again-1"})
    job = until(lambda: server.behaviour.painted)[-1]
    server.behaviour.hold = False
    assert server.wait(job.id, State.DONE)
    answer = server.client().images.generate(prompt="asked again", extra_headers={"Idempotency-Key": "again-1"})
    assert answer.id == job.id  # type: ignore[attr-defined]
    assert len(server.behaviour.painted) == 1


def test_an_idempotency_key_is_for_one_request_and_one_key(server: Running) -> None:
    headers = {"Idempotency-Key": "only-this"}
    first = server.client().images.generate(prompt="once", extra_headers=headers)
    with pytest.raises(openai.ConflictError):
        server.client().images.generate(prompt="twice", extra_headers=headers)
    other = server.client(1).images.generate(prompt="twice", extra_headers=headers)
    server.behaviour.peak_bytes = 10**12
    again = server.client().images.generate(prompt="once", extra_headers=headers)
    assert first.id == again.id, "also where a new one would be refused"  # type: ignore[attr-defined]
    with pytest.raises(openai.APIStatusError, match="GB"):
        server.client().images.generate(prompt="once", extra_headers={"Idempotency-Key": "new"})
    assert first.id != other.id  # type: ignore[attr-defined]


def test_delete_cancels(server: Running) -> None:
    server.pause()
    with server.http() as http, server.http(1) as other:
        job = http.post("/v1/images/generations", json={"prompt": "never", "background": True}).json()["id"]
        assert other.delete(f"/v1/jobs/{job}").status_code == 404
        assert http.delete(f"/v1/jobs/{job}").json()["status"] == "cancelled"
        assert http.delete(f"/v1/jobs/{job}").json()["status"] == "cancelled"


def test_what_a_job_made_can_be_taken_away(server: Running) -> None:
    job = server.client().images.generate(prompt="once").id  # type: ignore[attr-defined]
    folder = server.settings.results / server.wait(job, State.DONE).folder
    assert folder.is_dir()
    with server.http() as http, server.http(1) as other:
        assert other.delete(f"/v1/files/{job}").status_code == 404
        assert http.get(f"/v1/files/{job}/0").status_code == 200
        assert http.delete(f"/v1/files/{job}").json() == {"id": job, "object": "job.deleted", "deleted": True}
        for path in (f"jobs/{job}", f"files/{job}/0", f"receipts/{job}"):
            assert http.get(f"/v1/{path}").status_code == 404
        assert http.delete(f"/v1/files/{job}").status_code == 404
    assert not folder.exists()


def test_files_of_a_job_that_is_not_done_say_why(server: Running) -> None:
    server.pause()
    with server.http() as http:
        job = http.post("/v1/images/generations", json={"prompt": "later", "background": True}).json()["id"]
        for answer in (http.get(f"/v1/files/{job}/0"), http.delete(f"/v1/files/{job}")):
            assert answer.status_code == 409
            assert f"Job {job} is queued" in answer.json()["error"]["message"]
        http.delete(f"/v1/jobs/{job}")
        answer = http.get(f"/v1/files/{job}/0")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_cancelled")


def test_query_parameters_that_there_are_not_are_refused(server: Running) -> None:
    with server.http() as http:
        for path in ("jobs?limi=3", "jobs/x?a=b", "models?q", "videos?limit=2&oder=asc"):
            answer = http.get(f"/v1/{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter"), path
        assert "did you mean 'limit'" in http.get("/v1/jobs?limi=3").json()["error"]["message"]
        answer = http.post("/v1/images/generations?n=2", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        assert http.get("/v1/jobs?limit=3&after=img_x").status_code in (200, 404)
        assert http.get("/health/live?verbose=1").status_code == 200
    assert not server.behaviour.painted


def test_a_waiting_client_is_told_of_a_cancel(server: Running) -> None:
    import threading

    server.behaviour.hold = True
    found: list[Exception] = []

    def ask() -> None:
        try:
            server.client(max_retries=2).images.generate(prompt="to be cancelled")
        except openai.APIError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    job = until(lambda: server.behaviour.painted)[-1]
    with server.http() as http:
        http.delete(f"/v1/jobs/{job.id}")
    thread.join(30)
    assert isinstance(found[0], openai.ConflictError)
    assert len(server.behaviour.painted) == 1


def test_another_key_sees_nothing(server: Running) -> None:
    job = server.client().images.generate(prompt="mine").id  # type: ignore[attr-defined]
    with server.http() as own, server.http(1) as other:
        for path in (f"jobs/{job}", f"jobs/{job}/events", f"files/{job}/0", f"receipts/{job}"):
            mine, answer = own.get(f"/v1/{path}"), other.get(f"/v1/{path}")
            missing = other.get(f"/v1/{path.replace(job, 'img_none')}")
            assert mine.status_code == 200
            assert answer.status_code == missing.status_code == 404
            assert answer.text.replace(job, "") == missing.text.replace("img_none", "")
        assert job not in other.get("/v1/jobs").text
        assert own.get("/metrics").status_code == 200
        answer = other.get("/metrics")  # it tells what each key has had
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_metrics")


@pytest.mark.parametrize("key", ["", "Bearer pf_wrong", "Basic eDp5", "Bearer"])
def test_no_key_no_answer(server: Running, key: str) -> None:
    for path in ("/v1/models", "/v1/jobs/x", "/metrics", "/nothing", "/openapi.json"):
        answer = httpx2.get(f"{server.base}{path}", headers={"authorization": key} if key else {})
        assert answer.status_code == 401, path
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.base}/v1", api_key="pf_wrong", max_retries=0).models.list()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "sed": 1}, "sed"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": "1"}, "seed"),
        ({"prompt": "x", "n": 11}, "n"),
        ({"prompt": "x", "n": True}, "n"),
        ({"prompt": "x", "size": "63x64"}, "size"),
        ({"prompt": "x", "size": "99999x99999"}, "size"),
        ({"prompt": "x", "size": "0x64"}, "size"),
        ({"prompt": "x", "steps": 201}, "steps"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "quality": "hd"}, "quality"),
        ({"prompt": "x", "style": "vivid"}, "style"),
        ({"prompt": "x", "background": "transparent"}, "background"),
        ({"prompt": "x", "partial_images": 2}, "partial_images"),
        ({"prompt": "x", "lora": [{"name": "../x"}]}, "lora.0.name"),
        ({"prompt": "x", "lora": [{"nme": "x"}]}, "lora.0.name"),
        ({"prompt": "x", "guidance": 1e999}, None),
        ({"prompt": "x", "webhook_url": "http://127.0.0.1:1/"}, None),
        ({"prompt": "\ud800"}, None),
        ([], None),
    ],
)
def test_what_is_wrong_is_refused_by_name(server: Running, body: object, param: str | None) -> None:
    import json

    text = json.dumps(body)
    answer = httpx2.post(
        f"{server.base}/v1/images/generations", content=text,
        headers={"authorization": f"Bearer {server.secrets[0]}", "content-type": "application/json"},
    )  # fmt: skip
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param, error
    assert not server.behaviour.painted


def test_errors_have_the_classes_of_the_client(server: Running) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="did you mean 'seed'"):
        client.images.generate(prompt="x", extra_body={"sead": 1})
    with pytest.raises(openai.NotFoundError, match="no 'dall-e-3' here"):
        client.images.generate(prompt="x", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="takes no pictures"):
        client.images.edit(prompt="x", image=png())
    with pytest.raises(openai.BadRequestError, match="makes images"), pytest.warns(match="Sora"):
        client.videos.create(prompt="x")
    server.pause()
    server.behaviour.seconds = 100.0
    with pytest.raises(openai.RateLimitError, match="deadline") as found:
        client.images.generate(prompt="x", extra_body={"deadline_s": 5})
    assert found.value.body["estimate_s"] == 100.0  # type: ignore[index]
    server.behaviour.peak_bytes = 10**10
    with pytest.raises(openai.APIStatusError, match=r"10\.0 GB") as found:
        client.images.generate(prompt="x")
    assert found.value.status_code == 413


def test_what_changes_nothing_is_taken(server: Running) -> None:
    client = server.client()
    answer = client.images.generate(
        prompt="x", quality="auto", background="opaque", moderation="auto", user="u", safety_identifier="s",
        size="auto", model="emoji",
    )  # fmt: skip
    assert answer.safety_identifier == "s"


def test_models(server: Running) -> None:
    client = server.client()
    assert [one.id for one in client.models.list()] == ["emoji"]
    assert client.models.retrieve("emoji").owned_by == "parafuse"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_other_names_of_the_model() -> None:
    with serving(served_model_name=("gpt-image-1", "house")) as server:
        client = server.client()
        assert [one.id for one in client.models.list()] == ["gpt-image-1", "house"]
        assert client.models.retrieve("house").id == "house"
        for name in ("gpt-image-1", "house"):
            job = client.images.generate(prompt="x", model=name).id  # type: ignore[attr-defined]
            assert server.wait(job, State.DONE).request.asked["model"] == name
        with pytest.raises(openai.NotFoundError, match="no 'emoji' here; this server has 'gpt-image-1'"):
            client.images.generate(prompt="x", model="emoji")


def test_a_request_that_is_given_up_takes_its_job_along() -> None:
    """Ray Serve cancels what answers a client that has gone; it says nothing else."""
    left: list[str] = []

    class Waits:
        async def ended(self, _: Any) -> None:
            await asyncio.Event().wait()

        async def left_by(self, job: Any) -> None:
            left.append(job)

    async def go() -> None:
        waits: Any = Waits()
        waits.receive = lambda: asyncio.Event().wait()
        task = asyncio.create_task(until_over(waits, waits, "a job"))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert left == ["a job"]
