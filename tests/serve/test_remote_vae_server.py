"""A whole server of two ranks, asked by diffusers' own clients: a pipeline without an autoencoder here, and that one
there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import httpx2
import numpy as np
import pytest
import torch
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

from parafuse.engine.source import EMBEDDED
from tests.serve.running_server import RunningServer

MODEL = str(EMBEDDED / "emoji")
SIZE, LATENTS = (256, 256), (1, 8, 64, 64)
"""From which on two ranks share a decode."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = RunningServer(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        server.until_ready()
        yield server
    finally:
        server.kill()


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


def test_what_is_wrong_harms_nobody(server: RunningServer) -> None:
    url, z = f"{server.url}/v1/vae/decode", torch.zeros(1, 8, 4, 4)
    with pytest.raises(RuntimeError, match="latents have 8"):
        remote_decode(url, torch.zeros(1, 4, 4, 4), scaling_factor=1.0)
    with pytest.raises(RuntimeError, match="no finite numbers"):
        remote_decode(url, z / 0, scaling_factor=1.0)
    assert remote_decode(url, z, scaling_factor=1.0)
    assert (receipt(server)["vae"], receipt(server)["exchanged"]) == ([], {}), "too small to be shared"
    assert server.health()[0] == 200
