"""Placements on true devices: the picture of one GPU, with blocks on two, on the host and on a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parafuse
from parafuse.config import Config

CALL: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 4, "output_type": "np"}


def painted(**asked: Any) -> tuple[np.ndarray, parafuse.Plan, int]:
    """The picture, the plan, and the most bytes of device 0."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(0)
    with parafuse.Engine.from_pretrained("emoji", Config(device="cuda", dtype="float32", **asked)) as engine:
        images = engine(**CALL, seed=7).images
        return images, engine.plan, torch.cuda.max_memory_allocated(0)


def test_weights_on_the_host_and_on_a_disk(tmp_path: Path) -> None:
    expected, _, most = painted()
    memory = {0: "16MB", "cpu": "12MB"}
    got, plan, less = painted(placement="balanced", max_memory=memory, offload_folder=str(tmp_path))
    assert set((plan.placement or {}).values()) == {"0", "cpu", "disk"}
    assert np.abs(got - expected).max() <= 1 / 255
    assert less < most


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_blocks_on_two_devices() -> None:
    expected, _, most = painted()
    got, plan, less = painted(placement="balanced")
    assert set((plan.placement or {}).values()) == {"0", "1"}
    assert np.abs(got - expected).max() <= 1 / 255
    assert less < most


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_compiled_blocks_on_two_devices() -> None:
    expected, _, _ = painted()
    got, _, _ = painted(placement="balanced", compile=True)
    assert np.abs(got - expected).max() <= 1 / 255
