"""Ranks of a server as processes, with a supervisor that is a test: what they paint, refuse, leave and survive."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import parafuse
from parafuse.launch.serve.messages import Adapter, End, Failed, Item, Paint, Painted, Stepped, Stop
from tests.dist.ranks import run_ranks
from tests.serve.rank_group import Group, group

STEPS: dict[str, Any] = {"num_inference_steps": 4, "width": 64, "height": 64}
PROMPT = "a red apple"
CACHE = "first-block:0.9,warmup_steps=1"
SLACK = 3
"""Steps after which a request that is to stop has stopped."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With a name that is short enough for a socket in it."""
    made = Path(tempfile.mkdtemp(prefix="pf"))
    yield made
    shutil.rmtree(made)


def _lora(seed: int) -> dict[str, Any]:
    from tests.adapters import lora

    return lora(parafuse.Engine.from_pretrained("emoji", alone=True).pipeline, ["transformer"], rank=2, seed=seed)


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Group]:
    """Two ranks, the second of which is given the calls."""
    loras = folder / "loras"
    loras.mkdir()
    weights = _lora(1)
    for name in ("first", "second.v1"):
        save_file({key: x * len(name) / 5 for key, x in weights.items()}, loras / f"{name}.safetensors")
    save_file({"transformer.nothing.lora_A.weight": next(iter(weights.values()))}, loras / "alien.safetensors")
    (loras / "broken.safetensors").write_bytes(b"no header")
    config = {"parallel": {"ulysses": 2}, "cache": CACHE}
    with group(folder, 2, feeder=1, config=config, loras=str(loras), max_loras=1) as made:
        yield made


def paint(ranks: Group, *items: Item, **more: Any) -> Painted | Failed:
    call = f"c{len(list(ranks.results.iterdir()))}"
    made = ranks.results / call
    made.mkdir()
    asked: dict[str, Any] = {"settings": STEPS, "cache": False, "folder": str(made)}
    return ranks.answer(Paint(call=call, items=items or (item(),), **asked | more))


def item(seed: int = 7, prompt: str = PROMPT, **more: Any) -> Item:
    return Item(job=f"job-{seed}", prompt=prompt, seed=seed, **more)


def pictures(ranks: Group, *items: Item, **more: Any) -> list[np.ndarray]:
    answer = paint(ranks, *items, **more)
    assert isinstance(answer, Painted), answer
    files = [name for names in answer.files for name in names]
    return [np.asarray(Image.open(ranks.results / answer.call / name).convert("RGB")).astype(int) for name in files]


def _plainly(cache: str | None, settings: dict[str, Any]) -> np.ndarray:
    config = parafuse.Config(parallel=parafuse.Parallel(ulysses=2), cache=cache)
    engine = parafuse.Engine.from_pretrained("emoji", config)
    found = np.asarray(engine(PROMPT, seed=7, **settings).images[0]).astype(int)
    engine.close()
    return found


def test_a_picture_is_bitwise_the_engines_own(two: Group) -> None:
    answer = paint(two, item(), previews=2)
    assert isinstance(answer, Painted)
    with Image.open(two.results / answer.call / answer.files[0][0]) as image:
        assert image.info == {"parafuse": "job-7"}
        painted = np.asarray(image).astype(int)
    assert np.array_equal(painted, run_ranks(_plainly, 2, None, STEPS)[0])
    receipt = json.loads(answer.receipt)
    assert receipt["call"]["prompt"] == PROMPT
    assert receipt["seed"] == 7
    assert receipt["plan"]["degrees"]["ulysses"] == 2
    assert not any("callback" in key for key in receipt["call"])
    assert {"encoding", "denoising", "decoding", "writing"} <= answer.phases_s.keys()
    assert {one.feeds for one in two.hellos.values()} == {True, False}
    assert two.hellos[1].feeds


def test_the_cache_is_on_or_off_by_call(two: Group) -> None:
    longer = STEPS | {"num_inference_steps": 8}
    cached, plain = (run_ranks(_plainly, 2, cache, longer)[0] for cache in (CACHE, None))
    assert not np.array_equal(cached, plain)
    assert np.array_equal(pictures(two, cache=True, settings=longer)[0], cached)
    assert np.array_equal(pictures(two, cache=False, settings=longer)[0], plain)
    answer = paint(two, cache=True, settings=longer)
    assert isinstance(answer, Painted)
    assert answer.cache_hits > 0
    assert answer.cache_calls > answer.cache_hits


