"""What a first-block cache costs where it never skips: the denoiser of emoji, 28 steps, one rank, one thread, eager.

`python -m benchmarks.cache_cost`: the calls of one picture are made again in turns, each by three copies of the
denoiser that share their weights: without a cache, with threshold 0 (changes are measured, nothing is kept to be
reused) and with one too small to be met (all of it is kept too). Two copies of the weights, or whole pictures one after
another, differ in speed by more than the cost. Medians over 8 rounds of 56 calls.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

import parafuse

WAYS = {"no cache": None, "first-block:0": "first-block:0", "first-block:1e-9": "first-block:1e-9"}
ROUNDS = 8
CALL: dict[str, Any] = dict(prompt="a red apple", num_inference_steps=28, output_type="pt")


def calls_of_a_picture(folder: Path) -> tuple[Any, list[Any]]:
    """(the denoiser, what it is called with)."""
    pipeline: Any = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    given: list[Any] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args, dict(kwargs))), with_kwargs=True
    )
    call = json.loads((folder / "parafuse.json").read_text())["call"] | CALL
    pipeline(**call, generator=torch.Generator().manual_seed(0))
    hook.remove()
    return pipeline.transformer, given


def copy_of(model: Any) -> Any:
    """Another module over the same weights."""
    with torch.device("meta"):
        other = type(model).from_config(model.config).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    model, calls = calls_of_a_picture(Path(parafuse.__file__).parent / "models" / "emoji")
    models = {way: copy_of(model) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack, torch.no_grad():
        handles = [
            stack.enter_context(parafuse.apply(models[way], parafuse.Config(cache=cache)))
            for way, cache in WAYS.items()
            if cache
        ]
        for turn in range(1 + ROUNDS):  # in the first one the order of blocks is learned
            with ExitStack() as requests:
                for handle in handles:
                    requests.enter_context(handle.request())
                for args, kwargs in calls:
                    found: dict[str, Any] = {}
                    for way in random.sample(list(WAYS), len(WAYS)):
                        began = time.perf_counter()
                        found[way] = models[way](*args, **kwargs)[0]
                        times[way] += [time.perf_counter() - began] if turn else []
                    if not all(torch.equal(x, found["no cache"]) for x in found.values()):
                        raise SystemExit("a cache that never skips gave another result")
    plain = statistics.median(times["no cache"])
    for way, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{way:17} {1000 * middle:.2f} ms a call, {middle / plain - 1:+.1%}, bitwise equal")


if __name__ == "__main__":
    main()
