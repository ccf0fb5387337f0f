"""accelerate beside torchrun: its launcher, its process state made before an engine, and outputs split by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import parafuse
from parafuse.parallel.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
CALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 7}
SMALL = ["--steps", "2", "--width", "64", "--height", "64", "--seed", "7"]
SCRIPT = """
import json, sys
import numpy as np, torch
from accelerate import PartialState
import parafuse

state = PartialState(cpu=True)
config = parafuse.Config(parallel=parafuse.Parallel(ulysses=2))
call = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 7}
with parafuse.Engine.from_pretrained("emoji", config) as engine:
    images = engine(["a red apple", "a rocket", "a cat"], **call).images
    degree = engine.plan.degree("ulysses")
with state.split_between_processes(list(enumerate(images))) as mine:
    for number, image in mine:
        image.save(f"{sys.argv[1]}/{number}.png")
state.wait_for_everyone()
found = {"rank": state.process_index, "of": state.num_processes, "mine": [number for number, _ in mine],
         "degree": degree, "alive": torch.distributed.is_initialized()}
json.dump(found, open(f"{sys.argv[1]}/rank{state.process_index}.json", "w"))
state.destroy_process_group()
"""


def launched(arguments: list[str]) -> str:
    """Two processes of `accelerate launch` on a CPU, where it starts one a machine, and more with mpirun only."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    port, processes = free_port(), []
    for rank in range(2):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "2"]
        command += ["--num_processes", "2", "--machine_rank", str(rank), "--num_cpu_threads_per_process", "1"]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", *arguments]
        # for the CPU, accelerate sets neither of these: it leaves them to mpirun
        env = ours | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        env["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return "\n".join(said)


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.whole
def test_accelerate_launches_a_script_and_the_command_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launched([str(script), str(tmp_path)])
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks == [
        {"rank": 0, "of": 2, "mine": [0, 1], "degree": 2, "alive": True},
        {"rank": 1, "of": 2, "mine": [2], "degree": 2, "alive": True},
    ]
    said = launched(["-m", "parafuse", "generate", "a red apple", *SMALL, "--out", str(tmp_path / "apple.png")])
    assert said.count("apple.png") == 1
    alone = parafuse.Engine.from_pretrained("emoji")
    want = [pixels(image) for image in alone(["a red apple", "a rocket", "a cat"], **CALL).images]
    for number, picture in enumerate(want):
        assert np.abs(pixels(Image.open(tmp_path / f"{number}.png")) - picture).max() <= 1
    assert np.abs(pixels(Image.open(tmp_path / "apple.png")) - want[0]).max() <= 1
    receipt = json.loads((tmp_path / "apple.json").read_text())
    assert receipt["plan"]["world_size"] == 2
    assert receipt["plan"]["chosen"]
