"""All pipelines with guidance."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from tests import guided
from tests.guided.case import Guided

NO_CASES = ("case", "cells", "collect", "parts", "__main__")


@cache
def cases() -> dict[str, Guided]:
    """Name -> case, sorted by name."""
    found: dict[str, Guided] = {}
    for module in pkgutil.iter_modules(guided.__path__):
        if module.name in NO_CASES or module.name.startswith("test_"):
            continue
        for case in importlib.import_module(f"tests.guided.{module.name}").CASES:
            if case.name in found:
                raise ValueError(f"two cases are named {case.name!r}")
            found[case.name] = case
    return dict(sorted(found.items()))
