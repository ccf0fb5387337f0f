"""Where parafuse keeps what it has learned from one process to the next. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

FOLDER_ENV = "PARAFUSE_CACHE"
"""Names the folder; empty: nothing is kept."""


def cache_folder() -> Path | None:
    """`PARAFUSE_CACHE`, or the user's cache folder."""
    named = os.environ.get(FOLDER_ENV)
    if named is None:
        return Path(platformdirs.user_cache_dir("parafuse"))
    return Path(named) if named else None
