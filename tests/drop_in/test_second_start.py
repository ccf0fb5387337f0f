"""A second start finds what the first one has compiled, on every rank; the first one compiles it once a node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import json, os, sys, torch
import parafuse

torch.set_num_threads(1)
engine = parafuse.Engine.from_pretrained("emoji", parafuse.Config(compile=True))
engine("a red apple", seed=0, num_inference_steps=2, width=64, height=64)
first = engine.receipt["compiled"]
engine("a red apple", seed=0, num_inference_steps=2, width=64, height=64)
found = [first, engine.receipt["compiled"]]
open(os.path.join(sys.argv[1], os.environ["RANK"] + ".json"), "w").write(json.dumps(found))
engine.close()
"""


def start(folder: Path, torch_folder: str) -> list[list[dict[str, Any]]]:
    """What each of two ranks has compiled in its first and its second request."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    more = {"PARAFUSE_CACHE": str(folder / "kept"), "TORCHINDUCTOR_CACHE_DIR": str(folder / torch_folder)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(folder)], env=os.environ | more, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_second_start_compiles_nothing_and_a_first_one_once_a_node(tmp_path: Path) -> None:
    cold = start(tmp_path, "first")
    graphs = {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1}
    assert [one[0]["components"]["transformer"]["graphs"] for one in cold] == [graphs, graphs]
    assert sum(one[0]["made_anew"] for one in cold) == 2  # not once for each rank
    assert sum(one[0]["found_made"] for one in cold) == 2
    assert [one[0]["loaded"] for one in cold] == ["none", "none"]
    kept = list((tmp_path / "kept" / "compiled").iterdir())
    assert len(kept) == 1
    warm = start(tmp_path, "second")  # another machine's empty folder
    assert [one[0]["loaded"] for one in warm] == ["1 files", "1 files"]
    assert [(one[0]["made_anew"], one[0]["found_made"]) for one in warm] == [(0, 2), (0, 2)]
    assert all(request["made_anew"] + request["found_made"] == 0 for one in warm for request in one[1:])
