"""Around every request: its size, its host, a line in the log, and one form for all errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from http import HTTPStatus
from math import ceil
from typing import Any, Final

import h11
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from scistream_flows.allowance import Allowance
from scistream_flows.errors import (
    PROTOCOL,
    BadRequest,
    ProtocolMismatch,
    RateLimited,
    ScistreamError,
    Unauthenticated,
)
from scistream_flows.registry import asked_from

from .auth import check_host

log = logging.getLogger("scistream_flows.access")

LONGEST_BODY_BYTES: Final = 256 * 1024

REFUSALS_PER_MIN: Final = 60
REFUSALS_AT_ONCE: Final = 100
"""Lines of the log for requests that were refused or brought no token, of everybody together; those beyond are counted
in the next one."""

_REFUSED: Final = frozenset({400, 401, 403, 404, 405, 408, 413, 422, 429})

REQUEST_WITHIN_S: Final = 10.0
"""So long a caller may take for the head of a request, and again for its body, seconds."""


def answer(wrong: ScistreamError, *, status: int | None = None) -> JSONResponse:
    """The document of an error, with its HTTP status."""
    # also of a refusal that another scope, or a consent, would lift (RFC 6750, 3.1)
    challenge = wrong.challenge if isinstance(wrong, Unauthenticated) else wrong.details.get("challenge")
    headers = {"WWW-Authenticate": str(challenge)} if challenge else {}
    if isinstance(wrong, RateLimited):
        headers["Retry-After"] = str(ceil(wrong.retry_after_s))
    return JSONResponse(wrong.to_document(), status_code=status or wrong.http_status, headers=headers)


def answer_errors(app: FastAPI) -> None:
    """Give every error its document: ours, those of the framework, and those that nobody expected."""

    async def ours(_: Request, wrong: Exception) -> JSONResponse:
        return answer(wrong if isinstance(wrong, ScistreamError) else ScistreamError(str(wrong)))

    async def invalid(_: Request, wrong: Exception) -> JSONResponse:
        assert isinstance(wrong, RequestValidationError)  # noqa: S101 - it is registered for these only
        error = _complaint(wrong)
        return answer(error, status=400 if error.details.get("json") is False else None)

    async def of_the_framework(_: Request, wrong: Exception) -> JSONResponse:
        assert isinstance(wrong, HTTPException)  # noqa: S101 - it is registered for these only
        phrase = HTTPStatus(wrong.status_code).phrase
        document = {
            "protocol": PROTOCOL,
            "code": phrase.lower().replace(" ", "-"),
            "message": wrong.detail or phrase,
            "which": "",
            "hint": "The paths and what they take are in /openapi.json"
            if wrong.status_code in (404, 405)
            else "",
            "details": {},
        }
        return JSONResponse(document, status_code=wrong.status_code, headers=wrong.headers)

    async def unexpected(_: Request, wrong: Exception) -> JSONResponse:  # noqa: ARG001 - the server logs it
        return answer(ScistreamError("the facility has made a mistake; its log says which"))

    app.add_exception_handler(ScistreamError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, of_the_framework)
    app.add_exception_handler(Exception, unexpected)


def _complaint(wrong: RequestValidationError) -> ScistreamError:
    """What is wrong with a request, field by field; the values stay out, they may be long or private."""
    fields: dict[str, str] = {}
    for mistake in wrong.errors():
        place = ".".join(str(part) for part in mistake["loc"][1:])
        words = str(mistake["msg"]).removeprefix("Value error, ")
        if mistake["type"] == "json_invalid":
            return BadRequest("the body is not JSON", which="body", hint="Send one JSON document", json=False)
        if place.rpartition(".")[2] == "protocol" and mistake["type"] == "literal_error":
            theirs = mistake.get("input")
            return ProtocolMismatch(
                f"{place} is {theirs if isinstance(theirs, int) else 'none'}, this side speaks {PROTOCOL}",
                which=place,
                hint="Run versions of the same protocol on both sides",
                theirs=theirs if isinstance(theirs, int) else None,
                ours=PROTOCOL,
            )
        fields[place] = words
    said = "; ".join(f"{name}: {words}" if name else words for name, words in fields.items())
    return BadRequest(
        f"the request is wrong: {said}", which="request", hint="See /openapi.json", fields=fields
    )


class Doorkeeper:
    """Sees every request first: refuses what is too large or meant for another host, and logs it.

    A line of the log has the client, the method, the path without its query, the status and the time; never a header.
    Many refusals, and many requests without a token, are counted instead.

    Args:
        app: What comes after.
        hosts: What `Host` may say; None leaves it to TLS and the token.
        note: Is told the pattern of the path, the method, the status and the seconds of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] | None = None,
        note: Callable[[str | None, str, int, float], None] = lambda *_: None,
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._note = note
        self._refusals = Allowance(per_min=REFUSALS_PER_MIN, burst=REFUSALS_AT_ONCE)
        self._unwritten = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        asked_from.set((scope.get("client") or (None,))[0])  # of this task, and of the threads that answer
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(Headers(scope=scope))
            if refusal is not None:
                await refusal(scope, receive, noting)
            else:
                await self._app(scope, _counted(receive), noting)
        except Exception:
            status = 500
            raise
        finally:
            took_s = time.monotonic() - began
            self._note(getattr(scope.get("route"), "path", None), scope["method"], status, took_s)
            self._log(scope, status, took_s=took_s)

    def _log(self, scope: Scope, status: int, *, took_s: float) -> None:
        stranger = "authorization" not in Headers(scope=scope)
        if (stranger or status in _REFUSED) and self._refusals.take(""):
            self._unwritten += 1
            return
        unwritten, self._unwritten = self._unwritten, 0
        log.info(
            "%s %s %s %s %.0f ms%s",
            (scope.get("client") or ("-",))[0],
            scope["method"],
            scope["path"].encode("unicode_escape").decode(),
            status or "-",
            1000 * took_s,
            f", {unwritten} before it not logged" if unwritten else "",
        )

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        if self._hosts is not None:
            try:
                check_host(headers.get("host"), headers.get("origin"), allowed=self._hosts)
            except ScistreamError as wrong:
                return answer(wrong)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LONGEST_BODY_BYTES:
            return answer(_too_large(), status=413)
        return None


