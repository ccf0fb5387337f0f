"""A real Chromium without a window, over its DevTools protocol: that of Qt's wheels, else one that the machine has.

`python -m tests.serve.http.chromium PORT` is the process of Qt's."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE_S = 30.0
LOOK_S = 0.02
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
FLAGS = ("--no-sandbox", "--disable-gpu", "--remote-allow-origins=*")
"""No sandbox: tests run as root too, and the page that is opened is ours."""
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), " ": (32, " ")}
"""Name -> its number, and what it types."""
SHIFT, CONTROL = 8, 2


def window(port: int) -> int:
    """One page of Qt's Chromium that nobody sees, until it is ended."""
    os.environ |= {
        "QT_QPA_PLATFORM": "offscreen", "QT_QUICK_BACKEND": "software", "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(FLAGS),
        "QTWEBENGINE_REMOTE_DEBUGGING": f"127.0.0.1:{port}",
    }  # fmt: skip
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    app = QApplication([])
    view = QWebEngineView()
    view.resize(1200, 900)
    view.setHtml("")
    view.show()
    return app.exec()


def command(port: int, profile: str) -> list[str] | str:
    """What starts a Chromium; or why there is none."""
    tried = subprocess.run(
        [sys.executable, "-c", "import PySide6.QtWebEngineWidgets"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    if tried.returncode == 0:
        return [sys.executable, "-m", "tests.serve.http.chromium", str(port)]
    for name in INSTALLED:
        if found := shutil.which(name):
            return [found, "--headless", f"--remote-debugging-port={port}", f"--user-data-dir={profile}", *FLAGS,
                    "about:blank"]  # fmt: skip
    why = (tried.stderr.strip().splitlines() or ["no reason was given"])[-1]
    return f"Qt's does not start ({why}), and there is none of {', '.join(INSTALLED)}"


@contextlib.contextmanager
def browsing() -> Iterator[Browser | str]:
    """A browser with one page; or why there is none."""
    from websockets.sync.client import connect

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pf-", ignore_cleanup_errors=True) as folder:
        asked = command(port, folder)
        if isinstance(asked, str):
            yield asked
            return
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(asked, stdout=file, stderr=file, start_new_session=True)
        try:
            address = _address(port, process, log)
            with connect(address, max_size=None) as line:
                browser = Browser(line)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    browser.call(f"{domain}.enable")
                browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
                yield browser
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _address(port: int, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=PATIENCE_S) as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        time.sleep(LOOK_S)
    raise AssertionError(f"the browser does not start: {log.read_text()[-2000:]}")


@dataclass
class Browser:
    """One page, used as its user would: by keys, clicks, and looking."""

    line: Any
    faults: list[str] = field(default_factory=list)
    """What its console says is wrong."""
    asked: list[str] = field(default_factory=list)
    """Addresses of all that it has asked for."""
    number: int = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call of the DevTools protocol."""
        self.number += 1
        self.line.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            said = json.loads(self.line.recv(timeout=PATIENCE_S))
            if said.get("id") == self.number:
                assert "error" not in said, (method, said)
                return said["result"]
            self._heard(said.get("method", ""), said.get("params", {}))

    def _heard(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.faults.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def js(self, expression: str) -> Any:
        """What it comes to, as JSON has it. Of an element: that there is one."""
        said = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        value = said["result"].get("value")
        return True if value == {} else value

    def until(self, expression: str) -> Any:
        """What it comes to once that is something."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                found = self.js(expression)
            except AssertionError:  # between two documents
                found = None
            if found:
                return found
            if time.monotonic() > deadline:
                shown = self.js("document.body.innerText")
                raise AssertionError(f"not in {PATIENCE_S:g} s: {expression}\n{shown}\n{self.faults}")
            time.sleep(LOOK_S)

    def open(self, url: str) -> None:
        """Another page, once its scripts have run."""
        self.call("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def reload(self) -> None:
        self.js("window.isOld = true")
        self.call("Page.reload")
        self.until("!window.isOld && document.readyState === 'complete'")

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """One key, down and up."""
        number, typed = KEYS.get(key, (ord(key[0].upper()), key))
        same = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": number}
        self.call("Input.dispatchKeyEvent", type="keyDown", modifiers=modifiers, text=typed, **same)
        self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **same)

    def click(self, selector: str) -> None:
        """In the middle of what can be seen of it."""
        found = json.dumps(selector)
        at = self.until(
            f"(() => {{ const one = document.querySelector({found}); one.scrollIntoView({{block: 'center'}});"
            "const box = one.getBoundingClientRect(); const x = box.x + box.width / 2, y = box.y + box.height / 2;"
            "return box.width && one.contains(document.elementFromPoint(x, y)) && [x, y]; })()"
        )
        same = {"x": at[0], "y": at[1], "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **same)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **same)

    def fill(self, selector: str, text: str) -> None:
        """Clicks into a field, and types in place of what is there."""
        self.click(selector)
        self.js(f"document.querySelector({json.dumps(selector)}).select()")
        self.type(text)

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def named(self) -> list[tuple[str, str]]:
        """Role and name of each thing that can be used, as a screen reader has them."""
        roles = ("button", "textbox", "spinbutton", "checkbox", "link", "image", "progressbar", "DisclosureTriangle")
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored") and node.get("role", {}).get("value") in roles
        ]

    def picture(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


if __name__ == "__main__":
    sys.exit(window(int(sys.argv[1])))
