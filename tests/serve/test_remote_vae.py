"""The autoencoder as diffusers' own clients ask for it, over HTTP, and computed by what runs on a rank: held against
diffusers by itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

import parafuse
from parafuse.launch.serve import coding as coding_module
from parafuse.launch.serve.coding import scaled, unscaled
from parafuse.launch.serve.feed import Handed
from parafuse.launch.serve.jobs import Job
from parafuse.launch.serve.messages import Coding, Failed, Item, Paint, Painted
from parafuse.launch.serve.painting import Painter, read_pictures
from parafuse.launch.serve.scheduler import paint_of
from tests.serve.http.serving import Running, serving
from tests.serve.test_painting import Told, painter

MODELS = ("emoji", "tiny:flux.1-dev", "tiny:qwen-image", "tiny:wan2.1-14b", "tiny:sdxl", "tiny:flux.2-klein-4b")
SHAPES = {
    "emoji": (2, 8, 12, 20),
    "tiny:flux.1-dev": (2, 16, 6, 10),
    "tiny:qwen-image": (1, 16, 1, 6, 10),
    "tiny:wan2.1-14b": (1, 16, 3, 4, 6),
    "tiny:sdxl": (1, 4, 6, 10),
    "tiny:flux.2-klein-4b": (1, 32, 6, 4),
}


@dataclass
class Model:
    """A server of one, and the same weights here."""

    server: Running
    engine: parafuse.Engine
    painter: Painter
    told: Told

    @property
    def vae(self) -> Any:
        return self.engine.pipeline.vae

    @property
    def decode_url(self) -> str:
        return f"{self.server.base}/v1/vae/decode"

    @property
    def encode_url(self) -> str:
        return f"{self.server.base}/v1/vae/encode"

    def latents(self, shape: tuple[int, ...], seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.vae.dtype)

    def decoded(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self.vae.decode(latents, return_dict=False)[0]

    def run(self, job: Job, folder: Path) -> Painted | Failed:
        """As `rank.py` does it."""
        call = paint_of([job], str(folder))
        self.painter.paint(Handed(paint=call, pictures=read_pictures(call, self.server.settings.inputs)))
        return self.told.answer


@pytest.fixture(scope="module")
def model() -> Iterator[Callable[[str], Model]]:
    made: dict[str, Model] = {}
    opened: list[Any] = []

    def get(name: str) -> Model:
        if name not in made:
            engine = parafuse.Engine.from_pretrained(name, alone=True)
            running = serving(name, num_keys=0, max_outputs=2)
            opened.append(running)
            made[name] = Model(running.__enter__(), engine, *painter(engine))
            made[name].server.behaviour.ranks = made[name].run
        return made[name]

    yield get
    for one in opened:
        one.__exit__(None, None, None)


def packed(x: Tensor) -> Tensor:
    """As FLUX's pipeline does it."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def shown(pixels: Tensor) -> np.ndarray[Any, Any]:
    pictures: Any = VaeImageProcessor().postprocess(pixels, output_type="pil")
    return np.stack([np.asarray(one) for one in pictures])


@pytest.mark.parametrize("name", MODELS)
def test_a_tensor_is_bitwise_what_diffusers_gives(model: Callable[[str], Model], name: str) -> None:
    one = model(name)
    z = one.latents(SHAPES[name])
    found = remote_decode(one.decode_url, z, do_scaling=False, output_type="pt", return_type="pt")
    assert isinstance(found, Tensor)
    assert found.dtype == one.vae.dtype
    assert torch.equal(found, one.decoded(z))
    x = one.latents(tuple(found.shape), 1).clamp(-1, 1)
    found = remote_encode(one.encode_url, x)
    with torch.no_grad():
        assert torch.equal(found, one.vae.encode(x).latent_dist.mode())


