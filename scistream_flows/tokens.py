"""Which token goes to which address. The address decides, never what a definition or a server says.

Pins come from `tokens.toml`, beside a user's facility files: its table `[tokens]` leads from a URL to a file that only
the user may read, and that has the token for addresses below the URL. Of the user's own development facilities, the
tokens are found by themselves.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from scistream_flows.config import config_folders, load_facility, read_toml
from scistream_flows.errors import BadRequest, ConfigError
from scistream_flows.models import ip_of

LONGEST_TOKEN: Final = 2048
"""Characters of a bearer token, at most. Those of Globus have fewer than a hundred."""

PINS: Final = "tokens.toml"

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
    """Which token goes to which address: those pinned, and those of the caller's own development facilities.

    Args:
        pins: Each `URL=FILE`: the file has the token for addresses below the URL. They come before those of
            `tokens.toml`.
        tell: Takes words for people: why there is no token for an address.
        environment: By default that of the process.

    Raises:
        BadRequest: For a pin that is none.
        ConfigError: For a file that others may read, or a `tokens.toml` that others may write.
    """

    def __init__(
        self,
        pins: Sequence[str] = (),
        *,
        tell: Callable[[str], object] = lambda words: None,  # noqa: ARG005 - the parameter's name is the documentation
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._pins = _user_pins(os.environ if environment is None else environment)
        self._pins |= dict(_pin(text) for text in pins)
        self._tell = tell
        self._told: set[str] = set()
        self._state_dirs: dict[tuple[str, str, int], Path] = {}
        for text in pins:
            _read_token(_pin(text)[1])

    def __call__(self, address: str) -> str | None:
        """The token for `address`; None when there is none for it."""
        try:
            place = _Place.of(address)
        except ValueError:
            return None
        pinned = [one for one in self._pins if one.begins(place)]
        if pinned:
            return _read_token(self._pins[max(pinned, key=lambda one: len(one.path))])
        return self._of_development(place)

    def _of_development(self, place: _Place) -> str | None:
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
        state_dir = self._state_dirs.get(place[:3]) or _state_dir_of(place)
        if state_dir is None:
            self._once(
                f"no token for {place.host}:{place.port}: it is no development facility; pin one in tokens.toml"
            )
            return None
        self._state_dirs[place[:3]] = state_dir
        return read_secret(development_token(state_dir), key="state_dir")

    def _once(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            self._tell(words)


def _pin(text: str) -> tuple[_Place, Path]:
    url, separator, file = text.rpartition("=")
    place = _place(url)
    if not separator or not file or place is None:
        raise BadRequest(
            f"--token {text!r} is not URL=FILE",
            which="token",
            hint="Such as https://scistream.example.org=token.txt",
        )
    return place, Path(file)


def _place(url: str) -> _Place | None:
    """The place of a pin; None for what is none."""
    with suppress(ValueError):
        place = _Place.of(url)
        if place.scheme in ("http", "https") and place.host:
            return place
    return None


def _user_pins(environment: Mapping[str, str]) -> dict[_Place, Path]:
    """The pins of the first `tokens.toml` there is."""
    path = next((one / PINS for one in config_folders(environment) if (one / PINS).exists()), None)
    if path is None:
        return {}

    def wrong(what: str, hint: str, key: str = "tokens") -> ConfigError:
        return ConfigError(f"{path}: {what}", which=str(path), hint=hint, file=str(path), key=key)

    about = path.stat()
    if about.st_uid not in (os.geteuid(), 0) or about.st_mode & 0o022:
        # whoever can write here has our tokens sent to where he likes
        raise wrong("others may write it", f"chown it to this user; chmod go-w {path}")
    tables = read_toml(path)
    tokens = tables.pop("tokens", None)
    if tables or not isinstance(tokens, dict):
        unknown = next(iter(tables), "")
        raise wrong("it has one table, [tokens]", "From a URL to a file with the token for it", unknown)
    pins = {}
    for url, file in tokens.items():
        place = _place(url)
        if place is None or not isinstance(file, str) or not file.startswith(("/", "~/")):
            raise wrong(
                f"{url!r} = {file!r} is no pin",
                'Such as "https://scistream.example.org" = "~/.config/scistream/example.token"',
                f"tokens.{url}",
            )
        pins[place] = Path(file).expanduser()
    return pins


def _read_token(file: Path) -> str:
    return read_secret(file, key="tokens")


def read_secret(path: Path, *, key: str) -> str:
    """The one line of a file that nobody else may read.

    Raises:
        ConfigError: When it cannot be read, is empty, or is open to others. What it holds is in no message.
    """

    def unusable(what: str, hint: str) -> ConfigError:
        return ConfigError(f"{path} {what}", which=str(path), hint=hint, file=str(path), key=key)

    try:
        # not blocking: a FIFO at this place is refused, not waited for
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise unusable("is not a file", "Give a file with the secret in it")
            if about.st_uid not in (os.geteuid(), 0) or about.st_mode & 0o077:
                raise unusable("is not a file of this user alone", f"chown it to this user; chmod 600 {path}")
            content = file.read(LONGEST_TOKEN + 1)
    except OSError as wrong:
        raise unusable(f"cannot be read: {wrong.strerror}", "Look at the file and its folder") from None
    secret = content.decode("ascii", errors="replace").strip()
    if not secret or len(content) > LONGEST_TOKEN or not secret.isprintable() or not secret.isascii():
        raise unusable("does not hold one line of text", "Put the secret in it, and nothing else")
    return secret


def development_token(state_dir: Path) -> Path:
    """Where the token of the development facility with this state directory is."""
    return state_dir / "token"


def _state_dir_of(place: _Place) -> Path | None:
    """The state directory of the development facility that serves at `place`, by what it says of itself."""
    import requests

    host = f"[{place.host}]" if ":" in place.host else place.host
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy is asked
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            answer = session.get(
                f"{place.scheme}://{host}:{place.port}/actions/status/",
                timeout=_INTROSPECTION_TIMEOUT_S,
                allow_redirects=False,
            )
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
