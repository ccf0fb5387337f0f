"""What offload costs and saves: `python -m benchmarks.offload [--model NAME] [--offload TEXT ...] [--rounds N]`.

One engine for each way, of the same model; a request of each in turns, so that all meet the same machine. Said for
each: the median of the requests' seconds over that with all weights in place, the bytes of weights that came, the most
of them that were on the device at a time, and on a GPU the most memory of all. Pictures must be the same. With
`--alone` each way has the device for itself, one after another: for models of which two do not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch

import parafuse

IN_PLACE = "in place"


def engine_for(model: str, way: str, more: dict[str, Any]) -> parafuse.Engine:
    config = parafuse.Config(offload=None if way == IN_PLACE else way, **more)
    return parafuse.Engine.from_pretrained(model, config)


def painted(engine: parafuse.Engine, call: dict[str, Any]) -> tuple[float, Any, int]:
    """(seconds, picture, most bytes on the GPU) of a request."""
    on_gpu = engine.plan.device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    picture = engine("a red apple", seed=1, output_type="pt", **call).images
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, picture, torch.cuda.max_memory_allocated() if on_gpu else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--offload", action="append", help="as Config has it; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="one way after another")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--call", default="{}", help="arguments of the call, as JSON")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    to = "" if torch.cuda.is_available() else ":to=disk"
    ways = [IN_PLACE, *(asked.offload or [f"model{to}", f"group{to}", f"sequential{to}"])]
    call, more = json.loads(asked.call), {"compile": asked.compile}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    receipts: dict[str, dict[str, Any]] = {}
    most: dict[str, int] = {}
    first: Any = None
    with ExitStack() as open_ones:
        engines: dict[str, parafuse.Engine] = {}
        for turn in range(len(ways) * (1 + asked.rounds)):
            way = ways[turn // (1 + asked.rounds)] if asked.alone else ways[turn % len(ways)]
            if way not in engines:
                if asked.alone:
                    open_ones.close()
                    engines.clear()
                engines[way] = open_ones.enter_context(engine_for(asked.model, way, more))
                warm = True
            else:
                warm = False
            took, picture, peak = painted(engines[way], call)
            first = picture if first is None else first
            if not torch.allclose(picture, first, atol=1 / 255, rtol=0):
                raise SystemExit(f"{way}: another picture")
            seconds[way] += [] if warm else [took]
            most[way], receipts[way] = peak, engines[way].receipt["offload"] or {}
    plain = statistics.median(seconds[IN_PLACE])
    for way, found in seconds.items():
        middle, moved = statistics.median(found), receipts[way]
        told = (
            f"{moved['moved_bytes'] / 1e6:.1f} MB came, {moved['most_resident_bytes'] / 1e6:.1f} MB at a time, "
            if moved
            else ""
        )
        told += f"{moved['waits']} of {moved['fetches']} waited for" if moved else ""
        told += f", {most[way] / 1e9:.2f} GB of the GPU" if most[way] else ""
        print(f"{way:24} {middle:.3f} s a picture, x {middle / plain:.3f}; {told}")


if __name__ == "__main__":
    main()
