"""From the words of a command line to a facility, with the token that goes there."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from scistream_flows.cli.console import say
from scistream_flows.cli.ledger import Place
from scistream_flows.cli.login import Logins
from scistream_flows.errors import BadRequest, ConfigError, FacilityUnreachable, Unauthenticated
from scistream_flows.facility import Facility, RestFacility, connect_facility
from scistream_flows.rest import base_url
from scistream_flows.tokens import Tokens
from scistream_flows.web import is_here

DEFAULT_CERTIFICATE: Final = "server.crt"
COMES_UP_WITHIN_S: Final = 3.0


def place(address: str, *, scope: str = "", server_cert: str | None = None) -> Place:
    """What `--s2cs`, `--scope` and `--server_cert` name.

    Args:
        address: `HOST:PORT`, `https://…`, `local:NAME` or `compute:UUID`.
        scope: Empty for the one of the login.
        server_cert: The file of certificates to trust; None takes `server.crt` where there is one.

    Raises:
        ConfigError: When the file is not there.
    """
    if server_cert is not None and not Path(server_cert).is_file():
        raise ConfigError(
            f"there is no certificate {server_cert}",
            which=server_cert,
            hint="Leave --server_cert out to use the system's certificates",
            file=server_cert,
        )
    if server_cert is None and Path(DEFAULT_CERTIFICATE).is_file():
        server_cert = DEFAULT_CERTIFICATE
    certificate = None if server_cert is None else str(Path(server_cert).resolve())
    return Place(address=address, scope=scope or None, server_cert=certificate)


def _check_certificate(file: str) -> None:
    try:
        ssl.create_default_context(cafile=file)
    except (OSError, ssl.SSLError) as wrong:
        raise ConfigError(
            f"{file} has no certificates that could be trusted: {wrong}",
            which=file,
            hint=f"Give another with --server_cert; {DEFAULT_CERTIFICATE} of this folder is taken where none is given",
            file=file,
        ) from None


def connect(where: Place) -> Facility:
    """The facility at a place.

    Raises:
        BadRequest, ConfigError: When the place is none, or what is configured for it is wrong.
        Unauthenticated: When another scope is pinned to it.
        FacilityUnreachable: When it is on this machine and nobody listens there.
    """
    if re.match(r"(local|compute):", where.address):
        return connect_facility(where.address)
    if not re.fullmatch(r"https?://.+|[^/]+:[0-9]+", where.address):
        return connect_facility(where.address)  # says what an address is
    url = base_url(where.address)
    if where.server_cert is not None and url.startswith("https:"):
        _check_certificate(where.server_cert)
    logins = Logins()
    logins.pin(where.address, where.scope)
    said: list[str] = []
    tokens = Tokens(tell=said.append)

    def authorizer(asked: str) -> str | None:
        token = logins.token(where.address, where.scope) or tokens(asked)
        if token is None:
            while said:  # once: it is asked for again at each try
                say(said.pop(0))
            if where.scope:
                raise Unauthenticated(
                    f"no login has pinned the scope {where.scope} to it",
                    which=where.address,
                    hint=f"s2uc login --scope {where.scope} --s2cs {where.address}",
                )
        return token

    _await_listener(url)
    return RestFacility(url, authorizer=authorizer, ca_file=where.server_cert)


def addresses_in(text: str, ports: str, *, at_most: int) -> Sequence[str]:
    """`host:port` for each of the ports, the first `at_most` of them.

    Raises:
        BadRequest: When the ports are none.
    """
    words = [one.strip() for one in ports.split(",") if one.strip()]
    if not words or not all(re.fullmatch(r"[0-9]{1,5}", one) and 0 < int(one) < 65_536 for one in words):
        raise BadRequest(
            f"receiver_ports: {ports!r} are not ports", which="receiver_ports", hint="Such as 5074,5075,5076"
        )
    host = f"[{text}]" if ":" in text and not text.startswith("[") else text
    return [f"{host}:{port}" for port in words[:at_most]]


def _await_listener(url: str) -> None:
    """On this machine, a port where nobody listens is no server that is slow: it is given a moment to come up."""
    parts = urlsplit(url)
    if not is_here(url) or parts.hostname is None or parts.port is None:
        return
    deadline = time.monotonic() + COMES_UP_WITHIN_S
    while _is_refused(parts.hostname, parts.port):
        if time.monotonic() >= deadline:
            raise FacilityUnreachable(
                f"nobody serves at {url}",
                which=url,
                hint="Start a facility there (`s2cs`), or name another one with --s2cs",
            )
        time.sleep(0.1)


def _is_refused(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=COMES_UP_WITHIN_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # whatever else it is, the verb will say
        return False
    return False
