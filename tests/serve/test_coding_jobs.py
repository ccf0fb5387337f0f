"""Jobs of the autoencoder beside others: they go alone, spoil no statistics, and a store with older ones is read."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parafuse.config import Config
from parafuse.launch.serve.calls import Call
from parafuse.launch.serve.estimates import Estimates
from parafuse.launch.serve.feed import Handed
from parafuse.launch.serve.jobs import Job, JobRequest, new_id
from parafuse.launch.serve.latents import Autoencoder
from parafuse.launch.serve.messages import Coding, Estimate, Item, Paint, Painted, decode, encode
from parafuse.launch.serve.schedule import together
from parafuse.launch.serve.scheduler import paint_of
from parafuse.launch.serve.sqlite_store import SqliteStore
from tests.serve.http.serving import serving

CODING = Coding(task="decode", shape=(1, 8, 4, 4), dtype="float32", max_pixels=10**6, max_frames=1)
REQUEST = JobRequest(
    kind="decode", prompt="", seed=0, coding=CODING, images={"tensor": ("a.bin",)}, format="safetensors"
)


LTX = {"latent_channels": 128, "patch_size": 4, "patch_size_t": 1, "spatio_temporal_scaling": [True] * 3 + [False]}


def job(request: JobRequest = REQUEST) -> Job:
    return Job(id=new_id(request.kind), owner="local", request=request, created_s=1.0)


def test_they_go_alone() -> None:
    assert together(REQUEST) is None
    assert together(msgspec.structs.replace(REQUEST, images={})) is None


def test_ranks_get_them_whole() -> None:
    call = paint_of([job()], "/results/x")
    assert (call.coding, call.images, call.format) == (CODING, REQUEST.images, "safetensors")
    sent = encode(call)
    assert decode(sent[4:]) == call
    handed = Handed(paint=call, pictures={"tensor": (bytes(range(256)),)})
    assert msgspec.json.decode(msgspec.json.encode(handed), type=Handed) == handed  # as `feed` sends it


def test_how_long_they_may_take_is_not_what_pictures_may() -> None:
    items = (Item(job="j", prompt="", seed=0),)
    larger = msgspec.structs.replace(CODING, shape=(1, 8, 64, 64))
    kinds = {Call(Paint(call="c", items=items, coding=one)).kind for one in (None, CODING, larger)}
    assert len(kinds) == 3


def test_what_they_take_is_not_learned(tmp_path: Path) -> None:
    class Never:
        rests = False

        async def ask(self, *_: Any, **__: Any) -> None:
            pytest.fail("the planner was asked")

        async def close(self) -> None: ...

    async def main() -> None:
        never: Any = Never()
        made = Estimates(tmp_path / "t.json", model="emoji", config=Config(), num_ranks=1, predictor=never)
        call = paint_of([job()], "")
        made.learn(call, Painted(call="c", files=((),), receipt="{}", seconds=5.0, phases_s={"denoising": 0.0}))
        assert made.seconds_of(REQUEST, 1) is None
        await made.close()
        assert json.loads((tmp_path / "t.json").read_text())["samples"] == {}
        plain = await make_again(tmp_path).estimate(Estimate(number=1, settings={}, images=1))
        assert plain.seconds is None

    def make_again(folder: Path) -> Estimates:
        never: Any = Never()
        never.ask = nothing
        return Estimates(folder / "t.json", model="emoji", config=Config(), num_ranks=1, predictor=never)

    async def nothing(*_: Any, **__: Any) -> None: ...

    asyncio.run(main())


def test_what_pictures_take_does_not_decide_about_them() -> None:
    """Where a picture takes longer than the deadline leaves, latents are taken."""
    with serving("emoji") as server:
        server.behaviour.seconds = 1e6
        with server.http() as http:
            body = {"prompt": "a red apple", "deadline_s": 600, "background": True}
            assert http.post("/v1/images/generations", json=body).status_code == 429
            query: Any = {"shape": [1, 8, 4, 4], "dtype": "float32", "deadline_s": 600}
            assert http.post("/v1/vae/decode", params=query, content=bytes(512)).status_code == 200


def test_jobs_of_an_older_server_are_read(tmp_path: Path) -> None:
    old = job(JobRequest(kind="image", prompt="a", seed=1))
    fields = json.loads(msgspec.json.encode(old.request))
    del fields["coding"]
    assert msgspec.json.decode(json.dumps(fields), type=JobRequest) == old.request
    store = SqliteStore(tmp_path / "jobs.sqlite", tmp_path / "results", tmp_path / "inputs")
    try:
        (tmp_path / "inputs" / "a.bin").write_bytes(b"x")
        for one in (old, job()):
            store.accept(one)
            assert store.get(one.id) == one
    finally:
        store.close()


@pytest.mark.parametrize(
    ("config", "channels", "factor", "frames_factor"),
    [
        ({"latent_channels": 16, "block_out_channels": [1] * 4}, 16, 8, None),  # FLUX.1
        ({"z_dim": 16, "temperal_downsample": [False, True, True]}, 16, 8, 4),  # Wan 2.1, Qwen-Image
        ({"z_dim": 48, "scale_factor_spatial": 16, "scale_factor_temporal": 4, "in_channels": 12}, 48, 16, 4),
        ({"latent_channels": 16, "spatial_compression_ratio": 8, "temporal_compression_ratio": 4}, 16, 8, 4),  # Hunyuan
        (LTX, 128, 32, 8),
        ({"latent_channels": 12, "temporal_expansions": [1, 2, 3], "spatial_expansions": [2, 2, 2]}, 12, 8, 6),  # Mochi
        ({}, None, None, None),
    ],
)  # fmt: skip
def test_autoencoders_by_their_configurations(
    config: dict[str, Any], channels: int | None, factor: int | None, frames_factor: int | None
) -> None:
    found = Autoencoder.of(config)
    assert (found.channels, found.factor, found.frames_factor) == (channels, factor, frames_factor)
    assert found.pixel_channels == 3
