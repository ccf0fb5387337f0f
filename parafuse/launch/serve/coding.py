"""Calls of the autoencoder alone: latents to pixels, and pixels to latents, on all ranks as the engine shares them."""

from __future__ import annotations

import inspect
import io
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from parafuse.engine.quantized import weights_of
from parafuse.engine.receipt import versions
from parafuse.engine.surface import Act
from parafuse.engine.told import exchanged_since
from parafuse.errors import ConfigError, UnsupportedError
from parafuse.launch.serve import outputs
from parafuse.launch.serve.latents import PACK, PACKED_RANK, PICTURE_RANK, VIDEO_RANK, Autoencoder
from parafuse.launch.serve.messages import Coding

if TYPE_CHECKING:
    from parafuse.engine.engine import Engine

DECODE = "decode"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FORMATS = {"picture": ("png", "jpeg"), "video": (outputs.VIDEO,)}
"""What is written of a result; tensors as safetensors."""


class Coder:
    """Of one engine, on this rank."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def take(self, coding: Coding, format: str, files: Mapping[str, tuple[bytes, ...]]) -> Tensor:
        """What came, on the host: checked against the autoencoder that is loaded. Raises ConfigError and
        UnsupportedError; nothing is said to other ranks."""
        vae = self._vae
        Autoencoder.of(vae.config).check(coding)
        if format not in FORMATS.get(coding.gives, (outputs.TENSOR,)):
            raise ConfigError(f"format={format!r}: is none for a result that is {coding.gives}.")
        if "num_frames" in _needed(getattr(vae, coding.task)):
            raise UnsupportedError(f"{type(vae).__name__} must be told of frames, which this request cannot say.")
        if coding.own_scaling:
            _own_scaling(vae)  # that there is one
        (data,) = files["tensor" if coding.shape else "image"]
        x = _tensor(data, coding) if coding.shape else _pixels(data)
        if not x.isfinite().all():
            raise ConfigError("tensor: holds values that are no finite numbers.")
        return x

    def run(self, coding: Coding, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the autoencoder gives, on every rank, and a receipt. Collective: every rank calls it with the same."""
        engine, vae, begun = self._engine, self._vae, time.perf_counter()
        before = engine.handle.exchanged()
        with torch.no_grad(), _in_float32_if_asked(engine, vae):
            x = x.to(engine.world.device, vae.dtype)
            found = self._decoded(coding, x) if coding.task == DECODE else self._encoded(coding, x)
        shared = exchanged_since(engine.handle, before) | exchanged_since(engine.handle, before, decoding=True)
        lines = [line for one in engine.handle.autoencoders().values() for line in one.lines()]
        receipt = {
            "task": coding.task,
            "autoencoder": type(vae).__name__,
            "input": {"shape": list(coding.shape) or list(x.shape), "dtype": coding.dtype or "uint8"},
            "output": {"shape": list(found.shape), "dtype": _name(found.dtype)},
            "scaling": _scaling_told(vae, coding),
            "plan": engine.plan.without_replay().to_dict(),
            "versions": versions(),
            "weights": weights_of(engine.pipeline),
            "vae": lines if shared or engine.world.size == 1 else [],  # they tell of earlier calls too
            "exchanged": shared,
            "timings_s": {"request": round(time.perf_counter() - begun, 3)},
        }
        return found, receipt

    @property
    def _vae(self) -> Any:
        vae = getattr(self._engine.pipeline, "vae", None)
        if not isinstance(vae, nn.Module):
            raise UnsupportedError(f"{type(self._engine.pipeline).__name__} has no component vae.")
        return vae

    def _decoded(self, coding: Coding, x: Tensor) -> Tensor:
        """(B, C, H, W), (B, C, F, H, W) or packed -> pixels of as many dims, from -1 to 1 about; packed: of 4."""
        vae, facts = self._vae, Autoencoder.of(self._vae.config)
        if x.ndim == PACKED_RANK:
            x = unpacked(x, coding.height or 0, coding.width or 0, facts.factor or 1)
        if coding.own_scaling:
            x = unscaled(vae, x)
        else:
            x = x if coding.scaling_factor is None else x / coding.scaling_factor
            x = x if coding.shift_factor is None else x + coding.shift_factor
        is_one = facts.is_for_video and x.ndim == PICTURE_RANK
        x = x.unsqueeze(2) if is_one else x  # (B, C, 1, H, W)
        found = self._engine.act(Act(part="vae", name=DECODE, args=(x,), kwargs={"return_dict": False}))[0]
        return found[:, :, 0] if is_one else found

    def _encoded(self, coding: Coding, x: Tensor) -> Tensor:
        """Pixels from -1 to 1 -> latents of as many dims: the mode of their distribution, where it has one."""
        vae = self._vae
        is_one = Autoencoder.of(vae.config).is_for_video and x.ndim == PICTURE_RANK
        x = x.unsqueeze(2) if is_one else x
        found = self._engine.act(Act(part="vae", name="encode", args=(x,)))
        x = found.latent_dist.mode() if hasattr(found, "latent_dist") else _first_latents(found)
        x = x[:, :, 0] if is_one else x
        if coding.own_scaling:
            return scaled(vae, x)
        x = x if coding.shift_factor is None else x - coding.shift_factor
        return x if coding.scaling_factor is None else x * coding.scaling_factor


