"""Times FLUX.1-dev and HunyuanVideo on one GPU, with random weights, under the interpreter at hand: `make bench-gpu`.

Needs no network and no set-up: that interpreter must have torch 2.11 or later for its GPU. What it lacks besides is
taken from wheels/ (`make wheels` fills it, where there is a network) and put into out/packages, where nothing else sees
it. Arguments are passed on to `parafuse bench`; --case names other cases."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
WHEELS, PACKAGES = ROOT / "wheels", ROOT / "out" / "packages"
CASES = ("flux.1-dev", "hunyuanvideo")
BUDGET_S = 540.0
"""For all cases together: no variant is begun later than this."""


@cache
def needed() -> list[Requirement]:
    """What parafuse and its benchmark need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["bench"]]
    return [Requirement(line) for line in lines]


def is_there(name: str) -> bool:
    """In a version that parafuse takes."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return all(
        wanted.specifier.contains(version, prereleases=True) for wanted in needed() if plain(wanted.name) == plain(name)
    )


def plain(name: str) -> str:
    """A package's name as all its spellings have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def complete() -> None:
    """Puts those wheels that the interpreter lacks into a folder of their own. Ends where something is missing."""
    carried = {plain(wheel.name.split("-")[0]): wheel for wheel in sorted(WHEELS.glob("*.whl"))}
    missing = [name for name in (one.name for one in needed()) if not is_there(name) and plain(name) not in carried]
    if "torch" in missing:
        sys.exit("bench-gpu: this interpreter has no torch; give one that has: make bench-gpu PYTHON=/path/to/python3")
    if missing:
        sys.exit(
            f"bench-gpu: lacks {', '.join(missing)}, which wheels/ does not have; fetch it where there is a network: "
            f'make wheels WHEELS_MORE="{" ".join(missing)}"'
        )
    wheels = [str(wheel) for name, wheel in carried.items() if not is_there(name)]
    if wheels:
        shutil.rmtree(PACKAGES, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        if subprocess.run([*command, "--target", str(PACKAGES), *wheels], check=False).returncode:
            python = f"{sys.version_info.major}.{sys.version_info.minor}"
            sys.exit(f"bench-gpu: wheels/ is for another Python; run `make wheels WHEELS_FOR={python}` first.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help=f"Not given: {', '.join(CASES)}.")
    chosen, more = parser.parse_known_args()
    complete()
    path = os.pathsep.join([str(ROOT), str(PACKAGES), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    begun = time.monotonic()
    failed: list[str] = []
    for case in chosen.case or CASES:
        left = BUDGET_S - (time.monotonic() - begun)
        if left <= 0:
            sys.exit(f"bench-gpu: {BUDGET_S:.0f} s are over; {case} was not started.")
        command = [sys.executable, "-m", "parafuse", "bench", "--case", case, "--budget", f"{left:.0f}", *more]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False)
        print(f"bench-gpu: {case}: {time.monotonic() - begun:.0f} s since the start", flush=True)
        failed += [case] if done.returncode else []
    if failed:
        sys.exit(f"bench-gpu: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