def test_scaling_and_shift_that_are_given(model: Callable[[str], Model]) -> None:
    one = model("emoji")
    z = one.latents((1, 8, 8, 8))
    sent: dict[str, Any] = {"output_type": "pt", "return_type": "pt"}
    found = {
        factors: remote_decode(one.decode_url, z, scaling_factor=factors[0], shift_factor=factors[1], **sent)
        for factors in ((0.5, None), (0.5, 0.25))
    }
    assert torch.equal(found[0.5, None], one.decoded(z / 0.5))  # pyright: ignore[reportArgumentType]
    assert torch.equal(found[0.5, 0.25], one.decoded(z / 0.5 + 0.25))  # pyright: ignore[reportArgumentType]
    x = one.latents((1, 3, 16, 16)).clamp(-1, 1)
    with torch.no_grad():
        plain = one.vae.encode(x).latent_dist.mode()
    assert torch.equal(remote_encode(one.encode_url, x, scaling_factor=0.5), plain * 0.5)
    assert torch.equal(remote_encode(one.encode_url, x, shift_factor=0.25), plain - 0.25)
    assert torch.equal(remote_encode(one.encode_url, x, scaling_factor=0.5, shift_factor=0.25), (plain - 0.25) * 0.5)


@pytest.mark.filterwarnings("ignore:.*do_scaling")
def test_the_pictures_of_a_pipeline_decoded_elsewhere(model: Callable[[str], Model]) -> None:
    """`output_type="latent"` here, the decode there, by the autoencoder's own scaling: what the pipeline would have
    painted by itself. Packed ones too, and of Qwen-Image, whose autoencoder is one for video."""
    for name in ("emoji", "tiny:flux.1-dev", "tiny:qwen-image", "tiny:sdxl", "tiny:flux.2-klein-4b"):
        one = model(name)
        asked: dict[str, Any] = {
            "prompt": "a red apple",
            "num_inference_steps": 2,
            "width": 64,
            "height": 96,
            "seed": 3,
        }
        if name == "tiny:qwen-image":
            asked |= {"true_cfg_scale": 1.0}
        (picture,) = one.engine(**asked).images
        latents = one.engine(**asked, output_type="latent").images
        size: dict[str, Any] = {"height": 96, "width": 64} if latents.ndim == 3 else {}
        found = remote_decode(one.decode_url, latents, output_type="pil", image_format="png", **size)
        assert isinstance(found, Image.Image)
        off = np.abs(np.asarray(found).astype(int) - np.asarray(picture)).max()
        assert off <= ("flux.2" in name), name  # whose pipeline decodes latents that lie otherwise in memory


@pytest.mark.filterwarnings("ignore:.*do_scaling")
def test_the_video_of_a_pipeline_decoded_elsewhere(model: Callable[[str], Model]) -> None:
    one = model("tiny:wan2.1-14b")
    asked: dict[str, Any] = {
        "prompt": "a",
        "num_inference_steps": 2,
        "width": 48,
        "height": 32,
        "num_frames": 9,
        "seed": 3,
    }
    frames = one.engine(**asked, output_type="np").frames[0]
    latents = one.engine(**asked, output_type="latent").frames
    expected = (frames * 255).round().astype(np.uint8)
    found = remote_decode(one.decode_url, latents, output_type="pt", partial_postprocess=True)
    assert isinstance(found, list)
    assert np.array_equal(np.stack([np.asarray(frame) for frame in found]), expected)
    video = remote_decode(f"{one.decode_url}?fps=8", latents, output_type="mp4", return_type="mp4")
    assert isinstance(video, bytes)
    with av.open(io.BytesIO(video), "r") as container:
        assert container.streams.video[0].average_rate == 8
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == expected.shape
    assert np.corrcoef(decoded.ravel(), expected.ravel())[0, 1] > 0.9, "lossy, and noise"


def test_every_form_of_a_picture(model: Callable[[str], Model]) -> None:
    one = model("emoji")
    z = one.latents((1, 8, 12, 20))
    expected = shown(one.decoded(z))[0]
    processor = VaeImageProcessor()
    given: dict[str, Any] = {"tensor": z, "do_scaling": False}
    png = remote_decode(one.decode_url, image_format="png", **given)
    jpg = remote_decode(one.decode_url, **given)
    assert isinstance(png, Image.Image)
    assert isinstance(jpg, Image.Image)
    assert (png.format, jpg.format) == ("png", "jpeg")
    assert np.array_equal(np.asarray(png), expected)
    assert np.abs(np.asarray(jpg).astype(int) - expected).mean() < 4
    for form in (
        remote_decode(one.decode_url, output_type="pt", processor=processor, **given),
        remote_decode(one.decode_url, output_type="pt", partial_postprocess=True, **given),
        remote_decode(one.decode_url, output_type="pil", processor=processor, **given),
    ):
        picture = form[0] if isinstance(form, list) else form
        assert np.array_equal(np.asarray(picture), expected)
    whole = remote_decode(one.decode_url, output_type="pt", partial_postprocess=True, return_type="pt", **given)
    assert isinstance(whole, Tensor)
    assert (whole.dtype, whole.shape) == (torch.uint8, (1, 48, 80, 3))
    unit = remote_decode(one.decode_url, output_type="pil", return_type="pt", processor=processor, **given)
    assert isinstance(unit, Tensor)
    assert torch.equal(unit, (one.decoded(z) * 0.5 + 0.5).clamp(0, 1))


