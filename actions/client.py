"""An action provider as its caller sees it: requests that are tried again, and what may come back.

A provider is somebody else's server. It gets no token but its own, and cannot make us follow it elsewhere, wait
for ever, or fill our memory.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from http.cookiejar import DefaultCookiePolicy
from ipaddress import ip_address
from typing import Final, TypeAlias
from urllib.parse import urlsplit

import requests

from scistream_flows.errors import ScistreamError

from .expressions import Json, StateError, not_too_deep, parse_json

LARGEST_ANSWER_BYTES: Final = 1 << 20
CONNECT_TIMEOUT_S: Final = 10.0
ANSWER_TIMEOUT_S: Final = 30.0
TRIES: Final = 5
FIRST_RETRY_S: Final = 0.2
LONGEST_RETRY_S: Final = 5.0

Authorizer: TypeAlias = Callable[[str], "str | None"]
"""From the address of an action provider to the bearer token pinned for it, None for no token. Called before each
request, so it may renew. The address decides, never a scope that the definition names: a definition must not be able to
send somebody's token elsewhere."""


def new_session() -> requests.Session:
    """Connections that are kept between requests. No cookies: they ignore ports, and would reach other providers."""
    session = requests.Session()
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return session


def in_words(cause: Json) -> str:
    """A cause as one line: of an action's document, what its provider said."""
    if isinstance(cause, dict):
        details = cause.get("details")
        for one in (details, cause):
            if isinstance(one, dict):
                for key in ("description", "message", "detail"):
                    if isinstance(one.get(key), str):
                        return str(one[key])
    return cause if isinstance(cause, str) else json.dumps(cause)


class Answer:
    """What an action provider answered.

    Attributes:
        status: The HTTP status.
        document: The body, if it was JSON; else its beginning below `description`.
        pause_s: The pause that the provider asks for before another try, seconds; 0 if it does not.
        elsewhere: Where it redirects to, None if it does not.
    """

    def __init__(self, response: requests.Response, content: bytes, token: str | None) -> None:
        self.status = response.status_code
        after = response.headers.get("Retry-After", "")
        self.pause_s = float(after) if after.isdecimal() else 0.0
        redirects = 300 <= self.status < 400
        place = response.headers.get("Location", "another address")
        self.elsewhere = _without(token, place) if redirects else None
        text = content.decode(errors="replace")
        try:
            self.document: Json = _without(token, not_too_deep(parse_json(text)))
        except (ValueError, RecursionError):
            self.document = _without(token, {"description": f"HTTP {self.status}: {text[:200]}"})


def _without(token: str | None, value: Json) -> Json:
    """`value` without the token: no provider should send it back, but none can make us log it."""
    if isinstance(value, list):
        return [_without(token, one) for one in value]
    if isinstance(value, dict):
        return {_without(token, key): _without(token, one) for key, one in value.items()}
    return value.replace(token, "***") if token and isinstance(value, str) else value


