"""The web page at `/`: files of this package, without a key and without anything of the server's in them. All that the
page does it asks of the API, with the key that its user gives it."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response

FOLDER = Path(__file__).parent / "page"
MEDIA = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip
PARTS = (
    "icon.svg", "page.css", "main.js", "api.js", "asked.js", "dom.js", "form.js", "stage.js", "history.js",
)  # fmt: skip
FILES = {"/": "index.html"} | {f"/page/{name}": name for name in PARTS}
"""Path -> file. These, and no others, are there without a key."""
SECURE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}  # fmt: skip
"""What a browser is told: scripts of this server alone, no frames, and no HTML that is made of words."""


class Page:
    """The page of one server. Its files are read once."""

    def __init__(self) -> None:
        self._files = {path: (FOLDER / name).read_bytes() for path, name in FILES.items()}

    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)
        for path in FILES:
            router.add_api_route(path, self.file, methods=["GET", "HEAD"], response_class=Response)
        return router

    async def file(self, request: Request) -> Response:
        """One of them."""
        name = FILES[request.url.path]
        return Response(self._files[request.url.path], media_type=MEDIA[Path(name).suffix], headers=SECURE)
