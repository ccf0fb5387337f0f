"""What a rank process does on its way in and out: dies with its parent, and records why it failed.

The record has the format of torch's elastic launcher, so that `torchrun` shows the traceback too.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from parafuse.errors import RankError

PARENT_ENV = "PARAFUSE_PARENT_PID"
ERROR_FILE_ENV = "TORCHELASTIC_ERROR_FILE"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOST_PEER = ("connection closed by peer", "connection reset by peer", "remote process exited", "broken pipe")
"""What gloo, NCCL and the store say when another rank has gone."""


def enter() -> bool:
    """Called first in every process that may be a rank: True if `ranks.start` made it. It then dies with its parent.

    Done here and not before exec, because code between fork and exec is unsafe in a parent with threads. The getppid
    check covers a parent that died before the kernel was asked. Native crashes show their Python stack."""
    parent = os.environ.pop(PARENT_ENV, None)  # popped: what this rank starts is not a rank
    if parent is None:
        return False
    faulthandler.enable()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        os._exit(1)
    return True


def is_secondary(error: BaseException) -> bool:
    """Whether the error tells of another rank's end, and is not the cause itself."""
    text = str(error).lower()
    return isinstance(error, RankError) or any(phrase in text for phrase in LOST_PEER)


def record(error: BaseException, *, one_line: bool, exit_code: int) -> bool:
    """Writes why this rank ends into the launcher's error file. False if there is none or it cannot be written.

    one_line: the message says everything, and no traceback is shown."""
    path = os.environ.get(ERROR_FILE_ENV)
    if not path:
        return False
    text = str(error) if one_line else "".join(traceback.format_exception(error))
    now = time.time()
    message = {
        "message": str(error) if one_line else f"{type(error).__name__}: {error}",
        "extraInfo": {"py_callstack": text, "timestamp": str(int(now))},
        "time": now,
        "one_line": one_line,
        "secondary": is_secondary(error),
        "errorCode": exit_code,
    }
    try:
        scratch = Path(f"{path}.part")
        scratch.write_text(json.dumps({"message": message}))
        scratch.replace(path)  # whole or not at all: the parent may look at any moment
    except OSError:
        return False
    return True
