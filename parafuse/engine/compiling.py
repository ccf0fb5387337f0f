"""What an engine's requests have compiled: for receipts, and kept for the next start."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from torch._dynamo.utils import counters, cumulative_time_spent_ns

from parafuse.engine import artifacts
from parafuse.engine.apply import Handle
from parafuse.engine.plan import Plan
from parafuse.parallel.compiled import Regional


class Compiling:
    """Of one engine on this rank. Loads what was kept when it is made, and keeps what a request has added."""

    def __init__(self, handle: Handle, plan: Plan):
        self._handle, self._plan = handle, plan
        begun = time.perf_counter()
        self.loaded = artifacts.load(plan)
        """What was kept by an earlier process."""
        self.load_s = time.perf_counter() - begun
        self._kept: Counter[str] = Counter()
        self._before = self._now()

    def report(self) -> dict[str, Any]:
        """What the request that just ended has compiled. Graphs are counted from the start on."""
        regional = self._regional()
        graphs = sum((one.tally.graphs for one in regional.values()), Counter[str]())
        now = self._now()
        spent = {name: value - self._before.get(name, 0) for name, value in now.items()}
        self._before = now
        if graphs != self._kept:
            self._kept = graphs
            artifacts.save(self._plan)
        return {
            "components": {
                name: {
                    "blocks": dict(one.compiled.num_compiled),
                    "graphs": dict(one.tally.graphs),
                }
                for name, one in regional.items()
            },
            "seconds": round(spent["seconds"], 3),
            "made_anew": int(spent["misses"]),
            "found_made": int(spent["hits"]),
            "loaded": self.loaded,
            "loading_seconds": round(self.load_s, 3),
        }

    def _regional(self) -> dict[str, Regional]:
        return self._handle.compiled

    def _now(self) -> dict[str, float]:
        recorded = sum(one.tally.recorded_s for one in self._regional().values())
        return {
            "seconds": cumulative_time_spent_ns["entire_frame_compile"] / 1e9 + recorded,
            "misses": counters["inductor"]["fxgraph_cache_miss"],
            "hits": counters["inductor"]["fxgraph_cache_hit"],
        }
