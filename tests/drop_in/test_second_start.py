"""A second start finds what the first one has compiled, on every rank; the first one compiles it once a node."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import parafuse
from tests.dist.ranks import run_ranks

CALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64}


def start(folder: Path, torch_folder: str) -> list[dict[str, Any]]:
    """What this rank has compiled in its first and its second request."""
    os.environ |= {"PARAFUSE_CACHE": str(folder / "kept"), "TORCHINDUCTOR_CACHE_DIR": str(folder / torch_folder)}
    config = parafuse.Config(compile=True, parallel=parafuse.Parallel(ulysses=2))
    with parafuse.Engine.from_pretrained("emoji", config) as engine:
        found: list[dict[str, Any]] = []
        for _ in range(2):
            engine("a red apple", seed=0, **CALL)
            found.append(engine.receipt["compiled"])
        return found


def test_a_second_start_compiles_nothing_and_a_first_one_once_a_node(tmp_path: Path) -> None:
    cold = run_ranks(start, 2, tmp_path, "first", timeout_s=300, fresh=True)
    graphs = {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1}
    assert [one[0]["components"]["transformer"]["graphs"] for one in cold] == [graphs, graphs]
    assert sum(one[0]["made_anew"] for one in cold) == 2  # not once for each rank
    assert sum(one[0]["found_made"] for one in cold) == 2
    assert [one[0]["loaded"] for one in cold] == ["none", "none"]
    kept = list((tmp_path / "kept" / "compiled").iterdir())
    assert len(kept) == 1
    warm = run_ranks(start, 2, tmp_path, "second", timeout_s=300, fresh=True)  # another machine's empty folder
    assert [one[0]["loaded"] for one in warm] == ["1 files", "1 files"]
    assert [(one[0]["made_anew"], one[0]["found_made"]) for one in warm] == [(0, 2), (0, 2)]
    assert all(request["made_anew"] + request["found_made"] == 0 for one in warm for request in one[1:])
