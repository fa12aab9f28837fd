"""The operator's page: files of this package, and the headers that let it do nothing but ask this service."""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Response

_FILES: Final = {
    "/": ("operator.html", "text/html; charset=utf-8"),
    "/operator.css": ("operator.css", "text/css; charset=utf-8"),
    "/operator.js": ("operator.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

# Nothing inline, nothing of elsewhere, no form, no frame; text cannot become markup (Trusted Types, where there are).
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def routes() -> APIRouter:
    """The page and its parts. They hold no figures, so that anybody may have them: what they show is asked for."""
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in _FILES.items():
        content = (files("scistream_flows.actions") / "pages" / name).read_bytes()
        router.add_api_route(path, partial(_answer, content, kind), methods=["GET"])
    return router


async def _answer(content: bytes, kind: str) -> Response:
    return Response(content, headers={**HEADERS, "Content-Type": kind})
