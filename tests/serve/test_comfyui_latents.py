"""ComfyUI's nodes for latents, held against the autoencoder by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.serve.http.test_comfyui import Comfy, InterruptProcessingException, comfy
from tests.serve.test_remote_vae import Model, model

__all__ = ["comfy", "model"]  # fixtures


def images_of(pixels: Tensor) -> Tensor:
    """As ComfyUI's own node gives them."""
    x = ((pixels + 1) / 2).clamp(0, 1)
    x = x.movedim(1, -1)
    return x.reshape(-1, *x.shape[-3:])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("emoji", (2, 8, 12, 20)), ("tiny:wan2.1-14b", (1, 16, 3, 4, 6)), ("tiny:flux.1-dev", (1, 16, 6, 10))],
)
def test_latents_there_and_back(
    comfy: Comfy, model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]
) -> None:
    one = model(name)
    monkeypatch.setenv("PARAFUSE_SERVER", one.server.base)
    z = one.latents(shape).float()
    (images,) = comfy.run("ParafuseDecode", samples={"samples": z})
    expected = images_of(one.decoded(z.to(one.vae.dtype)).float())
    assert images.shape == expected.shape
    assert images.dtype == torch.float32
    assert (images - expected).abs().max() <= 1e-5
    is_video = len(shape) == 5
    (latents,) = comfy.run("ParafuseEncode", images=images, as_video=is_video)
    pixels = (images * 2 - 1).movedim(-1, 1)
    pixels = pixels.movedim(0, 1)[None] if is_video else pixels
    with torch.no_grad():
        again = one.vae.encode(pixels.to(one.vae.dtype)).latent_dist.mode().float()
    assert latents["samples"].shape == z.shape
    assert (latents["samples"] - again).abs().max() <= 1e-5 * again.abs().max()


def test_latents_of_another_model_are_refused_in_one_line(
    comfy: Comfy, model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAFUSE_SERVER", model("emoji").server.base)
    with pytest.raises(RuntimeError, match="this model's latents have 8") as found:
        comfy.run("ParafuseDecode", samples={"samples": torch.zeros(1, 4, 8, 8)})
    assert "\n" not in str(found.value)
    with pytest.raises(RuntimeError, match="multiples of"):
        comfy.run("ParafuseEncode", images=torch.zeros(1, 33, 32, 3))


def test_cancel_does_not_wait_for_the_server(
    comfy: Comfy, model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model("emoji")
    monkeypatch.setenv("PARAFUSE_SERVER", one.server.base)
    one.server.behaviour.hold, comfy.interrupt_after = True, 2
    begun = time.monotonic()
    try:
        with pytest.raises(InterruptProcessingException):
            comfy.run("ParafuseDecode", samples={"samples": one.latents((1, 8, 4, 4))})
    finally:
        one.server.behaviour.hold = False
    assert time.monotonic() - begun < 20
