"""The client's side of a facility's REST: each verb as a request to its `s2cs`, tried again where that is safe.

The verbs are idempotent, so a request whose answer was lost is sent again; what it may have done is the same.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from scistream_flows.errors import BadRequest, FacilityUnreachable, Unauthenticated
from scistream_flows.models import ip_of, split_address
from scistream_flows.web import Authorizer, NoAnswer, Reply, ask, is_here, new_session, token_for, without

DEADLINE_S: Final = 60.0
FIRST_RETRY_S: Final = 0.2
LONGEST_RETRY_S: Final = 2.0
LARGEST_ANSWER_BYTES: Final = 16 << 20  # the status of a stream with many connections is long

TOO_OFTEN: Final = 429

# What a server in between says of one behind it that does not answer.
_NOT_OURS: Final = frozenset({TOO_OFTEN, 502, 503, 504})
_OF_A_STREAM: Final = {
    "status": ("GET", ""),
    "update": ("PATCH", ""),
    "release": ("DELETE", ""),
    "hello": ("POST", "/hello"),
    "renew": ("POST", "/renew"),
    "ticket": ("POST", "/ticket"),
}


def base_url(address: str) -> str:
    """The URL of the service at an address.

    Args:
        address: `https://HOST[:PORT][/PATH]`, or `HOST:PORT`, which means HTTPS except on this machine's loopback.

    Raises:
        BadRequest: It is none, or plain HTTP to another machine.
    """
    url = address
    if "://" not in address:
        try:
            host, _ = split_address(address)
        except ValueError as wrong:
            raise BadRequest(str(wrong), which=address) from None
        ip = ip_of(host)
        here = host == "localhost" if ip is None else ip.is_loopback
        url = f"{'http' if here else 'https'}://{address}"
    parts = urlsplit(url)
    try:
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        port_fits = False
    if (
        parts.scheme not in ("http", "https")
        or not port_fits
        or not parts.hostname
        or not re.fullmatch(r"[!-~]+", url)
        or "@" in parts.netloc
        or "\\" in url
        or parts.query
        or parts.fragment
    ):
        raise BadRequest(
            f"{address!r} is not the address of a service",
            which=address,
            hint="Such as https://scistream.example.org, without a name, a query or a fragment",
        )
    if parts.scheme == "http" and not is_here(url):
        raise BadRequest(
            f"{address!r}: plain http is for this machine only",
            which=address,
            hint=f"Use https://{parts.netloc}{parts.path}",
        )
    return url.rstrip("/")


class RestService:
    """The service of a facility, over HTTP.

    Args:
        address: As `base_url` takes it.
        authorizer: From an address to the token for it.
        ca_file: Certificates of authorities to trust, PEM; by default those of `$REQUESTS_CA_BUNDLE`, or of certifi.
        deadline_s: For each verb, seconds.

    Raises:
        BadRequest: `address` is none.
    """

    def __init__(
        self,
        address: str,
        *,
        authorizer: Authorizer,
        ca_file: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.url = base_url(address)
        self._authorizer = authorizer
        self._ca_file = ca_file
        self._deadline_s = deadline_s
        self._session = new_session()

    def close(self) -> None:
        """Give back the connections."""
        self._session.close()

    def answer(self, verb: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """What the facility answers to a verb, in the form of `S2CS.answer`.

        Raises:
            Unauthenticated: There is no token for the address.
            FacilityUnreachable: No answer came, or none of a facility.
        """
        method, path, parameters, body = _request(verb, document)
        until = time.monotonic() + self._deadline_s
        pause_s, said = FIRST_RETRY_S, ""
        while True:
            token = token_for(self.url, self._authorizer)
            left_s = max(0.1, until - time.monotonic())
            try:
                reply = ask(
                    self._session,
                    method,
                    self.url + path,
                    token=token,
                    body=body,
                    parameters=parameters,
                    answer_timeout_s=left_s,
                    largest_bytes=LARGEST_ANSWER_BYTES,
                    ca_file=self._ca_file,
                )
            except NoAnswer as none:
                said = str(none)
                if none.untrusted:
                    raise FacilityUnreachable(
                        f"{self.url} does not prove who it is: {said}",
                        which=self.url,
                        hint="Trust the authority of its certificate: --server_cert FILE, or $REQUESTS_CA_BUNDLE",
                    ) from None
            else:
                pause_s = max(pause_s, min(reply.pause_s, LONGEST_RETRY_S))
                understood = self._understood(reply, token, path)
                # whoever asks too often is told when to ask again, and nothing was done
                wait_s = max(pause_s, reply.pause_s) if reply.status == TOO_OFTEN else 0.0
                if understood is not None and not 0 < wait_s < until - time.monotonic():
                    return understood
                pause_s = max(pause_s, wait_s if understood is not None else 0.0)
                said = f"HTTP {reply.status}"
            if time.monotonic() + pause_s >= until:
                raise FacilityUnreachable(
                    f"{self.url} has not answered {verb} within {self._deadline_s:g} s: {said}",
                    which=self.url,
                    hint="See that its s2cs serves there; what it did is unknown, and ends by its lease",
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    def _understood(self, reply: Reply, token: str | None, path: str) -> dict[str, Any] | None:
        """The answer in a reply; None when it is one of a server in between, so that another try may bring it."""
        if reply.elsewhere is not None:
            raise FacilityUnreachable(
                f"{self.url} redirects to {without(token, reply.elsewhere)}",
                which=self.url,
                hint="Name that address, if it is the facility's",
            )
        try:
            said = without(token, json.loads(reply.content))
        except (ValueError, RecursionError):
            said = None
        if isinstance(said, dict) and "protocol" in said:
            if reply.status == 200:
                return {"ok": True, "value": said}
            if reply.status == 401 and token is None and path != "/hello":
                raise self._no_token()
            if "code" in said:
                return {"ok": False, "error": said}
        if reply.status in _NOT_OURS:
            return None
        raise FacilityUnreachable(
            f"{self.url} does not answer as a facility: HTTP {reply.status}",
            which=self.url,
            hint="Give the address of its s2cs, as its administrators publish it",
        )

    def _no_token(self) -> Unauthenticated:
        return Unauthenticated(
            f"there is no token for {self.url}",
            which=self.url,
            hint=f'Put it into a file (0600) and pin that in tokens.toml: [tokens] "{self.url}" = "/path/of/the/file"',
        )


def _request(verb: str, document: Mapping[str, Any]) -> tuple[str, str, dict[str, str], Any]:
    """Method, path, query and body for a verb's document."""
    fields = {name: value for name, value in document.items() if value is not None}
    if verb == "request":
        return "POST", "/streams", {}, fields
    if verb == "hello_by_ticket":
        return "POST", "/hello", {}, fields
    if verb == "list":
        wanted = [name for name in ("include_ended", "all_owners") if fields.get(name)]
        return "GET", "/streams", dict.fromkeys(wanted, "true"), None
    method, path = _OF_A_STREAM[verb]
    place = f"/streams/{fields.pop('uid')}/{fields.pop('role')}{path}"
    owner = fields.pop("owner", None)
    body = None if method in ("GET", "DELETE") else fields
    return method, place, {} if owner is None else {"owner": owner}, body
