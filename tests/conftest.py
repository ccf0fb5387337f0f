"""What holds for every test: one thread, no network, a fixed order, and no process left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, and inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of compiling processes for each rank: they start slowly
os.environ["PARAFUSE_CACHE"] = ""  # every block is examined
os.environ.setdefault("PARAFUSE_TESTS_FACTS", tempfile.mkdtemp(prefix="facts-"))  # one for all processes of a run

import hypothesis
import pytest
import torch

from tests.dist.ranks import close_pools

torch.set_num_threads(1)
hypothesis.settings.register_profile("parafuse", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("parafuse")

SUITES = tuple(  # the fastest answer first
    "unit dist gpu quality caches kernels quantize rewrites sparse planning memory vae options measuring support "
    "drop_in batch ray_serve serve".split()
)


FLOORS = Path(__file__).with_name("collected_floors.json")
"""Tests of each suite: fewer are a failure, where the whole suite is asked for with --hold-floors."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run all cases of every sweep, and not a part of them")
    parser.addoption(
        "--hold-floors", action="store_true", help=f"fail when fewer tests are collected than {FLOORS.name} says"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks each test by its folder, orders the folders, and skips `gpu` where there is none and parts of sweeps.

    Where several processes share the tests, what takes longest comes first (suites, and in each the files that are
    marked `long`): else one of them is idle at the end."""
    no_gpu = pytest.mark.skip(reason="no CUDA")
    for item in items:
        suite = _suite(item)
        if suite in SUITES[1:]:
            item.add_marker(suite)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    if not config.getoption("--whole"):
        _thin(items)
    sign = -1 if hasattr(config, "workerinput") else 1
    # stable: within a suite, files by name
    items.sort(key=lambda item: (sign * SUITES.index(_suite(item)), sign * bool(item.get_closest_marker("long"))))


def _thin(items: list[pytest.Item]) -> None:
    """Of a sweep (`@pytest.mark.sweep(one_in=n)`: many cases that fail for the same reasons) one case in n is run, at
    least one, drawn by a hash of its name: always the same, and in no step with the order of parameters. Of what is
    marked `whole`, none."""
    sweeps: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("whole"):
            item.add_marker(pytest.mark.skip(reason="takes long: `make test-whole` runs it"))
        elif item.get_closest_marker("sweep"):
            sweeps[item.nodeid.partition("[")[0]].append(item)
    for cases in sweeps.values():
        one_in = cases[0].get_closest_marker("sweep").kwargs["one_in"]  # type: ignore[union-attr]
        cases.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
        for item in cases[-(-len(cases) // one_in) :]:
            item.add_marker(pytest.mark.skip(reason="a part of a sweep that `make test-whole` runs"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests that silently stop being collected would pass for ever."""
    if not hasattr(session.config, "workerinput") and not session.config.getoption("numprocesses", None):
        _hold_floors(session.config, [item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """The same, where several processes share the tests: each collects all of them."""
    _hold_floors(node.config, ids)


def _hold_floors(config: pytest.Config, ids: list[str]) -> None:
    if not config.getoption("--hold-floors"):
        return
    collected = Counter(name.split("/")[1] for name in ids)
    floors: dict[str, int] = json.loads(FLOORS.read_text())
    asked = {suite: floors[suite] for suite in floors if suite in {Path(name).name for name in config.args}}
    print("\ncollected, and floors: " + ", ".join(f"{suite} {collected[suite]} ({asked[suite]})" for suite in asked))
    for suite, floor in asked.items():
        if collected[suite] < floor:
            missing = f"{floor - collected[suite]} tests of tests/{suite} are missing."
            raise pytest.UsageError(f"{missing} If that is meant, lower the number in {FLOORS}.")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Whatever a test before has set: sums in other orders are other numbers."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    close_pools()


def pytest_unconfigure(config: pytest.Config) -> None:
    """The process that has begun ends last."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["PARAFUSE_TESTS_FACTS"], ignore_errors=True)


def _suite(item: pytest.Item) -> str:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return folder if folder in SUITES else SUITES[0]
