"""Keeps other libraries' warnings, logs and bars off the terminal, for the command line's own process only.

Importing parafuse silences nothing: the command line calls these functions, before the libraries are imported.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from parafuse import log


def silence_libraries() -> None:
    """Before torch is imported: warnings and logs below ERROR are dropped, in Python and in torch's C++.

    They are advice to programmers, and come in dozens on a normal run: torchao tells which of its libraries do not
    load, torch's pytree and transformers' image processors what will be deprecated. Settings that the user made in
    the environment or by `python -W` are kept."""
    logging.disable(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("NCCL_DEBUG", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells when it starts and stops
    if log.rank() != 0:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def hide_loading_bars() -> None:
    """After diffusers and transformers are imported: no bars for loading, and no error told twice.

    Downloads keep their bars on a terminal."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # also those of the hub
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.CRITICAL)  # it logs what it raises
    if log.rank() == 0 and sys.stderr.isatty():
        enable_progress_bars()


def silence_notes() -> None:
    """For --quiet: parafuse's own notes go nowhere."""
    log.logger.addHandler(logging.NullHandler())
