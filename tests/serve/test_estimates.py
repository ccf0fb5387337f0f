"""What calls are expected to take: measured, scaled by steps alone, kept; else what the planner says."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parafuse.config import Config
from parafuse.launch.serve.estimates import MOST_KINDS, MOST_SAMPLES, Estimates, kind_of
from parafuse.launch.serve.jobs import JobRequest
from parafuse.launch.serve.messages import Adapter, Estimate, Item, Paint, Painted
from parafuse.launch.serve.predictor import Predicted, Predictor

SIZE = {"width": 64, "height": 64}


class Planner(Predictor):
    """Says 1 s beside the steps, and 0.5 s a step for the first picture of a call and 0.1 s for each other."""

    def __init__(self, *, wait_s: float = 0.0, known: bool = True, room: int = 10_000):
        super().__init__("emoji", Config(), 1)
        self.asked: list[tuple[dict[str, Any], tuple[int, ...], bool]] = []
        self.wait_s, self.known, self.room = wait_s, known, room

    async def ask(self, call: Mapping[str, Any], pictures: tuple[int, ...], *, cache: bool) -> Predicted | None:
        self.asked.append((dict(call), pictures, cache))
        await asyncio.sleep(self.wait_s)
        if not self.known:
            return None
        seconds = {n: (1.0, 0.5 + 0.1 * (n - 1)) for n in pictures}
        peaks = {n: 1000 * n for n in pictures}
        return Predicted(steps=20, seconds=seconds, peak_bytes=peaks, capacity_bytes=self.room)


def patient(asked: Estimate, patience_s: float) -> Estimate:
    return msgspec.structs.replace(asked, patience_s=patience_s)


def make(path: Path, planner: Predictor | None = None, **more: Any) -> Estimates:
    given = {"model": "emoji", "config": Config(), "num_ranks": 2, "predictor": planner or Planner(known=False), **more}
    return Estimates(path / "state" / "timings.json", **given)


def learn(estimates: Estimates, seconds: float, settings: dict[str, Any] | None = None, **more: Any) -> None:
    jobs, outputs = more.pop("jobs", 1), more.pop("outputs", 1)
    denoising = more.pop("denoising", seconds - 1)
    items = tuple(Item(job=str(i), prompt="x", seed=i, num_outputs=outputs) for i in range(jobs))
    call = Paint(call="c", items=items, settings={**SIZE, "num_inference_steps": 4, **(settings or {})}, **more)
    estimates.learn(
        call, Painted(call="c", files=(), receipt="", seconds=seconds, phases_s={"denoising": denoising, "writing": 1})
    )


def seconds(
    estimates: Estimates, settings: dict[str, Any] | None = None, outputs: int = 1, **more: Any
) -> float | None:
    kind = kind_of({**SIZE, **(settings or {})}, outputs, **more)
    return estimates.measured(kind, (settings or {}).get("num_inference_steps"))


def test_a_median_of_calls_that_are_the_same(tmp_path: Path) -> None:
    estimates = make(tmp_path)
    learn(estimates, 99.0)
    assert seconds(estimates, {"num_inference_steps": 4}) == 99, "all that is known"
    for one in (3.0, 5.0, 4.0):
        learn(estimates, one)
    assert seconds(estimates, {"num_inference_steps": 4}) == 4, "the first call of its kind got things ready"
    for _ in range(30):
        learn(estimates, 7.0)
    assert seconds(estimates, {"num_inference_steps": 4}) == 7
    assert all(len(kept) <= MOST_SAMPLES for kept in estimates._samples.values())


def test_steps_scale_and_nothing_else_does(tmp_path: Path) -> None:
    estimates = make(tmp_path)
    for _ in range(2):
        learn(estimates, 5.0, denoising=4.0)
    assert seconds(estimates, {"num_inference_steps": 40}) == pytest.approx(1 + 40)
    assert seconds(estimates) is None, "as many steps as the model takes by itself are not known"
    for other in ({"width": 128}, {"num_frames": 9}, {"strength": 0.5}, {"guidance_scale": 1.0}):
        assert seconds(estimates, {"num_inference_steps": 4, **other}) is None
    assert seconds(estimates, {"num_inference_steps": 4}, outputs=2) is None
    for what in ({"images": 1}, {"loras": 1}, {"cache": False}):
        assert seconds(estimates, {"num_inference_steps": 4}, **what) is None


def test_of_guidance_only_whether_there_is_any_counts_and_of_jobs_their_pictures() -> None:
    assert kind_of({"guidance_scale": 3.5}, 1) == kind_of({"guidance_scale": 7}, 1) != kind_of({"guidance_scale": 1}, 1)
    assert kind_of({"num_inference_steps": 4}, 1) == kind_of({}, 1)
    assert len(kind_of({"text": "a" * 10_000}, 1).key) < 100
    assert kind_of({"text": "a" * 999}, 1) != kind_of({"text": "a" * 998}, 1)


def test_what_was_learned_lasts_for_the_same_model_and_machine(tmp_path: Path) -> None:
    async def main() -> None:
        estimates = make(tmp_path)
        for one in (9.0, 3.0):
            learn(estimates, one)
        await estimates.close()

    asyncio.run(main())
    assert seconds(make(tmp_path), {"num_inference_steps": 4}) == 3
    assert seconds(make(tmp_path, num_ranks=4), {"num_inference_steps": 4}) is None
    assert seconds(make(tmp_path, model="other"), {"num_inference_steps": 4}) is None
    file = tmp_path / "state" / "timings.json"
    assert json.loads(file.read_text())["schema"] == 1
    for text in ("{", '{"schema": 1, "of": 3}', '{"schema": 1, "of": "x", "samples": {"a": [{"seconds": "x"}]}}'):
        file.write_text(text)
        assert seconds(make(tmp_path), {"num_inference_steps": 4}) is None
    assert [path.name for path in file.parent.iterdir()] == ["timings.json"]


def test_a_file_that_cannot_be_written_costs_no_job(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    estimates = make(tmp_path)
    learn(estimates, 3.0)
    assert seconds(estimates, {"num_inference_steps": 4}) == 3


def test_kinds_of_calls_are_bounded(tmp_path: Path) -> None:
    estimates = make(tmp_path)
    for width in range(MOST_KINDS + 50):
        learn(estimates, 3.0, {"width": width})
    assert len(estimates._samples) == MOST_KINDS
    assert seconds(estimates, {"num_inference_steps": 4, "width": 49}) is None
    assert seconds(estimates, {"num_inference_steps": 4, "width": 50}) == 3


def test_what_was_never_measured_is_predicted_once(tmp_path: Path) -> None:
    planner = Planner()

    async def main() -> None:
        estimates = make(tmp_path, planner)
        asked = Estimate(number=7, settings={**SIZE, "num_inference_steps": 4}, num_outputs=2)
        found = [await estimates.estimate(patient(asked, 5)) for _ in range(3)]
        assert {(one.number, one.seconds, one.peak_bytes, one.capacity_bytes, one.source) for one in found} == {
            (7, 1 + 4 * 0.6, 2000, 10_000, "predicted")
        }
        more = await estimates.estimate(Estimate(number=8, settings=SIZE, num_outputs=2))
        assert more.seconds == 1 + 20 * 0.6, "as many steps as the model takes by itself"
        assert (await estimates.estimate(Estimate(number=9, settings=SIZE, images=1))).seconds is None
        for one in (9.0, 2.0):
            learn(estimates, one, outputs=2)
        measured = await estimates.estimate(asked)
        assert (measured.seconds, measured.source, measured.peak_bytes) == (2, "measured", None)

    asyncio.run(main())
    assert [(one[1][:2], one[2]) for one in planner.asked] == [((2, 4), True), ((1, 2), True)]


def test_a_first_call_that_got_things_ready_does_not_keep_others_out(tmp_path: Path) -> None:
    async def main() -> None:
        estimates = make(tmp_path, Planner())
        asked = Estimate(number=1, settings={**SIZE, "num_inference_steps": 4})
        await estimates.estimate(patient(asked, 5))
        learn(estimates, 90.0)
        assert (await estimates.estimate(asked)).seconds == 3, "no more than the planner says"
        learn(estimates, 5.0)
        assert (await estimates.estimate(asked)).seconds == 5

    asyncio.run(main())


def test_a_prediction_that_takes_long_is_not_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        estimates = make(tmp_path, Planner(wait_s=0.2))
        asked = Estimate(number=1, settings=SIZE)
        assert (await estimates.estimate(patient(asked, 0.01))).seconds is None
        assert (await estimates.estimate(patient(asked, 20))).seconds == 11
        assert (await estimates.estimate(patient(asked, 0.01))).seconds == 11
        await estimates.close()

    asyncio.run(main())


def test_a_prediction_is_waited_for_where_it_decides_something(tmp_path: Path) -> None:
    """Else a request is taken at once, and the planner goes on alone."""

    async def main() -> None:
        estimates = make(tmp_path, Planner(wait_s=0.1))
        learn(estimates, 3.0, {"width": 64, "height": 64})

        async def source(width: int, height: int = 64, outputs: int = 1, **more: Any) -> str:
            size = {"width": width, "height": height}
            asked = Estimate(number=1, settings=size, num_outputs=outputs, patience_s=20, **more)
            return (await estimates.estimate(asked)).source

        assert await source(32) == "", "what is larger has fitted"
        assert await source(16, needs_seconds=True) == "predicted"
        with_picture = Estimate(number=1, settings={"width": 2000, "height": 64}, images=1, patience_s=20)
        found = await estimates.estimate(with_picture)
        assert (found.seconds, found.peak_bytes) == (None, 1000), "no less than without"
        for larger in ((128, 32), (32, 128), (48, 48, 2)):
            assert await source(*larger) == "predicted", larger
        assert await source(40, cache=False) == "predicted", "another kind of call"
        await estimates.close()

    asyncio.run(main())


def test_the_planner_is_there_before_it_is_needed(tmp_path: Path) -> None:
    planner = Planner()

    async def main() -> None:
        estimates = make(tmp_path, planner)
        learn(estimates, 3.0, {})  # what is measured needs no planner, but other sizes will
        assert estimates.measured(kind_of(SIZE, 1), 4) == 3
        await estimates.warm(SIZE)
        await estimates.warm(SIZE)
        # a request of the model's own size is answered at once, whatever its number of pictures, if so many fit
        for outputs in (2, 3, 8):
            asked = Estimate(number=1, settings={**SIZE, "num_inference_steps": 4}, num_outputs=outputs)
            told = await estimates.estimate(patient(asked, 0.0))
            assert told.seconds == pytest.approx(1 + 4 * (0.5 + 0.1 * (outputs - 1)))
            assert told.peak_bytes == 1000 * outputs

    asyncio.run(main())
    assert [call for call, _, _ in planner.asked] == [SIZE]


@pytest.mark.parametrize(("room", "asked"), [(10_000, 1), (3500, 2)])
def test_more_pictures_are_predicted_anew_where_they_may_not_fit(tmp_path: Path, room: int, asked: int) -> None:
    planner = Planner(room=room)

    async def main() -> None:
        estimates = make(tmp_path, planner)
        await estimates.warm(SIZE)
        for outputs in (3, 4):
            asked = Estimate(number=1, settings=SIZE, num_outputs=outputs)
            assert (await estimates.estimate(patient(asked, 5.0))).source == "predicted"
        await estimates.close()

    asyncio.run(main())
    assert [pictures[0] for _, pictures, _ in planner.asked] == [1, 4][:asked]


def test_what_the_planner_cannot_tell_is_asked_once(tmp_path: Path) -> None:
    planner = Planner(known=False)

    async def main() -> None:
        estimates = make(tmp_path, planner)
        for _ in range(3):
            assert (await estimates.estimate(Estimate(number=1, settings=SIZE, patience_s=5))).seconds is None

    asyncio.run(main())
    assert len(planner.asked) == 1


def test_several_jobs_in_a_call_measured_where_known_else_compared_by_the_planner(tmp_path: Path) -> None:
    request = JobRequest(kind="image", prompt="x", seed=1, settings={**SIZE, "num_inference_steps": 10})

    async def main() -> None:
        estimates = make(tmp_path, Planner())
        assert estimates.seconds_of(request, 2) is None, "it is being asked"
        await asyncio.sleep(0.01)
        assert estimates.seconds_of(request, 1) == pytest.approx(6.0)
        assert estimates.seconds_of(request, 2) == pytest.approx(7.0)
        for one in (50.0, 3.0):
            learn(estimates, one, {"num_inference_steps": 10})
        assert estimates.seconds_of(request, 1) == 3
        assert estimates.seconds_of(request, 2) == pytest.approx(3.5), "as much longer as the planner says"
        for one in (50.0, 6.5):
            learn(estimates, one, {"num_inference_steps": 10}, jobs=2)
        assert estimates.seconds_of(request, 2) == 6.5, "measured: no gain"
        for other in ({"lora": (Adapter(name="a"),)}, {"cache": False}, {"images": {"image": ("a", "b")}}):
            changed = msgspec.structs.replace(request, **other)
            assert estimates.seconds_of(changed, 1) is None

    asyncio.run(main())


def test_several_jobs_that_do_not_fit_the_device_do_not_go_together(tmp_path: Path) -> None:
    request = JobRequest(kind="image", prompt="x", seed=1, settings=SIZE)

    async def main() -> None:
        estimates = make(tmp_path, Planner(room=2500))
        estimates.seconds_of(request, 1)
        await asyncio.sleep(0.01)
        assert estimates.seconds_of(request, 2) is not None
        assert estimates.seconds_of(request, 3) is None

    asyncio.run(main())


def test_seconds_of_may_be_asked_where_no_loop_runs(tmp_path: Path) -> None:
    assert make(tmp_path, Planner()).seconds_of(JobRequest(kind="image", prompt="x", seed=1), 1) is None


# the planner itself, in its process


def test_the_planner_predicts_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAFUSE_CACHE", str(tmp_path / "cache"))

    async def main() -> tuple[int, list[Predicted | None]]:
        predictor = Predictor("emoji", Config(device="cpu"), 2)
        try:
            good = await predictor.ask({**SIZE, "num_inference_steps": 3}, (1, 2, 4), cache=True)
            bad = await predictor.ask({"width": 61}, (1,), cache=True)
            process = predictor._process
            assert process is not None
            assert process.returncode is None, "an error of one call ends nothing"
            return process.pid, [good, bad]
        finally:
            await predictor.close()

    pid, (good, bad) = asyncio.run(main())
    assert bad is None
    assert good is not None
    assert good.steps == 20
    one, two, four = (good.of(n, 3) for n in (1, 2, 4))
    assert one and two and four and 0 < one < two < four  # noqa: PT018
    assert good.of(1, 6) == pytest.approx(one + 3 * good.seconds[1][1])
    assert good.of(3, 3) is None
    assert 1e6 < good.peak_bytes[1] < good.peak_bytes[4] < 1e9
    assert good.capacity_bytes
    assert good.capacity_bytes > 1e8
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_planner_that_dies_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parafuse.launch.serve.predictor.MODULE", "parafuse.no_such_module")

    async def main() -> None:
        predictor = Predictor("emoji", Config(), 1)
        assert await predictor.ask(SIZE, (1,), cache=True) is None
        assert predictor.rests
        assert await predictor.ask(SIZE, (1,), cache=True) is None
        await predictor.close()

    asyncio.run(main())
