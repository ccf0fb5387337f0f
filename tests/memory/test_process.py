"""The peak of a whole process, weights and all, for a model of about a gigabyte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parafuse.config import Config
from parafuse.engine.loader import load_pipeline
from parafuse.engine.memory.predict import predict
from parafuse.engine.planner import resolve
from parafuse.engine.source import locate

CALL = {"height": 256, "width": 256, "num_inference_steps": 1, "true_cfg_scale": 1.0, "max_sequence_length": 16}
WITHIN = 0.10


def gigabyte(folder: Path) -> Path:
    """emoji with a transformer of 240 million random parameters."""
    from diffusers import FluxTransformer2DModel

    pipeline = load_pipeline(locate("emoji"), dtype="float32", allow_pickle=False)
    torch.manual_seed(0)
    pipeline.register_modules(
        transformer=FluxTransformer2DModel.from_config(
            {**pipeline.transformer.config, "num_attention_heads": 48, "num_layers": 2, "num_single_layers": 2}
        )
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")
def test_a_whole_process_is_within_a_tenth(tmp_path: Path) -> None:
    folder = gigabyte(tmp_path / "gigabyte")
    source = locate(str(folder))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = predict(source, resolve(Config(device="cpu"), source, 1), CALL)
    finally:
        torch.set_num_threads(before)
    assert found.nbytes > 0.9e9
    command = [sys.executable, "-m", "tests.memory.process", str(folder), json.dumps(CALL)]
    root = Path(__file__).parents[2]
    told = subprocess.run(command, cwd=root, env=dict(os.environ), capture_output=True, text=True, check=True).stdout
    most = json.loads(told.strip().splitlines()[-1])["most"]
    print(f"predicted {found.nbytes / 1e9:.3f} GB, measured {most / 1e9:.3f} GB")
    assert abs(found.nbytes / most - 1) <= WITHIN, (found.nbytes, most)
