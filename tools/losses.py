"""Measures every lossy option on the built-in model and writes what the help quotes: `make losses`.

For each lossy value of `parafuse.Config` one run of `parafuse verify --quality` against the exact one, over the model's
prompts (further arguments go to each; the name of an option before them: of that one alone). Its record goes to
benchmarks/results/quality, its figures to the model's losses.json."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from parafuse.config import Config
from parafuse.launch.losses import FILE, lossy_values, measured

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "quality"
EXACT = ("--against", "float32")
FEWER = {"float16": ("--first", "16")}
"""Not all prompts for these: a float16 picture takes a CPU half a minute."""


def measure(option: str, value: str, more: list[str]) -> dict[str, Any]:
    """The record of one option's value."""
    out = ROOT / "out" / "losses" / named(option, value)
    flag = f"--{option.replace('_', '-')}"
    command = [sys.executable, "-m", "parafuse", "verify", "--quality", flag, value, *EXACT, "--out", str(out)]
    subprocess.run([*command, *FEWER.get(value, ()), *more], check=True, cwd=ROOT)
    return json.loads((out / "quality.json").read_text())


def named(option: str, value: str) -> str:
    """For files: `cache-first-block-0.2`."""
    return f"{option}-{re.sub(r'[^A-Za-z0-9.]+', '-', value)}"


def figures(record: dict[str, Any], name: str) -> dict[str, Any]:
    """What the help quotes of a record."""
    psnr = [one["quality"]["worst_psnr_db"] for one in record["judged"]]
    right = [one["right"] for one in record["judged"] if one["right"]]
    return {
        "prompts": len(psnr),
        "psnr_db": round(statistics.median(psnr), 1),
        "worst_psnr_db": round(min(psnr), 1),
        "right": sum(one["found"] for one in right),
        "right_exact": sum(one["exact"] for one in right),
        "against": record["against"],
        "record": name,
    }


def main() -> None:
    names = [field.name for field in dataclasses.fields(Config)]
    only, more = (sys.argv[1:2], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in names else (names, sys.argv[1:])
    RECORDS.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {key: one for key, one in measured().items() if key.partition("=")[0] not in only}
    for field in dataclasses.fields(Config):
        for value in lossy_values(field) if field.name in only else ():
            record = measure(field.name, value, more)
            stem = f"{named(field.name, value)}_{record['hardware']}_{record['date'][:10]}_{record['commit']}"
            path = RECORDS / f"{stem}{'-dirty' if record['dirty'] else ''}.json"
            path.write_text(json.dumps(record, indent=1) + "\n")
            found[f"{field.name}={value}"] = figures(record, path.relative_to(ROOT).as_posix())
            print(path, flush=True)
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(FILE, flush=True)


if __name__ == "__main__":
    main()
