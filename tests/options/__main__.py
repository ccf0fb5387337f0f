"""`python -m tests.options` tries every option beside everything else and writes docs/options-support.md. With
`--fixed-part` it measures a part, writes nothing, and fails where a cell is not right."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

from tests.dist.ranks import close_pools
from tests.options.cells import OPTIONS, PIPELINES, SETTINGS, cell_of
from tests.options.table import read_record, write_record

FIXED_PART = {
    ("FLUX.1", "fp8"): ("Ulysses 2", "ring 2", "model offload"),
    ("FLUX.1", "fp8-weight"): ("one rank",),
    ("FLUX.1", "int8-weight"): ("group offload",),
    ("FLUX.1", "rewrites rope and compile"): ("one rank",),
    ("FLUX.1", "offload group"): ("Ulysses 2", "LoRA"),
    ("FLUX.1", "offload, quantize and compile"): ("one rank",),
    ("Wan 2.1", "offload and first-block cache"): ("Ulysses 2",),
    ("FLUX.1", "placement on a disk"): ("data 2",),
    ("Stable Diffusion XL", "text encoders on one rank"): ("data 2",),
    ("Stable Diffusion XL", "offload model"): ("cfg 2",),
    ("HunyuanVideo", "offload and compile"): ("one rank",),
    ("FLUX.1", "all of them"): ("Ulysses 2, cache, LoRA",),
    ("Wan 2.1", "int8"): ("cfg 2", "cache of stacks"),
    ("Wan 2.1", "int8-weight and compile"): ("one rank",),
    ("Wan 2.1", "sparse"): ("Ulysses 2, cache, LoRA", "cfg 2"),
    ("HunyuanVideo", "sparse and compile"): ("one rank",),
    ("Stable Diffusion XL", "attention math"): ("group offload",),
    ("Wan 2.1", "rewrites modulation"): ("group offload",),
    ("Stable Diffusion 3", "compile"): ("cfg 2",),
    ("Stable Diffusion XL", "rewrites qkv"): ("cfg 2", "data 2"),
    ("HunyuanVideo", "rewrites text"): ("one rank", "ring 2", "data 2", "LoRA", "cache of parts"),
}
"""Every option and every setting at least once (tests/options/test_cells.py)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fixed-part", action="store_true", help="a part; writes nothing")
    parser.add_argument("--pipeline", action="append", default=[], help="by name; may be repeated")
    parser.add_argument("--option", action="append", default=[], help="by name; may be repeated")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PARAFUSE_CACHE"] = folder
        return measure(asked)


def measure(asked: argparse.Namespace) -> int:
    rows, faults = ({} if asked.fixed_part else read_record()), 0
    for pipeline in asked.pipeline or PIPELINES:
        for option in asked.option or OPTIONS:
            names = FIXED_PART.get((pipeline, option), ()) if asked.fixed_part else SETTINGS
            if not names:
                continue
            row = rows.setdefault(pipeline, {})[option] = {
                name: cell_of(pipeline, OPTIONS[option], SETTINGS[name]) for name in names
            }
            wrong = [f"{name}: {cell.fault}" for name, cell in row.items() if cell.fault]
            refused = [f"{name}: refused" for name, cell in row.items() if cell.refused]
            faults += len(wrong) + (len(refused) if asked.fixed_part else 0)
            print(f"{pipeline}, {option}: {'; '.join(wrong + refused) or 'right'}", flush=True)
            if not asked.fixed_part:
                write_record(rows)
    close_pools()
    print(f"{faults} cells are not right", flush=True)
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