def test_steps_and_previews_are_told(two: Group) -> None:
    pictures(two)  # latents and picture, from which previews are learned
    two.send(Paint(call="seen", items=(item(), item(8)), settings=STEPS, previews=2, cache=False))
    steps = [two.until((Stepped, Painted)) for _ in range(STEPS["num_inference_steps"] + 1)]
    assert isinstance(steps.pop(), Painted)
    assert [one.step for one in steps] == [1, 2, 3, 4]
    assert [len(one.previews) for one in steps] == [2, 0, 2, 0]
    for data in steps[2].previews:
        assert min(Image.open(io.BytesIO(data)).size) >= 64


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"settings": STEPS | {"width": 63}}, "invalid", "width=63: must be a multiple of 8"),
        ({"settings": STEPS | {"hieght": 64}}, "invalid", "did you mean 'height'"),
        ({"settings": STEPS | {"generator": 3}}, "invalid", "'generator' is none that a request sets"),
        ({"settings": STEPS | {"guidance_scale": "much"}}, "invalid", "guidance_scale='much'"),
        ({"format": "gif"}, "invalid", "format='gif'"),
        ({"format": "mp4"}, "invalid", "the model paints pictures"),
        ({"folder": "/tmp"}, "invalid", "not in the folder of results"),
        ({"images": {"image": ("../job.json",)}}, "invalid", "picture 'job.json' is not there"),
        ({"images": {"image": ("text.png",)}}, "invalid", "no picture that can be read"),
        ({"lora": (Adapter(name="frist"),)}, "invalid", "did you mean 'first'"),
        ({"lora": (Adapter(name="../loras/first"),)}, "invalid", "none of this name"),
        ({"lora": (Adapter(name="broken"),)}, "invalid", "is broken"),
        ({"lora": (Adapter(name="alien"),)}, "invalid", "alien"),
        ({"lora": (Adapter(name="first"), Adapter(name="second.v1"))}, "invalid", "at most 1"),
        ({"settings": STEPS | {"width": 8_000_000, "height": 8_000_000}}, "memory", "out of memory"),
    ],
)
def test_what_is_wrong_fails_on_all_and_the_next_one_works(
    two: Group, more: dict[str, Any], kind: str, message: str
) -> None:
    before = pictures(two)[0]
    (two.inputs / "text.png").write_text("no picture")
    answer = paint(two, **more)
    assert isinstance(answer, Failed), answer
    assert (answer.kind, message in answer.message) == (kind, True), answer
    assert "\n" not in answer.message
    assert np.array_equal(pictures(two)[0], before)


def test_a_call_is_left_within_three_steps_and_the_next_one_is_right(two: Group) -> None:
    before = pictures(two)[0]
    two.send(Paint(call="long", items=(item(),), settings=STEPS | {"num_inference_steps": 60}, cache=False))
    while two.until(Stepped).step < 3:
        pass
    two.send(Stop(call="long", reason="the client has gone"))
    left = two.until(Failed)
    assert left.kind == "stopped"
    assert "the client has gone" in left.message
    steps = int(left.message.split()[3].rstrip(":"))
    assert steps < 60
    two.send(Stop(call="other", reason="of a call that is not there"))
    assert np.array_equal(pictures(two)[0], before)


def test_a_batch_is_what_each_is_alone(two: Group) -> None:
    items = (item(3, "a rocket"), item(4, "a yellow star", negative_prompt="blue"))
    together = paint(two, *items)
    assert isinstance(together, Painted)
    assert [len(names) for names in together.files] == [1, 1]
    for one, names, receipt in zip(items, together.files, together.receipts, strict=True):
        found = np.asarray(Image.open(two.results / together.call / names[0])).astype(int)
        assert np.abs(found - pictures(two, one)[0]).max() <= 1
        others = [other.prompt for other in items if other is not one]
        assert json.loads(receipt)["call"]["prompt"] == one.prompt
        assert json.loads(receipt)["seed"] == one.seed
        assert not any(prompt in receipt or prompt in together.receipt for prompt in others)


def test_picture_i_of_a_job_is_that_of_its_seed_and_i(two: Group) -> None:
    several = pictures(two, item(3, num_outputs=2), item(9, "a rocket", num_outputs=1))
    alone = [pictures(two, one)[0] for one in (item(3), item(4), item(9, "a rocket"))]
    for found, expected in zip(several, alone, strict=True):
        assert np.abs(found - expected).max() <= 1
    assert np.abs(several[0] - several[1]).max() > 1


