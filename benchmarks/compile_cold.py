"""Compiling the repeated blocks against compiling the whole: a FLUX of 19 + 38 small blocks on one CPU core.

`python -m benchmarks.compile_cold`: each way starts twice in a process of its own: cold (an empty folder for what torch
compiles) and again over the same folder. The seconds are processor time of the first call, of this process and of the
compilers that it runs, over that of an eager call: other work on the machine does not change it. What torch needs for
the first compilation of any function (it tries the processor's instructions, once a machine) is told apart. Then both
ways run in one process in turns, for the steady state. Figures: docs/notes/compile.md.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import parafuse

WAYS = ("whole", "regional")
ROUNDS = 15
SIDE, TEXT = 16, 64
"""Image tokens on a side, and tokens of text."""


def model() -> Any:
    """Equal in every process."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=19, num_single_layers=38, attention_head_dim=64,
        num_attention_heads=6, joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    ).eval().requires_grad_(False)  # fmt: skip


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(float(SIDE)), torch.arange(float(SIDE)))
    return dict(
        hidden_states=torch.randn(1, SIDE * SIDE, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, TEXT, 64, generator=generator),
        pooled_projections=torch.randn(1, 64, generator=generator),
        timestep=torch.rand(1, generator=generator),
        img_ids=positions,
        txt_ids=torch.zeros(TEXT, 3),
        return_dict=False,
    )


def compiled(way: str, transformer: Any) -> Any:
    """The model, compiled at its next call, and what takes that off."""
    if way == "whole":
        transformer.compile(fullgraph=True)
        return None
    return parafuse.apply(transformer, parafuse.Config(compile=True))


def timed(call: Any) -> float:
    """Seconds of processor time."""
    began = spent()
    call()
    return spent() - began


def spent() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def first_call(way: str) -> None:
    """In a process of its own: prints the seconds that compiling took."""
    transformer, values = model(), inputs()
    setting_up = timed(lambda: torch.compile(torch.sin)(torch.ones(100)))
    transformer(**values)
    eager = timed(lambda: transformer(**values))
    handle = compiled(way, transformer)
    took = timed(lambda: transformer(**values)) - eager
    print(json.dumps([setting_up, took, handle.applied if handle else way]))


def started(way: str, folder: Path) -> tuple[float, float]:
    """(seconds of torch's own first compilation, of the model's)."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.compile_cold", way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    setting_up, took, _ = json.loads(done.stdout.splitlines()[-1])
    return setting_up, took


def steady() -> dict[str, list[float]]:
    """Seconds of a call, in turns, of models that share their weights."""
    values, first = inputs(), model()
    models = {way: model() for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for way, one in models.items():
        one.load_state_dict(first.state_dict(), assign=True)
        compiled(way, one)
        for _ in range(3):
            one(**values)
    for _ in range(ROUNDS):
        found = {}
        for way in random.sample(WAYS, len(WAYS)):
            began = time.perf_counter()
            found[way] = models[way](**values)[0]
            times[way].append(time.perf_counter() - began)
        want = found["whole"]
        if float((found["regional"] - want).abs().max() / want.abs().max()) > 1e-5:
            raise SystemExit("the two ways give different results")
    return times


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    with torch.no_grad():
        if sys.argv[1:]:
            first_call(sys.argv[1])
            return
        with tempfile.TemporaryDirectory() as folder:
            cold = {way: started(way, Path(folder) / way) for way in WAYS}
            again = {way: started(way, Path(folder) / way) for way in WAYS}
            for way in WAYS:
                first, second = (f"{at[way][0]:.1f} + {at[way][1]:.2f} s" for at in (cold, again))
                print(f"{way:9} cold {first}, again {second}", flush=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "steady")
            medians = {way: statistics.median(seconds) for way, seconds in steady().items()}
    ratio, slower = cold["regional"][1] / cold["whole"][1], medians["regional"] / medians["whole"] - 1
    calls = ", ".join(f"{way} {1000 * middle:.1f} ms" for way, middle in medians.items())
    print(f"regional: cold {ratio:.1%} of whole, steady {slower:+.1%} ({calls})")


if __name__ == "__main__":
    main()
