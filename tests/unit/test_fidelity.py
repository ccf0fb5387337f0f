"""Pictures against pictures: known pairs, and what a sum in whole numbers would get wrong."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from parafuse.errors import ConfigError
from parafuse.launch.bench.fidelity import SAME_DB, compare, pictures, psnr_db
from parafuse.launch.bench.quality import worst_lpips

BLACK, WHITE = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)


def test_black_against_white_is_0_db() -> None:
    found = compare(BLACK, WHITE)
    assert found["psnr_db"] == pytest.approx(0.0, abs=1e-4)
    assert found["largest_of_255"] == 255
    assert found["ssim"] < 0.01


def test_whole_numbers_would_overflow() -> None:
    """Of 0 and 255 the difference is 1 in 8 bits, which would score 48 dB."""
    black, white = (np.full((32, 32, 3), value, np.uint8) for value in (0, 255))
    wrong = -10 * math.log10(float(np.mean((black - white) ** 2)) / 255**2)
    assert wrong == pytest.approx(48.1, abs=0.1)
    assert compare(pictures([black]), pictures([white]))["psnr_db"] == pytest.approx(0.0, abs=1e-4)


def test_a_known_difference() -> None:
    """A difference of 0.1 everywhere is 20 dB, of 0.01 is 40."""
    for step, db in ((0.1, 20.0), (0.01, 40.0)):
        assert psnr_db(BLACK, BLACK + step) == pytest.approx(db, abs=1e-3)


def test_the_same_picture() -> None:
    noise = torch.rand(2, 3, 32, 32)
    found = compare(noise, noise)
    assert found["worst_psnr_db"] == SAME_DB
    assert found["worst_ssim"] == pytest.approx(1.0, abs=1e-4)
    assert found["largest_of_255"] == 0


def test_the_worst_frame_counts() -> None:
    """One broken frame of eight hardly moves the mean."""
    video = torch.rand(8, 3, 32, 32)
    broken = video.clone()
    broken[5] = 1 - broken[5]
    found = compare(video, broken)
    assert found["worst_psnr_db"] < 10 < found["psnr_db"]


def test_pictures_of_every_kind_of_output() -> None:
    values = (np.random.default_rng(0).random((2, 16, 24, 3)) * 255).astype(np.uint8)
    images = [Image.fromarray(x) for x in values]
    want = torch.from_numpy(values).float().movedim(-1, 1) / 255
    for output in (
        SimpleNamespace(images=images),
        SimpleNamespace(images=values.astype(np.float32) / 255),
        SimpleNamespace(images=None, frames=[images]),
        SimpleNamespace(frames=want[None]),
        images,
        values,
    ):
        assert torch.allclose(pictures(output), want, atol=1e-6)
    assert len(pictures(SimpleNamespace(audios=1))) == 0


def test_sizes_must_be_the_same() -> None:
    with pytest.raises(ConfigError, match="sizes differ"):
        compare(BLACK, torch.ones(1, 3, 32, 16))
    with pytest.raises(ConfigError, match="have different sizes"):
        pictures([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))])


def test_the_worst_lpips_where_it_can_be_had() -> None:
    found, want = torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 40)

    def distance(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape == (1, 3, 40, 40)
        return float((a - b).abs().max())

    assert worst_lpips(found, want, distance) == {"worst_lpips": pytest.approx(float((found - want).abs().max()))}
    assert worst_lpips(found, want, None) == {}
    assert worst_lpips(found[..., :30], want[..., :30], distance) == {}
    assert worst_lpips(found[:0], want[:0], distance) == {}
