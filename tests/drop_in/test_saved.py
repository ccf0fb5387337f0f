"""A saved engine on another machine, as far as a process with caches of its own is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torch._dynamo.utils import counters

import parafuse
from tests.dist.ranks import run_ranks

CALL: dict[str, Any] = dict(num_inference_steps=2, height=32, width=32, max_sequence_length=16, output_type="latent")


def start(folder: Path, cache: Path, load: bool) -> dict[str, Any]:
    """Saves an engine that has compiled, or loads one; what torch's cache was asked for, and what was painted."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"), "PARAFUSE_CACHE": str(cache / "ours")}
    if load:
        engine = parafuse.Engine.load(folder, parafuse.Config(allow_pickle=True))
    else:
        engine = parafuse.Engine.from_pretrained("tiny:flux.1-dev")
    engine.transformer.compile_repeated_blocks(fullgraph=True)
    latents = engine("a red apple", seed=7, **CALL).images
    if not load:
        engine.save(folder)
    caches = {name: count for name, count in counters["inductor"].items() if name.startswith("fxgraph_cache")}
    return {"sum": float(latents.double().abs().sum()), "loaded": engine.loaded, **caches}


@pytest.mark.whole
def test_what_was_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    (first,) = run_ranks(start, 1, tmp_path / "engine", tmp_path / "here", False, timeout_s=300, fresh=True)
    (second,) = run_ranks(start, 1, tmp_path / "engine", tmp_path / "there", True, timeout_s=300, fresh=True)
    assert first["fxgraph_cache_miss"]
    assert second["loaded"]["compiled"] == "used"
    assert second["fxgraph_cache_hit"] == first["fxgraph_cache_miss"]
    assert "fxgraph_cache_miss" not in second
    assert second["sum"] == first["sum"]