class _Bearer(requests.auth.AuthBase):
    """The token of a request. Given in any case, because requests would else look for one in ~/.netrc."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class NoAnswer(Exception):
    """A request got no usable answer; the words say why.

    Attributes:
        may_have_arrived: Whether the provider may have seen it.
    """

    def __init__(self, words: str, *, may_have_arrived: bool) -> None:
        super().__init__(words)
        self.may_have_arrived = may_have_arrived


class Provider:
    """One action provider, as one Action state uses it.

    Attributes:
        url: Its address.
        owes_an_answer: Whether the last request may have arrived and had no answer that says what came of it.
    """

    def __init__(
        self,
        url: str,
        *,
        session: requests.Session,
        authorizer: Authorizer,
        pause: Callable[[float], None],
        scale: float,
    ) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._authorizer = authorizer
        self._pause = pause
        self._scale = scale
        self.owes_an_answer = False

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Json = None,
        tries: int = TRIES,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        even_if_cancelled: bool = False,
    ) -> Answer:
        """Ask until there is an answer that is not 429 or 5xx, `tries` times at most.

        Args:
            method: GET or POST.
            path: What comes after the provider's address.
            body: JSON.
            tries: How often.
            answer_timeout_s: For how long each try waits for the answer.
            even_if_cancelled: Whether to go on in a cancelled run.

        Raises:
            NoAnswer: There was none.
            StateError: There is no token, or none that may be sent to this address; or it redirects.
        """
        pause_s, words = FIRST_RETRY_S, ""
        self.owes_an_answer = False
        for attempt in range(tries):
            if attempt:
                (time.sleep if even_if_cancelled else self._pause)(pause_s * self._scale)
                pause_s = min(pause_s * 2, LONGEST_RETRY_S)
            owed_before = self.owes_an_answer
            try:
                answer = self._once(method, path, body, answer_timeout_s)
            except NoAnswer as error:
                words, self.owes_an_answer = str(error), owed_before or error.may_have_arrived
                continue
            self.owes_an_answer = answer.status >= 500 or (owed_before and answer.status == 429)
            if answer.elsewhere is not None:
                raise StateError(
                    "ActionUnableToRun",
                    f"{self.url}{path} redirects to {answer.elsewhere}: name that address",
                )
            if answer.status != 429 and answer.status < 500:
                return answer
            words = f"HTTP {answer.status}: {in_words(answer.document)}"
            pause_s = max(pause_s, min(answer.pause_s, LONGEST_RETRY_S))
        raise NoAnswer(f"{method} {self.url}{path}: {words}", may_have_arrived=self.owes_an_answer)

    def _token(self) -> str | None:
        """The token for this provider, if it may be sent there."""
        try:
            token = self._authorizer(self.url)
        except ScistreamError as error:
            raise StateError("NoTokenException", f"there is no token for {self.url}: {error}") from None
        if token is not None and not re.fullmatch("[!-~]+", token):
            raise StateError("NoTokenException", f"what is kept as the token for {self.url} is none")
        if token is not None and urlsplit(self.url).scheme != "https" and not _is_here(self.url):
            raise StateError(
                "ActionUnableToRun",
                f"{self.url}: a token is not sent over plain http to another machine; use https",
            )
        return token

    def _once(self, method: str, path: str, body: Json, answer_timeout_s: float) -> Answer:
        token = self._token()
        self.owes_an_answer = True
        try:
            with self._session.request(
                method,
                self.url + path,
                json=body,
                auth=_Bearer(token),
                timeout=(CONNECT_TIMEOUT_S, answer_timeout_s),
                # no proxy is asked to reach this machine, and so none sees the token of a development facility
                proxies={"http": None, "https": None, "all": None} if _is_here(self.url) else None,  # type: ignore[dict-item]
                allow_redirects=False,
                stream=True,
            ) as response:
                return Answer(response, _bounded(response, answer_timeout_s), token)
        except (requests.RequestException, OSError) as error:
            never_sent = isinstance(
                error, requests.exceptions.ConnectTimeout
            ) or "NewConnectionError" in repr(error)
            raise NoAnswer(_plain(error), may_have_arrived=not never_sent) from None


def _bounded(response: requests.Response, timeout_s: float) -> bytes:
    """The body of an answer, which may be neither endless nor endlessly slow."""
    deadline = time.monotonic() + timeout_s
    content = bytearray()
    for part in response.iter_content(16_384):
        content += part
        if len(content) > LARGEST_ANSWER_BYTES:
            raise requests.RequestException(f"the answer has more than {LARGEST_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise requests.RequestException(f"the answer is not whole after {timeout_s:g} s")
    return bytes(content)


def _plain(error: BaseException) -> str:
    """Why a request failed, in the words of the system: requests and urllib3 wrap them several times."""
    words = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None and cause.strerror:
            return cause.strerror
        words = str(cause) or words
        cause = cause.__cause__ or cause.__context__
    return words


def _is_here(url: str) -> bool:
    """Whether an address is of this machine itself."""
    host = urlsplit(url).hostname or ""
    if "\\" in url or "@" in urlsplit(url).netloc:  # read in more than one way
        return False
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def action_of(answer: Answer, provider: Provider, error: str) -> dict[str, Json]:
    """The status document of an action, as far as it must be right."""
    document = answer.document
    if (
        not isinstance(document, dict)
        or not isinstance(document.get("action_id"), str)
        or not document["action_id"].strip("./")  # it becomes part of an address
        or not document["action_id"].isprintable()
        or document.get("status") not in ("ACTIVE", "INACTIVE", "SUCCEEDED", "FAILED")
    ):
        raise StateError(
            error,
            f"{provider.url} does not answer as an action provider: {in_words(document)[:200]}",
        )
    return document


def status_of(answer: Answer) -> str:
    """The status that an answer gives an action, `unknown` if it gives none."""
    return str(answer.document.get("status")) if isinstance(answer.document, dict) else "unknown"


def is_over(answer: Answer) -> bool:
    """Whether an answer says that an action has ended."""
    return answer.status == 200 and status_of(answer) in ("SUCCEEDED", "FAILED")