def test_adapters_come_and_go(two: Group) -> None:
    plain = pictures(two)[0]
    first = pictures(two, lora=(Adapter(name="first"),))[0]
    assert np.abs(first - plain).max() > 1
    assert np.array_equal(pictures(two)[0], plain)  # bitwise, beside the layers of an adapter that is off
    second = pictures(two, lora=(Adapter(name="second.v1"),))[0]  # the first one goes: one is kept
    assert np.abs(first - second).max() > 1
    half = pictures(two, lora=(Adapter(name="second.v1", scale=0.5),))[0]
    assert np.abs(half - second).max() > 1
    assert np.array_equal(pictures(two, lora=(Adapter(name="first"),))[0], first)
    answer = paint(two, lora=(Adapter(name="second.v1"),))
    assert isinstance(answer, Painted)
    assert "loading" in answer.phases_s, "which takes longer than a call's other phases may"
    pictures(two, lora=(Adapter(name="first"),))
    answer = paint(two, lora=(Adapter(name="first", scale=0.25),))
    assert isinstance(answer, Painted)
    [told] = json.loads(answer.receipt)["lora"]
    assert (told["name"], told["scale"], len(told["sha256"])) == ("first", 0.25, 64)


def test_a_disk_that_says_no_fails_one_call(two: Group) -> None:
    gone = two.results / "gone"
    gone.mkdir()
    two.send(Paint(call="gone", items=(item(),), settings=STEPS | {"num_inference_steps": 8}, folder=str(gone)))
    two.until(Stepped)
    gone.rmdir()
    answer = two.until((Painted, Failed))
    assert isinstance(answer, Failed)
    assert answer.kind == "internal"
    assert isinstance(paint(two), Painted)


def test_an_idle_rank_moves_and_one_that_is_stopped_does_not(two: Group) -> None:
    two.await_idle()
    for rank in (0, 1):
        first = two.beats[rank][-1]
        _wait_until(lambda rank=rank, first=first: two.beats[rank][-1].moves > first.moves)
    two.processes[0].send_signal(signal.SIGSTOP)
    try:
        mark, other = len(two.beats[0]) + 1, len(two.beats[1])  # one may be on its way
        _wait_until(lambda: len(two.beats[1]) > other + 4)
        assert len(two.beats[0]) <= mark
    finally:
        two.processes[0].send_signal(signal.SIGCONT)
    assert isinstance(paint(two), Painted)


def _wait_until(holds: Any, timeout_s: float = 60.0) -> None:
    import time

    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_rank_ends_the_other_in_the_middle_of_a_call(two: Group) -> None:
    """The last one with these ranks."""
    two.send(Paint(call="lost", items=(item(),), settings=STEPS | {"num_inference_steps": 200}))
    two.until(Stepped)
    two.processes[0].kill()
    codes = two.ended(20.0)
    assert codes[0] == -signal.SIGKILL
    assert codes[1] not in (None, 0)
    said = json.loads(two.error_file(1).read_text())["message"]
    assert said["secondary"]


def test_one_rank_writes_each_format_and_ends_when_told(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="pf"))
    try:
        with group(folder, 1) as one:
            engine = parafuse.Engine.from_pretrained("emoji")
            plain = np.asarray(engine(PROMPT, seed=7, **STEPS).images[0]).astype(int)
            assert np.array_equal(pictures(one)[0], plain)
            for format in ("jpeg", "webp"):
                answer = paint(one, format=format)
                assert isinstance(answer, Painted)
                file = one.results / answer.call / answer.files[0][0]
                assert np.abs(np.asarray(Image.open(file).convert("RGB")).astype(int) - plain).mean() < 8
                assert b"job-7" in file.read_bytes()
                assert PROMPT.encode() not in file.read_bytes()
            probe = paint(one, folder="", settings=STEPS | {"num_inference_steps": 1})
            assert isinstance(probe, Painted)
            assert probe.files == ((),)
            one.send(End())
            assert one.ended(60.0) == [0], one.logs()
            assert not one.error_file(0).exists()
    finally:
        shutil.rmtree(folder)


ALONE = """
import sys, time
from parafuse.launch.serve.rank import Ending
from parafuse.launch.serve.beats import Line
Line(sys.argv[1], Ending().lost).listen()
time.sleep(120)
"""


def test_a_rank_ends_with_its_supervisors_socket(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="pf"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s"))
        listening.listen()
        env = os.environ | {"TORCHELASTIC_ERROR_FILE": str(folder / "e.json")}
        process = subprocess.Popen([sys.executable, "-c", ALONE, str(folder / "s")], env=env)
        connection, _ = listening.accept()
        assert process.poll() is None
        connection.close()
        assert process.wait(30.0) == 1
    assert "the supervisor has gone" in (folder / "e.json").read_text()
    shutil.rmtree(folder)
