"""Triton kernels for what Inductor does not fuse. The modules beside this one import triton, so import them where they
are used, after `missing` was asked. Each kernel has a twin in torch, which says what it computes."""

from __future__ import annotations

import importlib.util
import os

import torch


def missing(device: torch.device) -> str:
    """Why these kernels cannot run on a device; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda":
        return f"Triton has no {device.type} devices"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "an NVIDIA GPU of compute capability 8.0 or later is needed"
    return ""
