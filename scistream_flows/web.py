"""Requests to a server that is somebody else's: it gets no token but its own, and the answer is bounded.

It cannot make us follow it elsewhere, wait for ever, or fill our memory.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import requests

from scistream_flows.errors import BadRequest, ScistreamError, Unauthenticated
from scistream_flows.models import ip_of

LARGEST_ANSWER_BYTES: Final = 1 << 20
CONNECT_TIMEOUT_S: Final = 10.0
ANSWER_TIMEOUT_S: Final = 30.0

Authorizer: TypeAlias = Callable[[str], "str | None"]
"""From an address to the bearer token pinned for it, None for no token. Called before each request, so it may renew.
The address decides, never what a server or a definition says: neither must be able to have a token sent elsewhere."""


class NoAnswer(Exception):
    """A request got no usable answer; the words say why.

    Attributes:
        may_have_arrived: Whether the server may have seen it.
        untrusted: Whether its certificate is none to trust: no other try will change that.
    """

    def __init__(self, words: str, *, may_have_arrived: bool, untrusted: bool = False) -> None:
        super().__init__(words)
        self.may_have_arrived = may_have_arrived
        self.untrusted = untrusted


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered.

    Attributes:
        status: The HTTP status.
        content: The body.
        pause_s: The pause that the server asks for before another try, seconds; 0 if it does not.
        elsewhere: Where it redirects to, None if it does not.
    """

    status: int
    content: bytes
    pause_s: float = 0.0
    elsewhere: str | None = None


def new_session() -> requests.Session:
    """Connections that are kept between requests. No cookies: they ignore ports, and would reach other servers."""
    session = requests.Session()
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return session


def token_for(url: str, authorizer: Authorizer) -> str | None:
    """The token for an address, if it may be sent there.

    Raises:
        Unauthenticated: There is none, or what is kept is none.
        BadRequest: It would go over plain HTTP to another machine.
    """
    try:
        token = authorizer(url)
    except ScistreamError as error:
        raise Unauthenticated(f"there is no token for {url}: {error}", which=url) from None
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise Unauthenticated(f"what is kept as the token for {url} is none", which=url)
    if token is not None and urlsplit(url).scheme != "https" and not is_here(url):
        raise BadRequest(
            f"{url}: a token is not sent over plain http to another machine; use https", which=url
        )
    return token


def ask(
    session: requests.Session,
    method: str,
    url: str,
    *,
    token: str | None,
    body: Any = None,
    parameters: dict[str, str] | None = None,
    answer_timeout_s: float = ANSWER_TIMEOUT_S,
    largest_bytes: int = LARGEST_ANSWER_BYTES,
    ca_file: str | None = None,
) -> Reply:
    """What a server answers to one request.

    Args:
        session: Its connections.
        method: Such as GET.
        url: The address.
        token: For the header `Authorization`.
        body: JSON; None sends none.
        parameters: Of the query.
        answer_timeout_s: For how long to wait for the answer, and again for its body.
        largest_bytes: Of the answer's body.
        ca_file: Certificates of authorities to trust, PEM; by default those that requests knows.

    Raises:
        NoAnswer: There was none.
    """
    here = is_here(url)
    try:
        with session.request(
            method,
            url,
            json=body,
            params=parameters,
            auth=_Bearer(token),
            timeout=(CONNECT_TIMEOUT_S, answer_timeout_s),
            # no proxy is asked to reach this machine, and so none sees the token of a development facility
            proxies={"http": None, "https": None, "all": None} if here else None,  # type: ignore[dict-item]
            allow_redirects=False,
            stream=True,
            verify=ca_file,
        ) as response:
            after = response.headers.get("Retry-After", "")
            moved = 300 <= response.status_code < 400
            return Reply(
                status=response.status_code,
                content=_bounded(response, answer_timeout_s, largest_bytes),
                pause_s=float(after) if after.isdecimal() else 0.0,
                elsewhere=response.headers.get("Location", "another address") if moved else None,
            )
    except (requests.RequestException, OSError) as error:
        never_sent = isinstance(error, requests.exceptions.ConnectTimeout) or "NewConnectionError" in repr(
            error
        )
        words = _plain(error)
        untrusted = "CERTIFICATE_VERIFY_FAILED" in words
        raise NoAnswer(words, may_have_arrived=not never_sent, untrusted=untrusted) from None


def without(token: str | None, value: Any) -> Any:
    """A JSON value without the token: no server should send it back, but none can make us log it."""
    if isinstance(value, list):
        return [without(token, one) for one in value]
    if isinstance(value, dict):
        return {without(token, key): without(token, one) for key, one in value.items()}
    return value.replace(token, "***") if token and isinstance(value, str) else value


def is_here(url: str) -> bool:
    """Whether an address is of this machine itself."""
    host = urlsplit(url).hostname or ""
    if "\\" in url or "@" in urlsplit(url).netloc:  # read in more than one way
        return False
    address = ip_of(host)
    return host == "localhost" if address is None else address.is_loopback


class _Bearer(requests.auth.AuthBase):
    """The token of a request. Given in any case, because requests would else look for one in ~/.netrc."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _bounded(response: requests.Response, timeout_s: float, largest_bytes: int) -> bytes:
    """The body of an answer, which may be neither endless nor endlessly slow."""
    deadline = time.monotonic() + timeout_s
    content = bytearray()
    for part in response.iter_content(16_384):
        content += part
        if len(content) > largest_bytes:
            raise requests.RequestException(f"the answer has more than {largest_bytes} bytes")
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