def result_of(coding: Coding, found: Tensor) -> Tensor | outputs.Painting:
    """What is written of what the autoencoder gave."""
    if coding.gives == "raw":
        return found
    x = (found * 0.5 + 0.5).clamp(0, 1)
    if x.ndim == VIDEO_RANK:
        x = x[0].permute(1, 0, 2, 3)  # (F, C, H, W): there is one video
    if coding.gives == "unit":
        return x
    whole = (x.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
    if coding.gives == "bytes":
        return whole
    return outputs.painting(whole[0] if coding.gives == "picture" else whole)


def unpacked(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    """(B, tokens, 4 C) -> (B, C, H, W), as FLUX and its relatives pack: a token is a square of 2 x 2 latents, and rows
    of tokens go from the top. `height`, `width`: in pixels, of which `factor` by `factor` have one latent."""
    batch, _, channels = x.shape
    rows, columns = height // (PACK * factor), width // (PACK * factor)
    x = x.view(batch, rows, columns, channels // PACK**2, PACK, PACK)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // PACK**2, rows * PACK, columns * PACK)


def unscaled(vae: Any, x: Tensor) -> Tensor:
    """Latents (B, C, ...) of a denoiser as the autoencoder takes them, by its own configuration, operation by operation
    as diffusers' pipelines do it."""
    factor, shift, mean, std = _own_scaling(vae)
    if hasattr(vae, "bn"):
        y = _in_squares(x)
        return _out_of_squares(y * _along(std, y) + _along(mean, y))
    if mean is None:
        return x / factor + shift if shift else x / factor
    if factor is None:
        return x / (1.0 / _along(std, x)) + _along(mean, x)
    return x * _along(std, x) / factor + _along(mean, x)


def scaled(vae: Any, x: Tensor) -> Tensor:
    """The other way round."""
    factor, shift, mean, std = _own_scaling(vae)
    if hasattr(vae, "bn"):
        y = _in_squares(x)
        return _out_of_squares((y - _along(mean, y)) / _along(std, y))
    if mean is None:
        return (x - shift if shift else x) * factor
    if factor is None:
        return (x - _along(mean, x)) * (1.0 / _along(std, x))
    return (x - _along(mean, x)) * factor / _along(std, x)


def _own_scaling(vae: Any) -> tuple[Any, float | None, Any, Any]:
    """(factor, shift, mean, std): factor alone or with shift, or mean and std with or without factor. Raises
    UnsupportedError where the autoencoder does not say."""
    config, way_out = vae.config, "send latents that are scaled, with do_scaling=False and no scaling_factor."
    if hasattr(vae, "bn"):
        return None, None, vae.bn.running_mean, torch.sqrt(vae.bn.running_var + config.batch_norm_eps)
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    buffers = dict(vae.named_buffers(recurse=False))  # LTX has them there
    mean, std = (_values(config.get(name), buffers.get(name)) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        if {len(mean), len(std)} != {Autoencoder.of(config).channels}:
            raise UnsupportedError(f"do_scaling: {type(vae).__name__} has a scaling of its own; {way_out}")
        return factor, None, mean, std
    if factor is None:
        raise UnsupportedError(f"do_scaling: {type(vae).__name__} says no scaling_factor; {way_out}")
    return factor, shift, None, None


def _scaling_told(vae: Any, coding: Coding) -> dict[str, Any]:
    if not coding.own_scaling:
        return {"own": False, "scaling_factor": coding.scaling_factor, "shift_factor": coding.shift_factor}
    factor, shift, mean, _ = _own_scaling(vae)
    return {"own": True, "scaling_factor": factor, "shift_factor": shift, "by_channel": mean is not None}


def _values(*given: Any) -> Tensor | None:
    """The first that there is."""
    found = next((one for one in given if one is not None), None)
    return None if found is None else torch.as_tensor(found)


def _along(values: Any, x: Tensor) -> Tensor:
    """One for each channel of (B, C, ...)."""
    return values.view(1, -1, *(1 for _ in x.shape[2:])).to(x.device, x.dtype)


def _in_squares(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4 C, H / 2, W / 2). Raises ConfigError for an odd number of rows or columns."""
    batch, channels, rows, columns = x.shape
    if rows % PACK or columns % PACK:
        raise ConfigError(f"shape: has {rows}x{columns} latents; this model scales squares of {PACK} by {PACK}.")
    x = x.view(batch, channels, rows // PACK, PACK, columns // PACK, PACK).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * PACK**2, rows // PACK, columns // PACK)


def _out_of_squares(x: Tensor) -> Tensor:
    batch, channels, rows, columns = x.shape
    x = x.view(batch, channels // PACK**2, PACK, PACK, rows, columns).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels // PACK**2, rows * PACK, columns * PACK)


def _tensor(data: bytes, coding: Coding) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=DTYPES[coding.dtype]).view(coding.shape)


def _pixels(data: bytes) -> Tensor:
    """(1, C, H, W) from -1 to 1 of a picture that the server has written, as diffusers' `VaeImageProcessor` makes it,
    channels last in memory too: convolutions round otherwise."""
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.stack([np.asarray(picture.convert("RGB")).astype(np.float32) / 255.0])
    return 2.0 * torch.from_numpy(pixels).permute(0, 3, 1, 2) - 1.0


def _first_latents(found: Any) -> Tensor:
    """Of an autoencoder without a distribution."""
    for name in ("latent", "latents"):
        if isinstance(getattr(found, name, None), Tensor):
            return getattr(found, name)
    raise UnsupportedError(f"encode gives {type(found).__name__}, which holds no latents that are known here.")


def _needed(method: Any) -> set[str]:
    parameters = inspect.signature(method).parameters.values()
    return {one.name for one in parameters if one.default is inspect.Parameter.empty}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _in_float32_if_asked(engine: Engine, vae: Any) -> Iterator[None]:
    """Autoencoders that overflow in float16 say so: their own pipelines run them in float32 then. Collective."""
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
        yield
        return
    engine.act(Act(part="vae", name="to", kwargs={"dtype": torch.float32}))
    try:
        yield
    finally:
        if not engine.world.broken:
            engine.act(Act(part="vae", name="to", kwargs={"dtype": torch.float16}))
