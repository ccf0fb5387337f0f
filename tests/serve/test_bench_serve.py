"""The load generator: its figures by arithmetic, its load by its seed, and both against a server of known slowness."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from parafuse.errors import ConfigError
from parafuse.launch.serve.bench import ServeBench, faults_of, prepare, run, tables
from parafuse.launch.serve.bench_figures import Outcome, figures, jain, spread
from parafuse.launch.serve.bench_load import Kind, Load, arrivals, planned, read_mix

# figures


def outcome(latency_s: float, end: str = "done", key: str = "a", **more: Any) -> Outcome:
    return Outcome(
        **{"kind": "k", "key": key, "end": end, "due_s": 1.0, "sent_s": 1.0, "ended_s": 1.0 + latency_s, **more}
    )


def test_percentiles_are_exact() -> None:
    found = spread([float(x) for x in random.Random(1).sample(range(1, 102), 101)])
    assert (found["p50"], found["p90"], found["p95"], found["p99"]) == (51, 91, 96, 100)
    assert (found["mean"], found["max"], found["number"]) == (51, 101, 101)
    assert spread([1.0, 2.0])["p50"] == 1.5
    assert spread([1.0, 2.0])["p90"] == pytest.approx(1.9)
    assert spread([4.0])["p99"] == 4
    assert spread([]) == {}


def test_fairness_is_jain_s_index() -> None:
    assert jain([3, 3, 3, 3]) == 1
    assert jain([5, 0, 0, 0]) == 0.25
    assert jain([1, 2, 3]) == pytest.approx(36 / (3 * 14))
    assert jain([]) is None
    assert jain([0, 0]) is None


def test_figures_of_known_outcomes() -> None:
    outcomes = [
        outcome(1.0, deadline_s=2.0, queued_s=0.4, service_s=0.6, rank_seconds=1.2),
        outcome(3.0, deadline_s=2.0, queued_s=2.4, service_s=0.6, rank_seconds=1.2),
        outcome(2.0, key="b", queued_s=1.0, service_s=1.0, rank_seconds=2.4),
        outcome(0.1, "refused", status=429, code="queue_full"),
        outcome(0.3, "refused", status=429, code="queue_full"),
        outcome(9.0, "failed", key="b", status=408, code="job_deadline"),
        outcome(0.5, "cancelled", is_cancel=True),
    ]
    found = figures(outcomes, 10.0, [0.01, 0.03])
    assert found["ends"] == {"done": 3, "failed": 1, "cancelled": 1, "refused": 2, "broken": 0, "unanswered": 0}
    assert found["codes"] == {"0": 1, "408 job_deadline": 1, "429 queue_full": 2}
    assert (found["good"], found["goodput_per_s"], found["good_of_wanted"]) == (2, 0.2, 2 / 6)
    assert (found["latency_s"]["p50"], found["latency_s"]["max"]) == (2.0, 3.0)
    assert (found["queued_s"]["p50"], found["service_s"]["p50"]) == (1.0, 0.6)
    assert found["refusal_s"]["p50"] == pytest.approx(0.2)
    assert found["health_s"]["p95"] == pytest.approx(0.029)
    assert found["keys"]["a"]["share_done"] == 0.5 == found["keys"]["b"]["share_done"]
    assert found["fairness"] == {"of_rank_seconds": 1.0, "of_share_done": 1.0}
    text = io.StringIO()
    for table in tables(found):
        Console(file=text, width=200).print(table)
    assert "429" not in text.getvalue()
    assert "Jain's index: 1.000" in text.getvalue()


def test_a_latency_counts_from_when_a_request_was_due() -> None:
    late = outcome(3.0, sent_s=3.5, deadline_s=2.0)
    assert late.latency_s == 3.0
    assert not late.is_good
    assert figures([late], 1.0, [])["sent_late_s"]["max"] == 2.5
    assert "sent late" in " ".join(faults_of(figures([late], 1.0, []) | {"health_failed": 0}))


# load


def test_poisson_arrivals_have_the_rate_and_the_spread() -> None:
    times = list(arrivals("poisson", 50.0, 200.0, burst=1, chance=random.Random(3)))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)
    assert all(0 < at < 200 for at in times)


def test_bursts_come_at_once_and_have_the_same_rate() -> None:
    times = list(arrivals("bursts", 10.0, 10.5, burst=20, chance=random.Random(3)))
    assert times == [at for at in (2.0, 4.0, 6.0, 8.0, 10.0) for _ in range(20)]


def test_the_same_seed_gives_the_same_load() -> None:
    kinds = [Kind(name="a", weight=3), Kind(name="b", cancel=1.0, key=1)]

    def plan(seed: int) -> list[Any]:
        chance = random.Random(seed)
        return planned(arrivals("poisson", 20, 50, burst=1, chance=chance), kinds, 3, chance)

    assert plan(1) == plan(1) != plan(2)
    few = [due for due in plan(1) if due.kind.name == "b"]
    assert 0.18 < len(few) / len(plan(1)) < 0.32
    assert {due.key for due in few} == {1}
    assert all(due.is_cancel == (due.kind.name == "b") for due in plan(1))
    assert {due.key for due in plan(1)} == {0, 1, 2}


def test_a_mix_is_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    file.write_text(
        '[[request]]\nsize = "64x64"\nsteps = 4\nweight = 3\n[[request]]\nname = "x"\nkey = 1\ncancel = 0.5\n'
    )
    one, two = read_mix(str(file), 2)
    assert one == Kind(name="request 0", weight=3, body={"size": "64x64", "steps": 4})
    assert (two.name, two.key, two.cancel) == ("x", 1, 0.5)
    for text, said in (
        ("", "must hold"), ("[request", "cannot be read"), ("[[request]]\nstep = 4", "did you mean 'steps'"),
        ("[[request]]\ncancel = 2", "from 0 to 1"), ("[[request]]\nkey = 2", "from 0 to 1"), ("[other]", "unknown key"),
        ('[[request]]\nweight = "x"', "must be a number"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_mix(str(file), 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arrivals": "poison"}, "poisson, bursts"), ({"url": "127.0.0.1"}, "http"), ({"rate": 0.0}, "positive"),
        ({"duration_s": float("inf")}, "positive"), ({"burst": 0}, "at least 1"), ({"cancel": 1.1}, "from 0 to 1"),
        ({"mix": "m.toml", "steps": 3}, "--steps: each kind"), ({"deadline_s": -1.0}, "--deadline -1.0"),
    ],
)  # fmt: skip
def test_what_is_asked_is_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServeBench(**options)


def test_secrets_are_read_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text("# mine\npf_one\n\npf_two\n")
    assert prepare(ServeBench(secrets=str(file)))[0] == ["pf_one", "pf_two"]
    for text in ("", "pf_one two"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="one API key in each line") as caught:
            prepare(ServeBench(secrets=str(file)))
        assert "pf_one" not in str(caught.value)


# against a server


class Server:
    """Paints one job at a time, each for so long; refuses when so many wait."""

    def __init__(self, service_s: float, *, most: int = 1000, broken: bool = False):
        self.service_s, self.most, self.broken = service_s, most, broken
        self.jobs: dict[str, dict[str, Any]] = {}
        self.waiting = 0
        self.keys: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.turn = asyncio.Lock()

    def app(self) -> Starlette:
        return Starlette(routes=[
            Route("/health/live", lambda _: JSONResponse({})),
            Route("/v1/images/generations", self.generate, methods=["POST"]),
            Route("/v1/jobs/{job}", self.job, methods=["GET", "DELETE"]),
        ])  # fmt: skip

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization", ""))
        if self.broken:
            return Response("what?", 500)
        if self.waiting >= self.most:
            return JSONResponse({"error": {"code": "queue_full", "message": "full"}}, 429)
        job: dict[str, Any] = {"id": f"job_{len(self.jobs)}", "status": "queued", "created_at": time.time()}
        self.jobs[job["id"]] = job
        painting = asyncio.ensure_future(self.paint(job))
        if body.get("background"):
            job["task"] = painting
            return JSONResponse(self.shown(job), 202)
        await painting
        return JSONResponse({"id": job["id"], "data": []})

    async def paint(self, job: dict[str, Any]) -> None:
        self.waiting += 1
        try:
            async with self.turn:
                job |= {"status": "running", "started_at": time.time()}
                await asyncio.sleep(self.service_s)
            job |= {"status": "done", "rank_seconds": 2 * self.service_s}
        except asyncio.CancelledError:
            job |= {"status": "cancelled"}
        finally:
            self.waiting -= 1
            job["finished_at"] = time.time()

    def shown(self, job: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in job.items() if name != "task"}

    async def job(self, request: Request) -> Response:
        job = self.jobs[request.path_params["job"]]
        if request.method == "DELETE":
            job["task"].cancel()
        return JSONResponse(self.shown(job))


@contextmanager
def served(server: Server) -> Iterator[str]:
    bound = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(server.app(), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        web.should_exit = True
        thread.join(20)


def test_a_run_against_a_server_of_known_slowness(tmp_path: Path) -> None:
    server, secrets = Server(0.2), tmp_path / "secrets"
    secrets.write_text("pf_one\npf_two\n")
    with served(server) as url:
        options = ServeBench(
            url=url, secrets=str(secrets), arrivals="bursts", burst=4, rate=4.0, duration_s=1.5, steps=3, size="64x64",
            deadline_s=30.0, out=str(tmp_path / "records"),
        )  # fmt: skip
        shown = io.StringIO()
        code = run(options, Console(file=shown, width=160))
    (record,) = (tmp_path / "records").glob("serve_*.json")
    values = json.loads(record.read_text())
    found = values["figures"]
    assert found["ends"]["done"] == 4 == found["good"]
    latencies = sorted(one["ended_s"] - one["due_s"] for one in values["outcomes"])
    for number, latency in enumerate(latencies, 1):  # one after another, though all came at once
        assert latency >= 0.2 * number * 0.99
    assert found["service_s"]["p50"] >= 0.199
    assert found["queued_s"]["max"] >= 0.59
    assert found["latency_s"]["max"] == pytest.approx(latencies[-1])
    assert found["health_s"]["number"] >= 5
    assert found["keys"]["key 0"]["rank_seconds"] == pytest.approx(0.8)
    assert found["fairness"]["of_rank_seconds"] == pytest.approx(1.0)
    assert sorted(server.keys) == ["Bearer pf_one"] * 2 + ["Bearer pf_two"] * 2
    assert all(body["steps"] == 3 and body["size"] == "64x64" and body["deadline_s"] == 30 for body in server.bodies)
    assert "pf_" not in record.read_text() + shown.getvalue()
    assert "latency" in shown.getvalue()
    assert code in (0, 1)  # 1 where this machine was too busy to send in time
    assert code == bool(faults_of(found))


def outcomes_of(server: Server, kind: Kind, times: list[float], patience_s: float = 60.0) -> Load:
    with served(server) as url:
        load = Load(url, [], patience_s=patience_s)
        plan = planned(iter(times), [kind], 0, random.Random(1))
        asyncio.run(load.run(plan, 0.3))
    return load


def told_of(load: Load) -> list[str]:
    return faults_of(figures(load.outcomes, 0.3, load.health_s) | {"health_failed": load.health_failed})


def test_requests_come_though_none_is_answered() -> None:
    server = Server(0.5)
    load = outcomes_of(server, Kind(), [0.0, 0.05, 0.1, 0.15])
    assert all(one.sent_s < 0.5 * 4 for one in load.outcomes), "a closed loop would have waited for answers"
    assert max(one.latency_s for one in load.outcomes) >= 4 * 0.5 - 0.15 - 0.01


def test_what_is_refused_cancelled_or_broken_is_told_apart() -> None:
    refused = outcomes_of(Server(0.5, most=1), Kind(), [0.0, 0.1, 0.1])
    assert sorted(one.end for one in refused.outcomes) == ["done", "refused", "refused"]
    assert {one.code for one in refused.outcomes if one.end == "refused"} == {"queue_full"}
    cancelled = outcomes_of(Server(30), Kind(cancel=1.0, cancel_after_s=0.1), [0.0, 0.0])
    assert [one.end for one in cancelled.outcomes] == ["cancelled", "cancelled"]
    assert all(one.latency_s < 25 for one in cancelled.outcomes)
    assert any("no request was done" in one for one in told_of(cancelled)) is False, "that is what was asked"
    broken = outcomes_of(Server(0.1, broken=True), Kind(), [0.0])
    assert any("no request was done" in one for one in told_of(broken))
    assert [(one.end, one.status) for one in broken.outcomes] == [("broken", 500)]


def test_what_is_never_answered_is_given_up() -> None:
    load = outcomes_of(Server(3), Kind(), [0.0], patience_s=0.2)
    assert [one.end for one in load.outcomes] == ["unanswered"]


def test_a_server_that_is_not_there_is_broken() -> None:
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    load = Load(f"http://127.0.0.1:{port}", [], patience_s=5)
    asyncio.run(load.run(planned(iter([0.0]), [Kind()], 0, random.Random(1)), 0.3))
    assert [(one.end, one.code) for one in load.outcomes] == [("broken", "ConnectError")]
    assert load.health_failed > 0
    assert not load.health_s, "a probe that failed has no latency"
    assert any("health failed" in one for one in told_of(load))
    assert load.health_failed >= 1