def test_every_form_of_a_video(model: Callable[[str], Model]) -> None:
    one, processor = model("tiny:wan2.1-14b"), VideoProcessor()
    z = one.latents((1, 16, 2, 4, 6))
    (expected,) = processor.postprocess_video(one.decoded(z), output_type="pil")
    given: dict[str, Any] = {"tensor": z, "do_scaling": False, "processor": processor}
    for form in (
        remote_decode(one.decode_url, output_type="pt", **given),
        remote_decode(one.decode_url, output_type="pil", **given),
        remote_decode(one.decode_url, output_type="pt", partial_postprocess=True, **given),
    ):
        assert isinstance(form, list)
        assert len(form) == 5
        for frame, other in zip(form, expected, strict=True):
            assert np.array_equal(np.asarray(frame), np.asarray(other))


def test_packed_latents_are_those_that_are_not(model: Callable[[str], Model]) -> None:
    for name in ("tiny:flux.1-dev", "tiny:qwen-image"):
        one = model(name)
        z = one.latents((2, 16, 6, 10))
        factors: dict[str, Any] = {
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "output_type": "pt",
            "return_type": "pt",
        }
        found = remote_decode(one.decode_url, packed(z), height=48, width=80, **factors)
        scaled_down = z / 0.3611 + 0.1159
        plain = one.decoded(scaled_down.unsqueeze(2))[:, :, 0] if "qwen" in name else one.decoded(scaled_down)
        assert isinstance(found, Tensor)
        assert torch.equal(found, plain)


def test_a_picture_is_encoded_and_decoded(model: Callable[[str], Model]) -> None:
    one = model("emoji")
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    own = one.vae.config
    factors: dict[str, Any] = {"scaling_factor": own.scaling_factor, "shift_factor": own.shift_factor}
    found = remote_encode(one.encode_url, picture, **factors)
    with torch.no_grad():
        plain = one.vae.encode(VaeImageProcessor().preprocess(picture)).latent_dist.mode()
    assert torch.equal(found, (plain - own.shift_factor) * own.scaling_factor)
    assert torch.equal(remote_encode(f"{one.encode_url}?do_scaling=true", picture), found)
    back = remote_decode(one.decode_url, found, image_format="png", **factors)
    assert isinstance(back, Image.Image)
    assert np.array_equal(np.asarray(back), shown(one.decoded(found / own.scaling_factor + own.shift_factor))[0])


@pytest.mark.parametrize("name", MODELS)
def test_own_scaling_goes_there_and_back(model: Callable[[str], Model], name: str) -> None:
    vae, z = model(name).vae, model(name).latents(SHAPES[name])
    if hasattr(vae, "bn"):
        torch.manual_seed(0)
        vae.bn.running_mean.normal_()
    assert not torch.allclose(unscaled(vae, z), z)
    assert torch.allclose(scaled(vae, unscaled(vae, z)), z, atol=1e-5)
    if hasattr(vae, "bn"):
        vae.bn.running_mean.zero_()


def test_a_receipt_says_what_ran(model: Callable[[str], Model]) -> None:
    one = model("emoji")
    z = one.latents((1, 8, 8, 8))
    with one.server.http(None) as http:
        query: dict[str, Any] = {"shape": [1, 8, 8, 8], "dtype": "float32", "output_type": "pt", "do_scaling": True}
        answer = http.post("/v1/vae/decode", params=query, content=z.numpy().tobytes())
        job = answer.headers["x-job"]
        receipt = http.get(f"/v1/receipts/{job}").json()
        file = http.get(f"/v1/files/{job}/0").content
        kept = http.get(f"/v1/jobs/{job}").json()
    assert receipt["task"] == "decode"
    assert (receipt["input"], receipt["output"]) == (
        {"shape": [1, 8, 8, 8], "dtype": "float32"}, {"shape": [1, 3, 32, 32], "dtype": "float32"},
    )  # fmt: skip
    assert receipt["scaling"] == {
        "own": True, "scaling_factor": one.vae.config.scaling_factor, "shift_factor": one.vae.config.shift_factor,
        "by_channel": False,
    }  # fmt: skip
    assert (receipt["job"], receipt["plan"]["model"]) == (job, "emoji")
    assert (kept["kind"], kept["status"], kept["seed"]) == ("decode", "done", None)
    from safetensors.torch import load

    assert answer.content == load(file)["tensor"].numpy().tobytes()


