"""A whole server of two ranks: what a client is given, and what it is still given when processes die."""

from __future__ import annotations

import base64
import io
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import httpx2
import numpy as np
import openai
import psutil
import pytest
import torch
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

import parafuse
from parafuse.engine.source import EMBEDDED
from tests.serve.running_server import RunningServer

pytestmark = pytest.mark.long

PROMPT, SEED, STEPS = "a red apple", 7, 4
LONG = 60
"""Steps of a request that something happens to."""
MODEL = str(EMBEDDED / "emoji")
SIZE, LATENTS = (256, 256), (1, 8, 64, 64)
"""From which on two ranks share a decode."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = RunningServer(tmp_path_factory.mktemp("server"), "--probe", "5")
    server.start()
    try:
        server.until_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    server.until_ready()
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=170)


def alone() -> np.ndarray[Any, Any]:
    """The picture of an engine on one rank."""
    with parafuse.Engine.from_pretrained("emoji") as engine:
        picture = engine(PROMPT, seed=SEED, num_inference_steps=STEPS).images[0]
    return np.asarray(picture.convert("RGB"), dtype=np.int16)


def picture_of(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)


def background(server: RunningServer, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "seed": SEED, "steps": LONG, "background": True, **fields}
    answer = httpx2.post(f"{server.url}/v1/images/generations", json=body, timeout=60)
    assert answer.status_code == 202, answer.text
    return answer.json()


def job_of(server: RunningServer, job: str) -> dict[str, Any]:
    """Asked until it is answered: the HTTP process may be on its way back."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return httpx2.get(f"{server.url}/v1/jobs/{job}", timeout=30).raise_for_status().json()
        except httpx2.HTTPError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def until(server: RunningServer, job: str, *states: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def check() -> bool:
        found.update(job_of(server, job))
        return found["status"] in states

    server.until(check)
    return found


def test_a_picture_is_that_of_an_engine_on_one_rank(client: openai.OpenAI) -> None:
    extra = {"seed": SEED, "steps": STEPS}
    answer = client.images.generate(model="emoji", prompt=PROMPT, response_format="b64_json", extra_body=extra)
    assert answer.data is not None
    found = picture_of(base64.b64decode(answer.data[0].b64_json or ""))
    assert np.abs(found - alone()).max() <= 1
    again = client.images.generate(model="emoji", prompt=PROMPT, response_format="b64_json", extra_body=extra)
    assert again.data is not None
    same = picture_of(base64.b64decode(again.data[0].b64_json or ""))
    assert np.array_equal(same, found), "bitwise at the same number of ranks"


def test_a_job_is_cancelled_within_three_steps_and_the_next_one_is_right(
    server: RunningServer, client: openai.OpenAI
) -> None:
    job = background(server)["id"]
    until(server, job, "running")
    httpx2.delete(f"{server.url}/v1/jobs/{job}", timeout=30).raise_for_status()
    over = until(server, job, "cancelled", "done", "failed")
    assert over["status"] == "cancelled", over
    test_a_picture_is_that_of_an_engine_on_one_rank(client)


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("kind", ["rank", "supervisor"])
def test_the_job_in_flight_survives_the_death_of(server: RunningServer, kind: str) -> None:
    server.until_ready()
    before = {one.pid for one in server.processes("rank")}
    job = background(server)["id"]
    until(server, job, "running")
    server.signal(kind, signal.SIGKILL, -1)
    server.until(lambda: server.health()[0] != 200, 20)
    over = until(server, job, "done", "failed")
    assert (over["status"], over["tries"]) == ("done", 2), over
    assert not before & {one.pid for one in server.processes("rank")}, "the whole group is a new one"
    server.until_ready()


@pytest.mark.whole
def test_the_job_in_flight_goes_on_when_the_http_process_dies(server: RunningServer) -> None:
    server.until_ready()
    job = background(server)["id"]
    until(server, job, "running")
    killed = server.signal("http", signal.SIGKILL)
    over = until(server, job, "done", "failed")
    assert (over["status"], over["tries"]) == ("done", 1), over
    assert [one.pid for one in server.processes("http")] != [killed]


@pytest.mark.whole
def test_a_rank_that_is_stopped_is_found_and_its_job_is_done_again(server: RunningServer) -> None:
    server.until_ready()
    job = background(server)["id"]
    until(server, job, "running")
    stopped = server.signal("rank", signal.SIGSTOP, -1)
    over = until(server, job, "done", "failed")
    assert (over["status"], over["tries"]) == ("done", 2), over
    assert not psutil.pid_exists(stopped) or psutil.Process(stopped).status() == psutil.STATUS_ZOMBIE
    server.until_ready()


def test_what_is_wrong_changes_nothing(server: RunningServer, client: openai.OpenAI) -> None:
    for wrong in ({"size": "63x64"}, {"steps": 0}, {"stpes": 3}, {"n": 0}):
        answer = httpx2.post(f"{server.url}/v1/images/generations", json={"prompt": PROMPT, **wrong}, timeout=30)
        assert answer.status_code == 400, answer.text
        assert next(iter(wrong)) in answer.json()["error"]["message"]
    test_a_picture_is_that_of_an_engine_on_one_rank(client)


def test_a_server_that_is_told_to_end_leaves_jobs_for_the_next_one_and_no_process(tmp_path: Path) -> None:
    server = RunningServer(tmp_path, "--drain", "1", ranks=1)
    server.start()
    try:
        server.until_ready()
        until(server, background(server, steps=STEPS)["id"], "done")  # from now on no request waits for a prediction
        jobs = [background(server, steps=steps)["id"] for steps in (LONG, STEPS)]
        until(server, jobs[0], "running")
        pids = server.pids()
        assert len(pids) == 4, pids
        assert server.stop() == 0
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        server.start()
        server.until_ready()
        for job in jobs:
            over = until(server, job, "done", "failed")
            assert (over["status"], over["tries"]) == ("done", 1), over
        server.kill()
        server.until(lambda: not [pid for pid in pids if psutil.pid_exists(pid)])
    finally:
        server.kill()


def test_a_second_server_of_the_same_state_is_refused(server: RunningServer) -> None:
    second = RunningServer(server.folder, ranks=1)
    with pytest.raises(AssertionError, match="another server uses it"):
        second.start()
    assert server.processes("keeper"), "the first one goes on"


# Asked by diffusers' own clients: a pipeline without an autoencoder here, and that one there.


@pytest.fixture(scope="module")
def vae() -> Any:
    return diffusers.AutoencoderKL.from_pretrained(MODEL, subfolder="vae")


def receipt(server: RunningServer) -> dict[str, Any]:
    """Of the last job."""
    (job,) = httpx2.get(f"{server.url}/v1/jobs", params={"limit": 1}).raise_for_status().json()["data"]
    assert job["status"] == "done"
    return httpx2.get(f"{server.url}/v1/receipts/{job['id']}").raise_for_status().json()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_a_decode_that_ranks_share(server: RunningServer, vae: Any) -> None:
    server.until_ready()
    z = torch.randn(LATENTS, generator=torch.Generator().manual_seed(0))
    factors = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor}
    found = remote_decode(f"{server.url}/v1/vae/decode", z, output_type="pt", return_type="pt", **factors)
    assert isinstance(found, torch.Tensor)
    with torch.no_grad():
        plain = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert relative_error(found, plain) < 1e-5, relative_error(found, plain)
    told = receipt(server)
    assert told["plan"]["world_size"] == 2
    assert any("decode split" in line for line in told["vae"]), told["vae"]
    assert sum(count["bytes"] for count in told["exchanged"].values()) > 0, told["exchanged"]


