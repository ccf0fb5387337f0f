"""Shapes of latents and of the pixels that they are of: what an autoencoder takes, by its configuration. Without torch.

The server holds requests to it before they are stored, where the configuration is at hand; each rank holds them to it
once more, where it always is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parafuse.engine.source import vae_factor
from parafuse.errors import ConfigError
from parafuse.launch.serve.messages import Coding

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Of a value of the dtypes that are taken."""
PICTURE_RANK, VIDEO_RANK, PACKED_RANK = 4, 5, 3
PACK = 2
"""Packed latents have squares of so many rows and columns in one token's channels."""
LARGEST_DIM = 1 << 24
PLAIN_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """What shapes say of one."""

    channels: int | None
    """Of latents; None: not known, as below."""
    pixel_channels: int
    factor: int | None
    """Pixels per latent along height and width."""
    frames_factor: int | None
    """Frames per latent along time, after the first one, which has a latent of its own; None: it is for pictures."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Autoencoder:
        """By the rules of diffusers' autoencoders."""
        channels = next((config[name] for name in ("latent_channels", "z_dim") if config.get(name)), None)
        given = (config.get("input_channels"), config.get("in_channels"))  # some count those of patches
        return cls(
            channels=channels,
            pixel_channels=next((one for one in given if one in PLAIN_CHANNELS), 3),
            factor=vae_factor(dict(config)),
            frames_factor=_frames_factor(config),
        )

    @property
    def is_for_video(self) -> bool:
        return self.frames_factor is not None

    def check(self, coding: Coding) -> None:
        """Raises ConfigError for what it cannot take, or what is larger than allowed, by the name of the parameter."""
        if coding.task == "encode":
            self._check_pixels(coding)
        else:
            self._check_latents(coding)

    def _check_latents(self, coding: Coding) -> None:
        shape, factor = coding.shape, self.factor
        if len(shape) == PACKED_RANK:
            self._check_packed(coding)
            return
        self._check_rank(coding)
        if self.channels is not None and shape[1] != self.channels:
            raise ConfigError(
                f"shape: has {shape[1]} channels {list(shape)}; this model's latents have {self.channels}."
            )
        if factor is None:
            return
        rows, columns = shape[-2] * factor, shape[-1] * factor
        for name, given, there in (("height", coding.height, rows), ("width", coding.width, columns)):
            if given is not None and given != there:
                raise ConfigError(f"{name}: is {given}, and these latents are of {there}; leave it out.")
        frames = 1 if len(shape) == PICTURE_RANK else (shape[2] - 1) * (self.frames_factor or 1) + 1
        check_size(coding, rows, columns, frames)

    def _check_packed(self, coding: Coding) -> None:
        _, tokens, channels = coding.shape
        height, width = coding.height or 0, coding.width or 0
        if self.channels is not None and channels != PACK**2 * self.channels:
            raise ConfigError(
                f"shape: has {channels} channels {list(coding.shape)}; this model's packed latents have "
                f"{PACK**2 * self.channels}."
            )
        check_size(coding, height, width, 1)
        if self.factor is None:
            return
        rows, columns = height // (PACK * self.factor), width // (PACK * self.factor)
        if tokens != rows * columns or not tokens:
            raise ConfigError(
                f"shape: has {tokens} tokens; {width}x{height} has {rows * columns} (one for {PACK * self.factor} by "
                f"{PACK * self.factor} pixels). Give the height and width that were painted."
            )

    def _check_pixels(self, coding: Coding) -> None:
        shape, factor = coding.shape, self.factor
        if shape:
            self._check_rank(coding)
            if shape[1] != self.pixel_channels:
                raise ConfigError(
                    f"shape: has {shape[1]} channels {list(shape)}; this model's pictures have {self.pixel_channels}."
                )
            if len(shape) == VIDEO_RANK and (shape[2] - 1) % (self.frames_factor or 1):
                raise ConfigError(
                    f"shape: has {shape[2]} frames {list(shape)}; this model takes 1 more than a multiple of "
                    f"{self.frames_factor}."
                )
        height, width = (shape[-2], shape[-1]) if shape else (coding.height or 0, coding.width or 0)
        check_size(coding, height, width, shape[2] if len(shape) == VIDEO_RANK else 1)
        if factor and (height % factor or width % factor):
            raise ConfigError(
                f"{'shape' if shape else 'image'}: is {width}x{height}; both must be multiples of {factor}, the "
                "pixels of one latent. Resize it."
            )

    def _check_rank(self, coding: Coding) -> None:
        if len(coding.shape) == VIDEO_RANK and not self.is_for_video:
            raise ConfigError(
                f"shape: {list(coding.shape)} is a video's, and this model's autoencoder is for pictures."
            )