def _counted(receive: Receive) -> Receive:
    """Receive, until the body is larger than allowed, announced or not, or takes longer than allowed."""
    count = 0
    whole = False
    deadline = time.monotonic() + REQUEST_WITHIN_S

    async def counting() -> Any:
        nonlocal count, whole
        try:
            message = await asyncio.wait_for(receive(), None if whole else deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body was not whole after {REQUEST_WITHIN_S:g} s") from None
        whole = not message.get("more_body", False)
        count += len(message.get("body", b""))
        if count > LONGEST_BODY_BYTES:
            raise HTTPException(413, _too_large().message)
        return message

    return counting


def _too_large() -> ScistreamError:
    return BadRequest(
        f"the body is larger than {LONGEST_BODY_BYTES} bytes", which="body", hint="Send a smaller document"
    )


class FewWarnings(logging.Filter):
    """Of the warnings of a logger only so many: the server writes one for each stranger who speaks no HTTP."""

    def __init__(self) -> None:
        super().__init__()
        self._warnings = Allowance(per_min=REFUSALS_PER_MIN, burst=REFUSALS_AT_ONCE)
        self._unwritten = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        if record.levelno > logging.WARNING:
            return True
        if self._warnings.take(""):
            self._unwritten += 1
            return False
        unwritten, self._unwritten = self._unwritten, 0
        if unwritten:
            record.msg, record.args = f"{record.getMessage()} {unwritten} before it not logged", ()
        return True


class PromptHTTP(H11Protocol):
    """HTTP as uvicorn speaks it, but who connects and does not ask loses the connection: there are so many only."""

    _hurry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Go on waiting while the head of a request is not whole."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._wait_no_more()
        elif self._hurry is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._hurry = self.loop.call_later(REQUEST_WITHIN_S, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None