def test_an_encode(server: RunningServer, vae: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    found = remote_encode(f"{server.url}/v1/vae/encode", Image.fromarray(noise))
    with torch.no_grad():
        plain = vae.encode(2.0 * (torch.from_numpy(noise).permute(2, 0, 1)[None] / 255.0) - 1.0).latent_dist.mode()
    assert relative_error(found, plain) < 1e-5


@pytest.mark.filterwarnings("ignore:.*do_scaling")
def test_a_pipeline_without_an_autoencoder(server: RunningServer) -> None:
    """As the guide has it. What the server paints with the same noise is the same picture."""
    pipeline: Any = diffusers.FluxPipeline.from_pretrained(MODEL, vae=None)
    pipeline.vae_scale_factor = 4  # without an autoencoder it takes 8
    call = json.loads((Path(MODEL) / "parafuse.json").read_text())["call"] | {"num_inference_steps": 2}
    accepted = {name: value for name, value in call.items() if name != "negative_prompt"}
    latents = pipeline(
        "a red apple", **accepted, generator=torch.Generator().manual_seed(7), output_type="latent"
    ).images
    size = {"height": call["height"], "width": call["width"]}
    picture = remote_decode(f"{server.url}/v1/vae/decode", latents, image_format="png", **size)
    assert isinstance(picture, Image.Image)
    whole: Any = diffusers.FluxPipeline.from_pretrained(MODEL)
    (plain,) = whole("a red apple", **accepted, generator=torch.Generator().manual_seed(7)).images
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(plain)).max() <= 1


def test_wrong_latents_harm_nobody(server: RunningServer) -> None:
    url, z = f"{server.url}/v1/vae/decode", torch.zeros(1, 8, 4, 4)
    with pytest.raises(RuntimeError, match="latents have 8"):
        remote_decode(url, torch.zeros(1, 4, 4, 4), scaling_factor=1.0)
    with pytest.raises(RuntimeError, match="no finite numbers"):
        remote_decode(url, z / 0, scaling_factor=1.0)
    assert remote_decode(url, z, scaling_factor=1.0)
    assert (receipt(server)["vae"], receipt(server)["exchanged"]) == ([], {}), "too small to be shared"
    assert server.health()[0] == 200