def check_shape(coding: Coding, most: int) -> None:
    """What no autoencoder takes, and results that cannot be had of such a shape. `most`: samples of one request. Raises
    ConfigError, by the name of the parameter."""
    shape = coding.shape
    ranks = (PACKED_RANK, PICTURE_RANK, VIDEO_RANK) if coding.task == "decode" else (PICTURE_RANK, VIDEO_RANK)
    if len(shape) not in ranks:
        raise ConfigError(f"shape: has {len(shape)} dims {list(shape)}; must have {', '.join(map(str, ranks))}.")
    if any(not 0 < extent <= LARGEST_DIM for extent in shape):
        raise ConfigError(f"shape: is {list(shape)}; every extent must be from 1 to {LARGEST_DIM}.")
    if len(shape) == PACKED_RANK and (coding.height is None or coding.width is None):
        raise ConfigError("height: must be given with packed latents, and width too: those of the picture in pixels.")
    if shape[0] > most:
        raise ConfigError(f"shape: has {shape[0]} samples; at most {most} are taken at a time.")
    if coding.gives == "video" and len(shape) != VIDEO_RANK:
        raise ConfigError(f"output_type: mp4 is for latents of a video, which have {VIDEO_RANK} dims.")
    if shape[0] > 1 and (coding.gives in ("picture", "video") or _is_of_frames(coding)):
        raise ConfigError(f"shape: has {shape[0]} samples, and this output has place for one; use output_type=pt.")
    if coding.gives == "picture" and len(shape) == VIDEO_RANK and shape[2] > 1:
        raise ConfigError("output_type: pil is one picture here, and these are latents of a video; use mp4 or pt.")


def check_size(coding: Coding, height: int, width: int, frames: int) -> None:
    """Raises ConfigError for more pixels or frames than are allowed."""
    if height * width > coding.max_pixels:
        raise ConfigError(
            f"{'shape' if coding.shape else 'image'}: is of {width}x{height} pixels; at most {coding.max_pixels} are "
            "allowed."
        )
    if frames > coding.max_frames:
        raise ConfigError(f"shape: is of {frames} frames; at most {coding.max_frames} are allowed.")


def num_bytes(coding: Coding) -> int:
    """Of the tensor that is to come."""
    return math.prod(coding.shape) * BYTES[coding.dtype]


def _is_of_frames(coding: Coding) -> bool:
    return coding.gives in ("unit", "bytes") and len(coding.shape) == VIDEO_RANK


def _frames_factor(config: Mapping[str, Any]) -> int | None:
    for key in ("scale_factor_temporal", "temporal_compression_ratio"):
        if config.get(key) is not None:
            return int(config[key])
    if "temperal_downsample" in config:
        return 2 ** sum(map(bool, config["temperal_downsample"]))
    if "temporal_expansions" in config:  # Mochi
        return math.prod(config["temporal_expansions"])
    if "spatio_temporal_scaling" in config:  # LTX
        return int(config.get("patch_size_t", 1)) * 2 ** sum(map(bool, config["spatio_temporal_scaling"]))
    return None
