"""Pictures of the page for docs/web-page.md, of a server that runs: `python -m tests.serve.http.page_pictures URL`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.serve.http.chromium import CONTROL, browsing

DOCS = Path(__file__).parents[3] / "docs"
PROMPTS = ("a cat", "a red apple")


def main(url: str) -> int:
    """Paints two prompts, and takes the page wide and narrow. 1 where there is no browser."""
    with browsing() as browser:
        if isinstance(browser, str):
            print(f"no browser here: {browser}", file=sys.stderr)
            return 1
        browser.resize(1200, 900)
        browser.prefer("light")
        browser.open(url)
        browser.until("document.activeElement.id === 'prompt'")
        for prompt in PROMPTS:
            browser.fill("#prompt", prompt)
            browser.press("Enter", CONTROL)
            browser.until("document.getElementById('stage').dataset.state !== 'done'")
            browser.until("document.getElementById('stage').dataset.state === 'done'")
        browser.until("[...document.querySelectorAll('#jobs img')].filter((one) => one.naturalWidth).length > 1")
        (DOCS / "web-page.png").write_bytes(browser.picture())
        browser.resize(360, 640)
        browser.prefer("dark")
        (DOCS / "web-page-narrow.png").write_bytes(browser.picture())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
