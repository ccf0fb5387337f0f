"""What holds for every test: one thread, no network, a fixed order, and no process left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, and inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PARAFUSE_CACHE"] = ""  # every block is examined

import hypothesis
import pytest
import torch

from tests.dist.ranks import close_pools

torch.set_num_threads(1)
hypothesis.settings.register_profile("parafuse", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("parafuse")

SUITES = (
    "unit",
    "dist",
    "gpu",
    "quality",
    "caches",
    "quantize",
    "rewrites",
    "sparse",
    "memory",
    "options",
    "vae",
    "drop_in",
    "measuring",
    "vae",
)  # the fastest answer first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--collected-floor", metavar="FILE", help="fail when fewer tests are collected than the number in FILE"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by its folder, orders the folders, and skips `gpu` where there is none."""
    no_gpu = pytest.mark.skip(reason="no CUDA")
    for item in items:
        suite = _suite(item)
        if suite in SUITES[1:]:
            item.add_marker(suite)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    items.sort(key=lambda item: SUITES.index(_suite(item)))  # stable: within a suite, files by name, tests as written


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests that silently stop being collected would pass for ever: a full run has a floor."""
    if not hasattr(session.config, "workerinput") and not session.config.getoption("numprocesses", None):
        _hold_floor(session.config, len(session.items))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """The same, where several processes share the tests: each collects all of them."""
    _hold_floor(node.config, len(ids))


def _hold_floor(config: pytest.Config, collected: int) -> None:
    path = config.getoption("--collected-floor")
    if path is None:
        return
    floor = int(Path(path).read_text())
    print(f"\ncollected {collected} tests, floor {floor}")
    if collected < floor:
        raise pytest.UsageError(f"{floor - collected} tests are missing. If that is meant, lower the number in {path}.")


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    close_pools()


def _suite(item: pytest.Item) -> str:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return folder if folder in SUITES else SUITES[0]
