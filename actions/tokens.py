"""Which token goes to which action provider. The address decides, never what a definition or a provider says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from scistream_flows.config import load_facility
from scistream_flows.errors import BadRequest, ConfigError
from scistream_flows.models import ip_of

from .auth import DevelopmentToken, read_secret

_INTROSPECTION_TIMEOUT_S: Final = 30  # one that is just starting answers when it has started


class _Place(NamedTuple):
    """A URL as far as it says to whom a request goes."""

    scheme: str
    host: str
    port: int
    path: tuple[str, ...]

    @classmethod
    def of(cls, url: str) -> _Place:
        """Raises ValueError for a URL that is none, and for one that programs read in more than one way."""
        parts = urlsplit(url)
        steps = re.split(r"[/\\]", unquote(parts.path))
        if re.search(r"[^!-~]|\\", url) or "@" in parts.netloc or "." in steps or ".." in steps:
            raise ValueError("another program may take it for another place")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        return cls(
            parts.scheme,
            (parts.hostname or "").lower(),
            port,
            tuple(one for one in parts.path.split("/") if one),
        )

    def begins(self, other: _Place) -> bool:
        """Whether `other` is this place or below it."""
        return self[:3] == other[:3] and other.path[: len(self.path)] == self.path


class Tokens:
    """Which token goes to which action provider: those pinned, and those of the caller's own development facilities.

    Args:
        pins: Each `URL=FILE`: the file has the token for addresses below the URL.
        tell: Takes words for people: why there is no token for an address.

    Raises:
        BadRequest: For a pin that is none.
        ConfigError: For a file that others may read.
    """

    def __init__(self, pins: Sequence[str], *, tell: Callable[[str], object] = lambda words: None) -> None:  # noqa: ARG005
        self._pins = dict(_pin(text) for text in pins)
        self._tell = tell
        self._told: set[str] = set()
        self._state_dirs: dict[tuple[str, str, int], Path] = {}
        for file in self._pins.values():
            _read_token(file)

    def __call__(self, address: str) -> str | None:
        """The token for the action provider at `address`; None when there is none for it."""
        try:
            place = _Place.of(address)
        except ValueError:
            return None
        pinned = [one for one in self._pins if one.begins(place)]
        if pinned:
            return _read_token(self._pins[max(pinned, key=lambda one: len(one.path))])
        return self._of_development(address, place)

    def _of_development(self, address: str, place: _Place) -> str | None:
        """The token of a development facility that the same user runs on this machine."""
        host = ip_of(place.host) if place.host != "localhost" else ip_of("127.0.0.1")
        if host is None or not host.is_loopback:
            return None
        listening = _listening_users(place.port)
        if listening != {os.geteuid()}:
            # whoever else listens there could say that he is our facility, to get our token
            if not listening:
                return None
            self._once(f"no token is sent to {place.host}:{place.port}: its program is not run by this user")
            return None
        state_dir = self._state_dirs.get(place[:3]) or _state_dir_of(address)
        if state_dir is None:
            self._once(
                f"no token for {place.host}:{place.port}: it is no development facility; pin one with --token"
            )
            return None
        self._state_dirs[place[:3]] = state_dir
        return DevelopmentToken.read(state_dir)

    def _once(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            self._tell(words)


def _pin(text: str) -> tuple[_Place, Path]:
    url, separator, file = text.rpartition("=")
    try:
        place = _Place.of(url)
    except ValueError:
        place = _Place("", "", 0, ())
    if not separator or not file or place.scheme not in ("http", "https") or not place.host:
        raise BadRequest(
            f"--token {text!r} is not URL=FILE",
            which="token",
            hint="Such as https://scistream.example.org=token.txt",
        )
    return place, Path(file)


def _read_token(file: Path) -> str:
    return read_secret(file, key="--token")


def _state_dir_of(address: str) -> Path | None:
    """The state directory of the development facility that serves `address`, by what it says of itself."""
    import requests

    try:
        with requests.Session() as session:
            session.trust_env = False
            answer = session.get(address, timeout=_INTROSPECTION_TIMEOUT_S, allow_redirects=False)
        scope = answer.json()["globus_auth_scope"]
        name = str(scope).removeprefix("urn:scistream:scope:").removesuffix(":action_all")
        return load_facility(name).state_dir if scope == f"urn:scistream:scope:{name}:action_all" else None
    except (requests.RequestException, ValueError, KeyError, TypeError, ConfigError):
        return None


def _listening_users(port: int) -> set[int]:
    """The users whose sockets listen at a local port."""
    users = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for fields in (line.split() for line in Path(table).read_text().splitlines()[1:]):
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    users.add(int(fields[7]))
    return users
