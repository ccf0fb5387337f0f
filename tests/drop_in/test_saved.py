"""A saved engine on another machine, as far as a process with caches of its own is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys, torch, parafuse
from torch._dynamo.utils import counters

folder, act = sys.argv[1:]
config = parafuse.Config(allow_pickle=True)
if act == "save":
    engine = parafuse.Engine.from_pretrained("tiny:flux.1-dev")
else:
    engine = parafuse.Engine.load(folder, config)
engine.transformer.compile_repeated_blocks(fullgraph=True)
call = dict(num_inference_steps=2, height=32, width=32, max_sequence_length=16, output_type="latent")
latents = engine("a red apple", seed=7, **call).images
if act == "save":
    engine.save(folder)
caches = {name: count for name, count in counters["inductor"].items() if name.startswith("fxgraph_cache")}
print(json.dumps({"sum": float(latents.double().abs().sum()), "loaded": engine.loaded, **caches}))
"""


def run(folder: Path, act: str, cache: Path) -> dict[str, object]:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"), "PARAFUSE_CACHE": str(cache / "ours")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), act], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_was_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    first = run(tmp_path / "engine", "save", tmp_path / "here")
    second = run(tmp_path / "engine", "load", tmp_path / "there")
    assert first["fxgraph_cache_miss"]
    assert second["loaded"]["compiled"] == "used"  # type: ignore[index]
    assert second["fxgraph_cache_hit"] == first["fxgraph_cache_miss"]
    assert "fxgraph_cache_miss" not in second
    assert second["sum"] == first["sum"]
