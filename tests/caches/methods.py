"""The other methods, each on a few named transformers and UNets."""

from __future__ import annotations

import functools
from dataclasses import replace

import parafuse
from parafuse.cache import Cache, CalibratedCache, TokenMerging, cache_of
from parafuse.calibration import Calibration
from parafuse.engine.calibrate import WATCHING, calibrate
from parafuse.engine.verify import relative_error
from parafuse.errors import ParafuseError
from tests.caches.cells import Cell
from tests.caches.painted import STEPS, painted
from tests.dist.ranks import RankFailure, run_ranks
from tests.guided.cells import seeded
from tests.guided.collect import cases

MEASURED = "measured"
"""Stands for a file of calibrations."""
TEXTS = {
    "taylorseer": "taylorseer:3,warmup_steps=2,final_steps=0",
    "teacache": f"teacache:2,warmup_steps=0,final_steps=0,calibration={MEASURED}",
    "magcache": f"magcache:0.5,warmup_steps=2,final_steps=0,calibration={MEASURED}",
    "interval": "interval:2,warmup_steps=0,final_steps=0",
    "mask": "mask:11101010,warmup_steps=0,final_steps=0",
    "pab": "pab:2,cross=3,warmup_steps=0,final_steps=0",
    "fora": "fora:3,warmup_steps=0,final_steps=0",
    "tgate": "tgate:3",
    "fastercache": "fastercache:2,warmup_steps=2,final_steps=0",
    "first-block": "first-block:0.5,warmup_steps=0,final_steps=0",
    "deepcache": "deepcache:3,warmup_steps=1,final_steps=0",
    "token-merging": "token-merging:0.5,max_downsample=2",
}
TRANSFORMERS = ("FLUX.1", "Stable Diffusion 3", "Wan 2.2: two experts", "CogVideoX")
UNETS = ("Stable Diffusion", "Stable Diffusion XL")
PIPELINES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("taylorseer", "teacache", "magcache"), TRANSFORMERS),
    **dict.fromkeys(("interval", "mask", "pab", "fora", "fastercache"), (*TRANSFORMERS, *UNETS)),
    "tgate": ("Wan 2.2: two experts", "PixArt-sigma", "LTX-Video", *UNETS),
    **dict.fromkeys(("first-block", "deepcache", "token-merging"), UNETS),
}
LAYOUTS: dict[str, dict[str, int]] = {"cfg 2": dict(cfg=2, ulysses=1), "Ulysses 2": dict(ulysses=2)}


def cells_of(method: str) -> dict[str, dict[str, Cell]]:
    """Pipeline -> layout -> what a method does there; UNets are not split over tokens."""
    return {
        name: {column: cell_of(method, name, column) for column in LAYOUTS if column == "cfg 2" or name not in UNETS}
        for name in PIPELINES[method]
    }


def cell_of(method: str, name: str, column: str) -> Cell:
    """A method on a pipeline in a layout, against one rank with the same."""
    try:
        cache = _cache(method, name)
        want, word = painted(name, cache)
        exact, _ = painted(name, None)
        runs = run_ranks(painted, 2, name, cache, LAYOUTS[column], timeout_s=200)
    except ParafuseError as refusal:
        return Cell(refused=str(refusal))
    except RankFailure as failure:
        return Cell(failed=" ".join(str(failure).splitlines()[-3:])[:300])
    letters = "".join(letter for calls in word["decisions"].values() for letter in calls)
    cell = Cell(skipped=letters.count("s"), of=len(letters), decides=not isinstance(cache, TokenMerging))
    cell.error = max(relative_error(found, want) for found, _ in runs)
    cell.same = all(said["decisions"] == word["decisions"] for _, said in runs)
    cell.failed = "paints what is painted without it" if relative_error(want, exact) == 0 else ""
    return cell


def _cache(method: str, name: str) -> Cache:
    found = cache_of(TEXTS[method])
    if isinstance(found, CalibratedCache):
        return replace(found, calibration=measured(name))
    if found is None:
        raise ValueError(method)
    return found


@functools.cache
def measured(name: str) -> Calibration:
    """What `parafuse calibrate` finds of a pipeline."""
    case = cases()[name]
    with parafuse.Engine.from_pipeline(case.build(), parafuse.Config(cache=WATCHING)) as engine:
        return calibrate(engine, [seeded(case.call(1) | {"num_inference_steps": 3 * STEPS})]).calibration
