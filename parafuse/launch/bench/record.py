"""Records of measurements: JSON files, never overwritten, never written for what did not happen. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from parafuse.errors import ConfigError, ParafuseError, reject_unknown
from parafuse.hardware import cores

SCHEMA = 1
COMMIT_ENV = "PARAFUSE_COMMIT"
CALLS, SKIPPED, RAN, KEPT = "denoiser calls", "skipped calls", "calls that ran the last block", "kept bytes"
"""Counters of caches: of other engines' by what their last block did, of parafuse's by its receipt."""
QUANTIZED = "layers quantized"
"""Counter: linear layers in 8 bits, of each request."""
FOLDER = "benchmarks/results"
"""Where records go; new ones there are no change of the source."""


class NotAppliedError(ParafuseError):
    """What was measured is not what was asked for."""


@dataclass(kw_only=True)
class Row:
    """One variant, as it was measured."""

    name: str
    way: str
    ranks: int
    degrees: dict[str, int] = field(default_factory=dict[str, int])
    compile: bool = False
    quantize: str = ""
    attention: str = ""
    sparse: str = ""
    """As its shortest text; empty: none."""
    cache: str = ""
    """As its shortest text."""
    threshold: float | None = None
    """Of another engine's cache, where it is not its default one."""
    error: str = ""
    """Why there are no figures."""
    share_of: int = 1
    """Above 1: one rank's share of so many was run, on one device; `wire_s` is modelled."""
    wire_s: float = 0.0
    """Of a share: seconds on the wire in each request, from bytes and calls."""
    first_s: float = 0.0
    """From a loaded pipeline to the first picture: applying, examining, compiling, painting."""
    compile_s: float = 0.0
    """Of that, in the compiler's back end."""
    parts_s: dict[str, float] = field(default_factory=dict[str, float])
    """Part of a request (text, denoising, VAE, file) -> median of the rounds, on rank 0."""
    total_s: list[float] = field(default_factory=list[float])
    """A request, by round."""
    step_s: list[float] = field(default_factory=list[float])
    """Median step, by round, of the slowest rank."""
    memory_bytes: list[int] = field(default_factory=list[int])
    """By rank: the most that was allocated on a GPU; on a CPU, what the process held after a request."""
    counts: dict[str, float] = field(default_factory=dict[str, float])
    """What shows that it acted, for each request: graphs run, bytes and calls exchanged."""
    shares: dict[str, float] = field(default_factory=dict[str, float])
    """Where the time of a step went."""
    quality: dict[str, float] = field(default_factory=dict[str, float])
    """Its pictures against the baseline's; over several prompts with their medians."""
    quality_by_round: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """The same of each prompt, where each round has one of its own."""


@dataclass(kw_only=True)
class Record:
    """One case on one machine at one commit."""

    schema: int = SCHEMA
    theme: str
    case: str
    model: str
    baseline: str
    call: dict[str, Any]
    hardware: str
    """In short: `cpu2`, `h200x1`."""
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    dirty: bool
    date: str
    ranks: int
    threads: int
    """Of each rank."""
    device: str
    dtype: str
    work: dict[str, float]
    """Of one step: floating-point operations of products and attention, bytes that these read and write."""
    rates: dict[str, float]
    """What one rank's device does alone, each a second."""
    load_s: float = 0.0
    """Until the pipeline was on its device."""
    steps: int = 0
    """Of a request, as it was run; 0: not known."""
    whole_steps: int = 0
    """Above 0: requests of so many steps are extrapolated."""
    prompts: list[str] = field(default_factory=list[str])
    """Of the rounds, where each has one of its own; the seed goes on by one each time."""
    link: dict[str, float] = field(default_factory=dict[str, float])
    """The modelled wire of shares: bytes_per_s, latency_s."""
    starts_s: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """Variant -> from the start of its processes to its first picture, with empty caches and with filled ones."""
    rows: list[Row] = field(default_factory=list[Row])

    @property
    def name(self) -> str:
        stem = f"{self.theme}_{self.hardware}_{self.date[:10]}_{self.commit}"
        return f"{stem}-dirty" if self.dirty else stem

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


def save(record: Record, folder: Path) -> Path:
    """Writes `<folder>/<name>.json`, or with a number where that exists already."""
    (path,) = save_beside(record.name, folder, {".json": json.dumps(asdict(record), indent=1) + "\n"})
    return path


def save_beside(stem: str, folder: Path, files: dict[str, str]) -> list[Path]:
    """Writes files of one stem by suffix, all with the same number where one of them exists already."""
    folder.mkdir(parents=True, exist_ok=True)
    name, number = stem, 2
    while any((folder / f"{name}{suffix}").exists() for suffix in files):
        name, number = f"{stem}-{number}", number + 1
    for suffix, text in files.items():
        part = folder / f"{name}{suffix}.part"
        part.write_text(text)
        part.replace(folder / f"{name}{suffix}")
    return [folder / f"{name}{suffix}" for suffix in files]


def load(path: Path) -> Record:
    """Raises ConfigError for what is no record of this schema."""
    try:
        values: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is no readable JSON ({error}).") from error
    found = values.get("schema") if isinstance(values, dict) else None
    if found is None:
        raise ConfigError(f"{path}: is no record of parafuse bench; give a file from {FOLDER}, or from its --out.")
    if found != SCHEMA:
        raise ConfigError(f"{path}: schema={found!r}: must be {SCHEMA}; measure again with this version.")
    try:
        reject_unknown(str(path), values, list(Record.__dataclass_fields__))
        return Record(**{**values, "rows": [Row(**row) for row in values["rows"]]})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{path}: is no whole record ({error}).") from error


def commit() -> tuple[str, bool]:
    """(commit of this source, whether it was changed since); its version where it is installed.

    A source tree without its repository is taken as changed, unless PARAFUSE_COMMIT names the commit that it is."""
    import parafuse

    root = Path(parafuse.__file__).parent
    if named := os.environ.get(COMMIT_ENV):
        return named.removesuffix("-dirty")[:12], named.endswith("-dirty")

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        inside = git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "--short=7", "HEAD"), bool(inside) and bool(
            git("status", "--porcelain", "--", ":(top)", f":(top,exclude){FOLDER}")
        )
    except (OSError, subprocess.CalledProcessError):
        if (root.parent / "pyproject.toml").is_file():
            return "unknown", True
        return f"v{parafuse.__version__}", False


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")


def short_hardware(gpu: str, ranks: int) -> str:
    """`cpu2` for two cores and no GPU's name, `h200x1` for one GPU of the name "NVIDIA H200"."""
    if not gpu:
        return f"cpu{cores()}"
    words = gpu.lower().replace("nvidia", "").split()
    kept = list(takewhile(lambda word: not word.endswith("gb") and word not in ("pcie", "sxm"), words))
    return f"{'-'.join(kept or ['gpu'])}x{ranks}"