def test_what_only_a_rank_can_see_is_told(model: Callable[[str], Model]) -> None:
    one = model("emoji")
    z = one.latents((1, 8, 8, 8))
    z[0, 0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="no finite numbers"):
        remote_decode(one.decode_url, z, scaling_factor=1.0)
    assert remote_decode(one.decode_url, one.latents((1, 8, 8, 8)), scaling_factor=1.0)


def test_a_rank_holds_to_what_the_server_could_not_see() -> None:
    """Of a model whose configuration is known once it is loaded, as one file is."""
    engine = parafuse.Engine.from_pretrained("emoji", alone=True)
    made, told = painter(engine)
    data = torch.zeros(1, 8, 8, 8).numpy().tobytes()
    limits: dict[str, Any] = {"max_pixels": 32 * 32, "max_frames": 1}
    cases: list[tuple[tuple[int, ...], dict[str, Any], str]] = [
        ((1, 8, 8, 8), {"max_pixels": 32 * 32 - 1}, "at most 1023 are allowed"),
        ((1, 4, 8, 16), {}, "latents have 8"),
        ((1, 8, 2, 4, 8), {}, "is for pictures"),
        ((1, 16, 32), {"height": 24, "width": 32}, "has 16 tokens; 32x24 has 12"),
    ]
    for shape, more, word in cases:
        asked = Coding(task="decode", shape=shape, dtype="float32", **{**limits, **more})
        made.paint(Handed(paint=_call(asked), pictures={"tensor": (data,)}))
        assert isinstance(told.answer, Failed), shape
        assert told.answer.kind == "invalid"
        assert word in told.answer.message
    right = Coding(task="decode", shape=(1, 8, 8, 8), dtype="float32", **limits)
    made.paint(Handed(paint=_call(right), pictures={"tensor": (data,)}))
    assert isinstance(told.answer, Painted)


def _call(asked: Coding, *, items: int = 1, **more: Any) -> Paint:
    given: dict[str, Any] = {"format": "safetensors"} | more
    return Paint(call="c", items=(Item(job="j", prompt="", seed=0),) * items, coding=asked, **given)


def test_a_call_that_was_told_to_end_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = parafuse.Engine.from_pretrained("emoji", alone=True)
    made, told = painter(engine)
    asked = Coding(task="decode", shape=(1, 8, 4, 4), dtype="float32", max_pixels=10**6, max_frames=1)
    files = {"tensor": (torch.zeros(1, 8, 4, 4).numpy().tobytes(),)}
    told.stop = "cancelled"
    monkeypatch.setattr(coding_module.Coder, "run", lambda *_: pytest.fail("it was begun"))
    made.paint(Handed(paint=_call(asked), pictures=files))
    assert (type(told.answer), told.answer.kind) == (Failed, "stopped")
    told.stop = ""
    for call in (_call(asked, items=2), _call(asked, format="png")):
        made.paint(Handed(paint=call, pictures=files))
        assert (type(told.answer), told.answer.kind) == (Failed, "invalid")


def test_an_autoencoder_that_overflows_in_float16_runs_in_float32() -> None:
    """SDXL's, which says so; it is as it was afterwards."""
    engine = parafuse.Engine.from_pretrained("tiny:sdxl", parafuse.Config(dtype="float16"), alone=True)
    made, told = painter(engine)
    z = torch.randn((1, 4, 6, 10), generator=torch.Generator().manual_seed(0)).half()
    asked = Coding(task="decode", shape=tuple(z.shape), dtype="float16", max_pixels=10**6, max_frames=1)
    made.paint(Handed(paint=_call(asked), pictures={"tensor": (z.numpy().tobytes(),)}))
    assert isinstance(told.answer, Painted), told.answer
    assert '"output": {"shape": [1, 3, 48, 80], "dtype": "float32"}' in told.answer.receipt
    assert engine.pipeline.vae.dtype == torch.float16
