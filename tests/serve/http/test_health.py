"""Health, metrics, logs, access without keys, and what happens while the server ends or its supervisor is away."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import openai
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from parafuse.launch.serve.jobs import State, StoreError
from tests.serve.http.serving import Running, serving, until


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(limits={"max_queued": 2, "priority_max": 3, "webhooks": False}, webhook_hosts=("example.org",)) as one:
        yield one


@pytest.fixture(autouse=True)
def as_new(server: Running) -> Iterator[None]:
    server.behaviour.__init__()
    yield
    server.behaviour.__init__()


def ready(server: Running) -> httpx2.Response:
    return httpx2.get(f"{server.base}/health/ready", trust_env=False)


def test_ready_as_the_supervisor_says(server: Running) -> None:
    until(lambda: ready(server).status_code == 200)
    server.behaviour.state = "restarting"
    answer = until(lambda: (found := ready(server)).status_code == 503 and found)
    assert answer.json() == {"status": "restarting", "why": "being tested"}
    assert httpx2.get(f"{server.base}/health/live", trust_env=False).status_code == 200
    server.behaviour.state = "ready"
    until(lambda: ready(server).status_code == 200)


def test_not_ready_where_the_supervisor_is_silent(server: Running) -> None:
    until(lambda: ready(server).status_code == 200)
    server.behaviour.silent = True
    answer = until(lambda: (found := ready(server)).status_code == 503 and found)
    assert answer.json()["status"] == "silent"
    with server.http() as http:  # a supervisor that is away for a while loses nothing: jobs are taken
        server.pause()
        made = http.post("/v1/images/generations", json={"prompt": "patient", "background": True})
        assert made.status_code == 202
    server.behaviour.silent = False
    server.behaviour.claim = True
    server.wait(made.json()["id"], State.DONE)


def test_a_rank_that_makes_no_step_for_long_is_not_ready(server: Running) -> None:
    with server.http(None) as http:
        until(lambda: http.get("/health/ready").status_code == 200)
        server.behaviour.step_age_s = 301.0
        answer = until(lambda: (found := http.get("/health/ready")).status_code == 503 and found)
        assert answer.json() == {"status": "slow", "why": "rank 0 has made no step for 301 s"}
        server.behaviour.step_age_s = 1.0
        until(lambda: http.get("/health/ready").status_code == 200)


def test_metrics(server: Running) -> None:
    server.client().images.generate(prompt="counted")

    def page() -> dict[str, dict[tuple[str, ...], float]]:
        with server.http() as http:
            text = http.get("/metrics").text
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return found

    owner = server.store.of_owner(server.behaviour.painted[0].owner)[0].owner
    now = until(lambda: (found := page()).get("parafuse_rank_seconds_total", {}).get((owner,)) and found)
    assert now["parafuse_jobs_now"][("done",)] >= 1
    assert now["parafuse_jobs_total"][("image", "done")] >= 1
    assert now["parafuse_job_seconds_count"][("image", "queued")] >= 1
    assert now["parafuse_job_seconds_count"][("image", "running")] >= 1
    assert now["parafuse_call_seconds_sum"][("image", "denoising")] == 2 * now["parafuse_jobs_total"][("image", "done")]
    assert now["parafuse_restarts_total"] == {("died",): 2.0}
    assert now["parafuse_supervisor_total"][("steps",)] == 12.0
    assert now["parafuse_rank_memory_bytes"] == {("0",): 5.0}
    assert now["parafuse_rank_beat_age_seconds"][("0",)] >= 0.1
    assert now["parafuse_state"][("ready",)] == 1.0
    assert now["parafuse_http_requests_total"][("POST", "/v1/images/generations", "200")] >= 1
    with server.http() as http:
        http.get("/" + "x" * 50)
    assert not any("xxx" in str(labels) for labels in page()["parafuse_http_requests_total"])


def test_logs_hold_no_prompt_and_no_key(server: Running) -> None:
    with structlog.testing.capture_logs() as lines, server.http() as http:
        made = http.post(
            "/v1/images/generations", json={"prompt": "a secret apple", "user": "someone"},
            headers={"x-request-id": "traced-1"},
        )  # fmt: skip
        assert made.status_code == 200
        http.post("/v1/images/generations", json={"prompt": "a secret apple", "sed": 1})
        assert http.get("/v1/jobs?after=tell-nobody").status_code == 200
        until(lambda: len([line for line in lines if line["event"] == "request"]) == 3)
    text = str(lines)
    assert "secret" not in text
    assert server.secrets[0] not in text
    assert "tell-nobody" not in text
    first, second, _ = [line for line in lines if line["event"] == "request"]
    assert (first["request_id"], first["status"], first["route"]) == ("traced-1", 200, "/v1/images/generations")
    assert first["job"] == made.json()["id"]
    assert (second["status"], second["code"]) == (400, "unknown_parameter")


def test_limits_of_a_key(server: Running) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="at most 3"):
        client.images.generate(prompt="x", extra_body={"priority": 4})
    with pytest.raises(openai.BadRequestError, match="may not name webhooks"):
        client.images.generate(prompt="x", extra_body={"webhook_url": "https://example.org/hook"})
    with pytest.raises(openai.BadRequestError, match="not allowed"):
        server.client(1).images.generate(prompt="x", extra_body={"webhook_url": "https://example.com/hook"})
    server.pause()
    with server.http() as http:
        body = {"prompt": "x", "background": True}
        headers = {"idempotency-key": "stands"}
        jobs = [http.post("/v1/images/generations", json=body, headers=headers).json()["id"]]
        jobs.append(http.post("/v1/images/generations", json=body).json()["id"])
        refused = http.post("/v1/images/generations", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        again = http.post("/v1/images/generations", json=body, headers=headers)
        assert again.json()["id"] == jobs[0], "what an idempotency key has made is found in a full queue too"
        with server.http(1) as other:
            made = other.post("/v1/images/generations", json=body | {"webhook_url": "https://example.org/hook"})
            assert made.status_code == 202
            other.delete(f"/v1/jobs/{made.json()['id']}")
        for job in jobs:
            http.delete(f"/v1/jobs/{job}")


def test_a_store_that_fails_is_a_503(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise StoreError("the disk at /somewhere is full.")

    monkeypatch.setattr(server.store, "accept", full)
    with pytest.raises(openai.InternalServerError) as found:
        server.client().images.generate(prompt="x")
    assert found.value.status_code == 503
    assert "somewhere" not in found.value.message


def test_what_nobody_expected_is_a_500_that_says_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(server.store, "of_owner", broken)
    with server.http() as http, structlog.testing.capture_logs() as lines:
        answer = http.get("/v1/jobs")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert answer.headers["x-request-id"]
        assert "secret" not in answer.text
    assert any(line["event"] == "failed" for line in lines)


def test_while_it_ends_nothing_is_taken_and_waiting_clients_are_told(server: Running) -> None:
    import threading

    server.pause()
    found: list[openai.APIStatusError] = []

    def ask() -> None:
        try:
            server.client(1).images.generate(prompt="waits")
        except openai.APIStatusError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    (job,) = until(server.store.queued)
    service = server.app.state.service
    service.draining = True
    try:
        thread.join(30)
        assert (found[0].status_code, found[0].code) == (503, "draining")
        with server.http() as http:
            assert http.post("/v1/images/generations", json={"prompt": "x"}).status_code == 503
        assert ready(server).json()["status"] == "draining"
    finally:
        service.draining = False
    server.behaviour.claim = True
    assert server.wait(job.id, State.DONE), "what was accepted is done"


def test_without_keys_it_answers_this_machine_alone() -> None:
    with serving(num_keys=0) as server:
        base = server.base
        assert httpx2.get(f"{base}/v1/models").status_code == 200
        assert httpx2.get(f"{base}/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 200
        for headers in (
            {"host": "evil.example"},
            {"host": "127.0.0.1.evil.example:80"},
            {"origin": "https://evil.example"},
            {"origin": "null"},
        ):
            assert httpx2.get(f"{base}/v1/models", headers=headers).status_code == 401, headers
        answer = httpx2.post(f"{base}/v1/images/generations", json={"prompt": "x"}, headers={"origin": "http://x.y"})
        assert answer.status_code == 401


def test_many_clients_wait_and_health_answers(server: Running) -> None:
    import threading

    server.behaviour.hold = True
    with server.http(1) as http:
        made = [
            http.post("/v1/images/generations", json={"prompt": "x", "background": True}).json()["id"]
            for _ in range(40)
        ]

        def watch(job: str) -> None:
            with server.http(1) as one:
                one.get(f"/v1/jobs/{job}/events")

        threads = [threading.Thread(target=watch, args=(job,)) for job in made]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert http.get("/health/live").status_code == 200
        server.behaviour.hold = False
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
