"""One logger, and short notes to the terminal. Quiet by default; only rank 0 speaks."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("parafuse")


def rank() -> int:
    """Global rank from the launcher's environment (`RANK`), 0 without one. Never from LOCAL_RANK."""
    return int(os.environ.get("RANK", "0"))


def note(text: str) -> None:
    """One line for the user on stderr, from rank 0 only; also on the `parafuse` logger at INFO."""
    logger.info(text)
    if rank() == 0 and not logger.handlers:
        print(f"parafuse: {text}", file=sys.stderr, flush=True)
