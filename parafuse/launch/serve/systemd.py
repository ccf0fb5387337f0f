"""What a service tells systemd, as in sd_notify(3): datagrams to the socket that its environment names."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

EVERY_S = 1.0


class Systemd:
    """Does nothing where no systemd listens. Never waits, and raises nothing: a service must not end over it."""

    def __init__(self, environ: Mapping[str, str] = os.environ):
        self._address = environ.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)
        self._told: set[str] = set()
        self._alive_s = 0.0

    def tell(self, what: str) -> None:
        """`READY=1` or `STOPPING=1`, once each."""
        if what not in self._told:
            self._told.add(what)
            self._send(what)

    def alive(self) -> None:
        """For the watchdog; often is not too often."""
        if time.monotonic() - self._alive_s >= EVERY_S:
            self._alive_s = time.monotonic()
            self._send("WATCHDOG=1")

    def _send(self, what: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.setblocking(False)
            line.sendto(what.encode(), self._address)
