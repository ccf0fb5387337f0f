"""What the planner knows of a model, found once for all tests of a run: it costs seconds for each engine on several
ranks whose layout is left open, and is the same for the same key (tests/planning)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from parafuse.engine.planning import known
from parafuse.engine.planning.facts import Facts

FOLDER_ENV = "PARAFUSE_TESTS_FACTS"
"""Names the folder that keeps them; without it they are found anew each time."""


def keep_facts() -> None:
    """From now on, in this process; nothing else of the planner is kept, and a test's own folder goes before."""
    shared, where, facts = os.environ.get(FOLDER_ENV), known.folder, known.facts

    def kept(key: str, make: Callable[[], Facts]) -> Facts:
        def made() -> Facts:
            with patch.object(known, "folder", where):
                return make()

        with patch.object(known, "folder", lambda: where() or Path(str(shared))):
            return facts(key, made)

    if shared:
        known.facts = kept
