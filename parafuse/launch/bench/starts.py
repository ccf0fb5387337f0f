"""The time to a first picture, from the start of the processes: with empty caches, and with what that left in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from parafuse.launch.bench.case import Case, Variant
from parafuse.log import note

STARTS_ENV = "PARAFUSE_BENCH_STARTS"
"""Names a JSON file, from the process that starts the ranks to these."""
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "PARAFUSE_CACHE": "plans"}
LIMIT_S = 900


def measure_starts(case: Case, ranks: int, options: Sequence[str]) -> dict[str, dict[str, float]]:
    """Variant -> "cold", "warm" -> seconds. Other engines' variants, and shares, are left out.

    `options`: of `parafuse bench`, that say what is measured."""
    found: dict[str, dict[str, float]] = {}
    for variant in case.variants:
        if variant.way not in ("plain", "parafuse") or variant.share_of > 1:
            continue
        with tempfile.TemporaryDirectory(prefix="parafuse-bench-") as folder:
            caches = {name: str(Path(folder) / part) for name, part in CACHES.items()}
            for way in ("cold", "warm"):
                seconds = _first_picture(variant, variant.ranks(ranks), options, caches)
                if seconds is not None:
                    found.setdefault(variant.name, {})[way] = seconds
    return found


def _first_picture(variant: Variant, ranks: int, options: Sequence[str], caches: dict[str, str]) -> float | None:
    command = [sys.executable, "-m", "parafuse", "bench", *options, "--variant", variant.name]
    command += ["--ranks", str(ranks), "--first-picture"]
    begun = time.time()
    done = subprocess.run(
        command, env=os.environ | caches, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    told = [line for line in done.stdout.splitlines() if line.startswith('{"first_picture":')]
    if not told:
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        note(f"{variant.name}: no first picture ({last})")
        return None
    return float(json.loads(told[-1])["first_picture"]) - begun


def read_starts() -> dict[str, dict[str, float]]:
    """What the process that started these ranks has measured; nothing under another launcher."""
    path = os.environ.get(STARTS_ENV)
    return json.loads(Path(path).read_text()) if path else {}
