"""Numbers for Prometheus, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from parafuse.launch.serve.jobs import Job, State
from parafuse.launch.serve.messages import CallTimes, Status
from parafuse.launch.serve.supervisor_client import FRESH_S

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
STATES = ("starting", "ready", "restarting", "broken", "draining")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Metrics:
    """What this process counts by itself, and at each look what the supervisor said last."""

    def __init__(self, status: Callable[[], tuple[Status | None, float]]):
        """`status`: the supervisor's last, and its age in seconds."""
        self.registry = CollectorRegistry(auto_describe=False)
        self._requests = Counter(
            "parafuse_http_requests", "Answered.", ["method", "route", "status"], registry=self.registry
        )
        self._request_s = Histogram(
            "parafuse_http_request_seconds", "Until answered whole.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self._jobs = Counter("parafuse_jobs", "That ended.", ["kind", "state"], registry=self.registry)
        self._phase_s = Histogram(
            "parafuse_job_seconds", "Of jobs that ended, by phase: queued, running, total.", ["kind", "phase"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._call_s = Histogram(
            "parafuse_call_seconds", "Of calls of the pipeline: encoding, denoising, decoding, writing, total.",
            ["kind", "phase"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._rank_s = Counter(
            "parafuse_rank_seconds", "Seconds times ranks, by the id of the key.", ["key"], registry=self.registry
        )
        self._refused = Counter("parafuse_refused", "Requests that were not taken.", ["code"], registry=self.registry)
        self.registry.register(_Supervisor(status))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answer. `route` is a template, so that clients cannot make series."""
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()
        self._request_s.labels(route).observe(seconds)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def ended(self, job: Job) -> None:
        """A job that is over."""
        kind = job.request.kind
        self._jobs.labels(kind, job.state.value).inc()
        self._rank_s.labels(job.owner).inc(job.rank_seconds)
        if job.finished_s is None:
            return
        self._phase_s.labels(kind, "total").observe(max(0.0, job.finished_s - job.created_s))
        if job.started_s is not None:
            self._phase_s.labels(kind, "queued").observe(max(0.0, job.started_s - job.created_s))
            self._phase_s.labels(kind, "running").observe(max(0.0, job.finished_s - job.started_s))

    def called(self, times: CallTimes) -> None:
        """A call that ended well."""
        for phase, seconds in times.phases_s.items():
            self._call_s.labels(times.kind, phase).observe(seconds)

    def page(self, counts: Mapping[State, int]) -> bytes:
        """The text for Prometheus. `counts`: the store's, now."""
        now = CollectorRegistry(auto_describe=False)
        now.register(_Queue(counts))
        return generate_latest(self.registry) + generate_latest(now)


class _Queue(Collector):
    def __init__(self, counts: Mapping[State, int]):
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        jobs = GaugeMetricFamily("parafuse_jobs_now", "In the store, by state.", labels=["state"])
        for state in State:
            jobs.add_metric([state.value], self._counts.get(state, 0))
        yield jobs


class _Supervisor(Collector):
    """The last Status as metrics."""

    def __init__(self, status: Callable[[], tuple[Status | None, float]]):
        self._status = status

    def collect(self) -> Iterable[Metric]:
        status, age_s = self._status()
        up = GaugeMetricFamily("parafuse_supervisor_up", "1 while it says how it is.")
        up.add_metric([], float(age_s <= FRESH_S))
        yield up
        if status is None:
            return
        state = GaugeMetricFamily("parafuse_state", "1 for the state that it is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == status.state and age_s <= FRESH_S))
        yield state
        yield from _ranks(status, age_s)
        restarts = CounterMetricFamily("parafuse_restarts", "Of the ranks, by cause.", labels=["cause"])
        for cause, number in sorted(status.restarts.items()):
            restarts.add_metric([cause], number)
        yield restarts
        aside = GaugeMetricFamily("parafuse_devices_put_aside", "That failed again and again.")
        aside.add_metric([], len(status.put_aside))
        yield aside
        totals = CounterMetricFamily(
            "parafuse_supervisor", "What it has counted since it began: steps, calls, cache hits, seconds of phases.",
            labels=["what"],
        )  # fmt: skip
        for name, number in sorted(status.totals.items()):
            totals.add_metric([name], number)
        yield totals


def _ranks(status: Status, age_s: float) -> Iterable[Metric]:
    beat = GaugeMetricFamily("parafuse_rank_beat_age_seconds", "Since its last beat.", labels=["rank"])
    step = GaugeMetricFamily("parafuse_rank_step_age_seconds", "Since its last real step.", labels=["rank"])
    memory = GaugeMetricFamily("parafuse_rank_memory_bytes", "Allocated now.", labels=["rank"])
    peak = GaugeMetricFamily("parafuse_rank_peak_bytes", "The most so far.", labels=["rank"])
    for one in status.ranks:
        name = [str(one.rank)]
        beat.add_metric(name, one.beat_age_s + age_s)
        if one.last_step_age_s is not None:
            step.add_metric(name, one.last_step_age_s + age_s)
        memory.add_metric(name, one.memory_bytes)
        peak.add_metric(name, one.peak_bytes)
    return (beat, step, memory, peak)
