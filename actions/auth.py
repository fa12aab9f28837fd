"""Who calls, and whether it may: bearer tokens of Globus Auth, or of a file while there is no Globus client.

A token is never kept: answers about it are remembered under its hash, for so long that a revocation counts within
`ACCEPTED_S`. What cannot be told is refused: when Globus Auth does not answer, nobody comes in.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import queue
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar
from uuid import UUID

from scistream_flows.config import EVERYBODY, FacilityConfig
from scistream_flows.errors import AuthUnavailable, ConfigError, MissingExtra, PolicyDenied, Unauthenticated
from scistream_flows.s2cs import unix_owner
from scistream_flows.tokens import LONGEST_TOKEN, development_token, read_secret

if TYPE_CHECKING:
    from globus_sdk import ConfidentialAppAuthClient, GlobusAPIError
    from globus_sdk.transport import RequestsTransport, RetryConfig

GROUPS_SCOPE: Final = "urn:globus:auth:scope:groups.api.globus.org:view_my_groups_and_memberships"
"""The scope of Globus Groups that the facility's own scope must depend on, where a rule names a group."""

ACCEPTED_S: Final = 30.0
"""How long a token is believed after Globus Auth has vouched for it, seconds: the bound on a revocation."""

REFUSED_S: Final = 10.0
"""How long a token that was refused is refused unasked, seconds."""

GROUPS_S: Final = 60.0
"""How long the groups of a caller are believed, seconds."""

HTTP_TIMEOUT_S: Final = 4.0
"""How long to wait for Globus, seconds: for a connection, and again for an answer."""

SECRET_VARIABLE: Final = "SCISTREAM_GLOBUS_CLIENT_SECRET"  # noqa: S105 - the name of a variable

_REMEMBERED = 4096
_CALLS_AT_ONCE = 8
_TURN_TIMEOUT_S = 5.0
_LONGEST_WAIT_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who calls.

    Attributes:
        urn: The effective identity, `urn:globus:auth:identity:UUID`, or `urn:scistream:unix:UID@HOST`.
        urns: All that count for rights: `urn` first, then linked identities, then groups where they were asked for.
        username: Such as `ada@example.org`.
        client_id: The application that the token was given to; None in development mode.
        scope: The scopes of the token, separated by blanks.
    """

    urn: str
    urns: tuple[str, ...]
    username: str | None = None
    client_id: str | None = None
    scope: str = ""


@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """What the actions of a facility ask of their callers; principals as Globus writes them.

    Attributes:
        scope: What a token must have.
        visible_to: Who may read the description of the actions, also `public`.
        runnable_by: Who may run the actions.
        administered_by: Who may see and end the actions of everybody.
        client_id: The facility's client at Globus Auth; None is development mode.
        client_secret: Its secret.
    """

    scope: str
    visible_to: tuple[str, ...] = ("public",)
    runnable_by: tuple[str, ...] = (EVERYBODY,)
    administered_by: tuple[str, ...] = ()
    client_id: str | None = None
    client_secret: str | None = field(default=None, repr=False)

    @property
    def development(self) -> bool:
        """Whether there is no Globus client: loopback only, one token, one caller."""
        return self.client_id is None

    @classmethod
    def of(cls, facility: FacilityConfig, *, environment: Mapping[str, str] | None = None) -> AuthConfig:
        """The table `[globus]` of the facility, with its secret; without that table, development mode.

        Raises:
            ConfigError: When there is a client and no secret, or its file is open to others.
        """
        globus = facility.globus
        if globus is None:
            return cls(scope=f"urn:scistream:scope:{facility.name}:action_all")
        environment = os.environ if environment is None else environment
        client_secret = environment.get(SECRET_VARIABLE)
        if not client_secret and globus.client_secret_file is not None:
            path = Path(globus.client_secret_file).expanduser()
            client_secret = read_secret(path, key="globus.client_secret_file")
        if not client_secret:
            raise ConfigError(
                f"the Globus client {globus.client_id} has no secret",
                which=facility.name,
                hint=f"Name a file that only you may read as client_secret_file, or set {SECRET_VARIABLE}",
                file=str(facility.file),
                key="globus.client_secret_file",
            )
        policy = facility.policy
        runnable_by = globus.runnable_by
        if runnable_by is None:
            runnable_by = [one for one in policy.users or [] if _of_globus(one)]
        administered_by = globus.administered_by
        if administered_by is None:
            administered_by = [one for one in policy.administrators if _of_globus(one)]
        return cls(
            scope=globus.scope or f"https://auth.globus.org/scopes/{globus.client_id}/action_all",
            visible_to=tuple(globus.visible_to),
            runnable_by=tuple(runnable_by),
            administered_by=tuple(administered_by),
            client_id=globus.client_id,
            client_secret=client_secret,
        )


class Authenticator(Protocol):
    """Proves who calls."""

    config: AuthConfig

    def identify(self, authorization: str | None, *, groups: bool = False) -> Identity:
        """Who sends the header `Authorization` with this value; None when there is no such header.

        Args:
            authorization: The value of the header.
            groups: Whether the caller's groups are wanted among its URNs. It may cost two more calls: ask when a
                rule names a group (`names_group`).

        Raises:
            Unauthenticated: No token, or none that counts here; has the `challenge` for the answer.
            PolicyDenied: A valid token without the scope of this facility, or without the right to see the groups; the
            `required_scopes` and the `challenge` for the answer are in its details.
            AuthUnavailable: It could not be told, within a bounded time.
        """
        ...

    def remembers(self, authorization: str | None) -> bool:
        """Whether `identify` would answer this header without asking anybody."""
        ...

    def close(self) -> None:
        """Close connections. It can be used no more."""
        ...


def authenticator(facility: FacilityConfig, *, environment: Mapping[str, str] | None = None) -> Authenticator:
    """The authenticator of a facility: of its Globus client, or without one, of its development token.

    Raises:
        ConfigError: When the secret, or the token's file, cannot be used.
        MissingExtra: When there is a client, but globus-sdk is not installed.
    """
    config = AuthConfig.of(facility, environment=environment)
    if config.development:
        return DevelopmentToken(facility.state_dir, config=config)
    return GlobusAuth(config)


# --- rules


def may(identity: Identity | None, principals: Iterable[str]) -> bool:
    """Whether a caller is among `principals`: `public`, `all_authenticated_users`, or URNs; None has no identity."""
    named = {one.casefold() for one in principals}
    if "public" in named:
        return True
    if identity is None:
        return False
    return EVERYBODY in named or not named.isdisjoint(one.casefold() for one in identity.urns)


def names_group(principals: Iterable[str]) -> bool:
    """Whether a rule can only be decided with the groups of the caller."""
    return any(one.casefold().startswith("urn:globus:groups:id:") for one in principals)


def admit(auth: Authenticator, authorization: str | None, principals: Collection[str]) -> Identity:
    """Who calls, if it is among `principals`. Its groups are asked for only where nothing else decides.

    Raises:
        PolicyDenied: It is not.
        Unauthenticated: As `Authenticator.identify`, also where `public` would do: an action has an owner.
        AuthUnavailable: As `Authenticator.identify`.
    """
    identity = auth.identify(authorization)
    if not may(identity, principals) and names_group(principals):
        identity = auth.identify(authorization, groups=True)
    if not may(identity, principals):
        raise PolicyDenied(
            f"{identity.username or identity.urn} is not among those who may do this",
            which=identity.urn,
            hint="Ask the facility's administrators to be added",
        )
    return identity


def loopback_hosts(port: int) -> frozenset[str]:
    """What `Host` may say at a service that listens on loopback."""
    return frozenset(f"{name}:{port}" for name in ("127.0.0.1", "[::1]", "localhost"))


def check_host(host_header: str | None, origin_header: str | None, *, allowed: Collection[str]) -> None:
    """Refuse what a page of somewhere else makes a browser send to this machine (DNS rebinding, foreign origins).

    Args:
        host_header: `Host` as it came; None when it is missing.
        origin_header: `Origin` as it came; None when it is missing, as it is from programs.
        allowed: `HOST:PORT` in lower case, such as `loopback_hosts(port)`. Compared as text, nothing is parsed.

    Raises:
        PolicyDenied: With the header that does not fit.
    """
    if (host_header or "").lower() not in allowed:
        raise PolicyDenied(
            f"this service is not {host_header!r}" if host_header else "the request has no Host header",
            which="Host",
            hint="Use one of " + ", ".join(sorted(allowed)),
        )
    if origin_header is not None and not any(
        origin_header.lower() == f"{scheme}://{one}" for scheme in ("http", "https") for one in allowed
    ):
        raise PolicyDenied(
            f"pages of {origin_header!r} may not call this service",
            which="Origin",
            hint="Call it from a program, or from a page of its own",
        )


# --- tokens


def bearer_token(authorization: str | None, *, scope: str) -> str:
    """The token of an `Authorization` header.

    Raises:
        Unauthenticated: There is none, or no bearer token.
    """
    if not authorization:
        raise _unauthenticated("a bearer token is needed", scope=scope, error=None)
    scheme, _, token = authorization.strip(" ").partition(" ")
    if scheme.lower() != "bearer":
        raise _unauthenticated("the Authorization header has no bearer token", scope=scope, error=None)
    token = token.lstrip(" ")
    if len(token) > LONGEST_TOKEN or not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise _unauthenticated("this is no token", scope=scope)
    return token


def _unauthenticated(message: str, *, scope: str, error: str | None = "invalid_token") -> Unauthenticated:
    return Unauthenticated(
        message,
        which="Authorization",
        hint=f"Send 'Authorization: Bearer TOKEN' with a token for the scope {scope}",
        challenge=_challenge(scope, error),
    )


def _without_scope(message: str, scope: str) -> PolicyDenied:
    return PolicyDenied(
        message,
        which=scope,
        hint="Log in again with this scope",
        required_scopes=[scope],
        challenge=_challenge(scope, "insufficient_scope"),
    )


def _challenge(scope: str, error: str | None) -> str:
    values = {"realm": "scistream", "scope": scope, **({"error": error} if error else {})}
    return "Bearer " + ", ".join(f'{name}="{value}"' for name, value in values.items())


class DevelopmentToken:
    """One token in a file of the facility's state directory, for the Unix user who runs it.

    Whoever can read the file is that user. Any number of processes of one facility share the token; it lasts until the
    file is removed and the service started anew.

    Raises:
        ConfigError: When the file cannot be made or read, or is open to others.
    """

    def __init__(self, state_dir: Path, *, config: AuthConfig | None = None) -> None:
        self.config = config or AuthConfig(scope=f"urn:scistream:scope:{state_dir.name}:action_all")
        self.file = self.path(state_dir)
        try:
            _make_token(self.file)
        except OSError as wrong:
            raise ConfigError(
                f"{self.file} cannot be made: {wrong.strerror}",
                which=str(self.file),
                hint="Look at the directory and its permissions, or set SCISTREAM_STATE_DIR",
                file=str(self.file),
                key="state_dir",
            ) from None
        self._hash = _hash(self.read(state_dir))

    @staticmethod
    def path(state_dir: Path) -> Path:
        """Where the token of the facility with this state directory is."""
        return development_token(state_dir)

    @classmethod
    def read(cls, state_dir: Path) -> str:
        """The token, for a client of the same user.

        Raises:
            ConfigError: When there is none, or not for this user.
        """
        return read_secret(cls.path(state_dir), key="state_dir")

    def identify(self, authorization: str | None, *, groups: bool = False) -> Identity:  # noqa: ARG002
        """The Unix user, for whom has the token. A Unix user is in no Globus group."""
        token = bearer_token(authorization, scope=self.config.scope)
        if not hmac.compare_digest(_hash(token), self._hash):
            raise _unauthenticated(f"this is not the token in {self.file}", scope=self.config.scope)
        owner = unix_owner()
        return Identity(urn=owner, urns=(owner,), scope=self.config.scope)

    def remembers(self, authorization: str | None) -> bool:  # noqa: ARG002
        """Nobody has to be asked."""
        return True

    def close(self) -> None:
        """There is nothing to close."""


def _make_token(path: Path) -> None:
    """Make the file, whole or not at all; one that is there stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        return
    draft = path.with_name(f".token-{secrets.token_hex(8)}")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(file, "w") as text:
            text.write(secrets.token_urlsafe(32) + "\n")
        # of processes that come here at once, one makes the link; the others find it made
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _of_globus(principal: str) -> bool:
    return principal == EVERYBODY or principal.startswith("urn:globus:")


# --- Globus


class _Verdict(NamedTuple):
    """What Globus Auth says of a token: an identity, or why there is none."""

    identity: Identity | None
    refusal: str
    expires_at_s: float


class _Answer(Generic[T]):
    def __init__(self) -> None:
        self.future: Future[T] = Future()
        self.until_s = float("inf")


class _Memory(Generic[T]):
    """Answers by key, each asked for once however many threads want it, and kept for its time.

    Those that are worth less are kept apart, so that a flood of them pushes none of the others out.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._mutex = threading.Lock()
        self._asked: dict[bytes, _Answer[T]] = {}
        self._kept: tuple[OrderedDict[bytes, _Answer[T]], ...] = (OrderedDict(), OrderedDict())

    def answer(self, key: bytes, ask: Callable[[], tuple[T, float]], *, worthless: Callable[[T], bool]) -> T:
        """What is known under `key`, else what `ask` answers: a value, and how long to keep it, seconds."""
        with self._mutex:
            found = self._known(key) or self._asked.get(key)
            if found is None:
                answer = self._asked[key] = _Answer[T]()
        if found is not None:
            try:
                return found.future.result(timeout=_LONGEST_WAIT_S)
            except FutureTimeoutError:
                raise AuthUnavailable("another request waits for the same answer", which="Globus") from None
        began_s = time.monotonic()
        try:
            value, keep_s = ask()
        except BaseException as wrong:
            with self._mutex:
                del self._asked[key]
            answer.future.set_exception(wrong)
            raise
        answer.until_s = began_s + keep_s
        answer.future.set_result(value)
        with self._mutex:
            del self._asked[key]
            kept = self._kept[1 if worthless(value) else 0]
            kept[key] = answer
            if len(kept) > self._size:
                kept.popitem(last=False)
        return value

    def knows(self, key: bytes) -> bool:
        """Whether there is an answer, or one is being asked for."""
        with self._mutex:
            return key in self._asked or self._known(key) is not None

    def _known(self, key: bytes) -> _Answer[T] | None:
        for kept in self._kept:
            answer = kept.get(key)
            if answer is not None and answer.until_s > time.monotonic():
                kept.move_to_end(key)
                return answer
            kept.pop(key, None)
        return None


class GlobusAuth:
    """Tokens of Globus Auth, by introspection. Any number of threads may use it.

    Args:
        config: With the client and its secret.
        accepted_s: How long to believe a good token, seconds; never beyond its own end.
        refused_s: How long to refuse a bad one unasked, seconds.
        groups_s: How long to believe the groups of a caller, seconds.
        http_timeout_s: How long to wait for a connection, and again for an answer, seconds. Each call is tried twice.

    Raises:
        MissingExtra: When globus-sdk is not installed.
    """

    def __init__(
        self,
        config: AuthConfig,
        *,
        accepted_s: float = ACCEPTED_S,
        refused_s: float = REFUSED_S,
        groups_s: float = GROUPS_S,
        http_timeout_s: float = HTTP_TIMEOUT_S,
    ) -> None:
        if config.client_id is None or config.client_secret is None:
            raise ConfigError("there is no Globus client", which="globus", key="globus.client_id")
        try:
            from globus_sdk.transport import RequestsTransport
        except ImportError:
            raise MissingExtra(
                "globus-sdk is not installed",
                which="globus-sdk",
                hint="pip install 'scistream-flows[server]'",
            ) from None
        self.config = config
        self._accepted_s, self._refused_s, self._groups_s = accepted_s, refused_s, groups_s
        # a token is for us when it is for our client, or for the name that owns our scope
        self._audience = {config.client_id, *re.findall(r"/scopes/([^/]+)/", config.scope)}
        self._verdicts = _Memory[_Verdict](_REMEMBERED)
        self._groups = _Memory[tuple[str, ...] | None](_REMEMBERED)
        # The SDK's clients and sessions are not promised to be thread-safe: each call has one for itself.
        self._transports: queue.LifoQueue[RequestsTransport] = queue.LifoQueue()
        for _ in range(_CALLS_AT_ONCE):
            self._transports.put(RequestsTransport(http_timeout=http_timeout_s))

    def identify(self, authorization: str | None, *, groups: bool = False) -> Identity:
        """Who has this token; see `Authenticator.identify`."""
        token = bearer_token(authorization, scope=self.config.scope)
        key = _hash(token)
        verdict = self._verdicts.answer(
            key, lambda: self._introspect(token), worthless=lambda one: one.identity is None
        )
        if verdict.identity is None:
            raise _unauthenticated(verdict.refusal, scope=self.config.scope)
        if not verdict.expires_at_s > time.time():  # so that a NaN has expired
            raise _unauthenticated("the token has expired", scope=self.config.scope)
        identity = verdict.identity
        if self.config.scope not in identity.scope.split():
            raise _without_scope("the token does not have the scope of this facility", self.config.scope)
        if not groups:
            return identity
        found = self._groups.answer(key, lambda: self._ask_groups(token), worthless=lambda one: not one)
        if found is None:
            raise _without_scope(
                "the token does not let this facility see the caller's groups, which a rule here asks for",
                f"{self.config.scope}[{GROUPS_SCOPE}]",
            )
        return replace(identity, urns=(*identity.urns, *found))

    def remembers(self, authorization: str | None) -> bool:
        """Whether this token was asked about lately, or is none at first sight."""
        try:
            return self._verdicts.knows(_hash(bearer_token(authorization, scope=self.config.scope)))
        except Unauthenticated:
            return True

    def close(self) -> None:
        """Close the connections to Globus that nobody uses at this moment."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._transports.get_nowait().close()

    def _introspect(self, token: str) -> tuple[_Verdict, float]:
        with self._client() as client:
            answer = client.oauth2_token_introspect(token, include="identity_set").data
        verdict = _verdict(answer, self._audience)
        if verdict.identity is None:
            return verdict, self._refused_s
        return verdict, min(self._accepted_s, verdict.expires_at_s - time.time())

    def _ask_groups(self, token: str) -> tuple[tuple[str, ...] | None, float]:
        from globus_sdk import AccessTokenAuthorizer, AuthAPIError, GroupsClient

        with self._client() as client:
            try:
                granted = client.oauth2_get_dependent_tokens(token, scope=GROUPS_SCOPE).by_scopes
            except AuthAPIError as wrong:
                if wrong.http_status not in (400, 403):
                    raise
                return None, self._refused_s
            except (KeyError, TypeError):
                raise AuthUnavailable(_STRANGER, which="Globus") from None
            if GROUPS_SCOPE not in granted:
                return None, self._refused_s
            groups = GroupsClient(
                authorizer=AccessTokenAuthorizer(str(granted[GROUPS_SCOPE]["access_token"])),
                transport=client.transport,
                retry_config=_bounded(),
            )
            return _active_groups(groups.get_my_groups(statuses="active").data), self._groups_s

    @contextlib.contextmanager
    def _client(self) -> Iterator[ConfidentialAppAuthClient]:
        """A client for one thread and a moment; what goes wrong with it becomes an error of ours."""
        import globus_sdk

        try:
            transport = self._transports.get(timeout=_TURN_TIMEOUT_S)
        except queue.Empty:
            raise AuthUnavailable(
                f"Globus Auth is slow: {_CALLS_AT_ONCE} requests wait for its answer",
                which="Globus",
                hint=_LATER,
            ) from None
        try:
            yield globus_sdk.ConfidentialAppAuthClient(
                self.config.client_id or "",
                self.config.client_secret or "",
                transport=transport,
                retry_config=_bounded(),
            )
        except globus_sdk.GlobusAPIError as wrong:
            raise _api_error(wrong) from None
        except globus_sdk.GlobusError as wrong:
            # its own words may name the request, and that has the token
            raise AuthUnavailable(
                f"Globus did not answer ({type(wrong).__name__})", which="Globus", hint=_LATER
            ) from None
        finally:
            self._transports.put(transport)


_LATER = "Try again in a moment; if it lasts, the facility's way out to auth.globus.org is cut"
_STRANGER = "what answers as Globus Auth does not speak its language"


def _bounded() -> RetryConfig:
    """Once more, and soon: a request waits for this."""
    from globus_sdk.transport import RetryConfig

    return RetryConfig(max_retries=1, max_sleep=1)


def _verdict(answer: Any, audience: set[str]) -> _Verdict:
    """What an introspection document says; one that says nothing sure is no answer."""
    if not isinstance(answer, dict) or not isinstance(answer.get("active"), bool):
        raise AuthUnavailable(_STRANGER, which="Globus")
    if not answer["active"]:
        return _Verdict(None, "the token is expired, revoked, or not for this facility", 0)
    try:
        urn = _identity_urn(answer["sub"])
        linked = [_identity_urn(one) for one in answer.get("identity_set") or ()]
        expires_at_s = float(answer["exp"])
        scope = str(answer["scope"])
        named = answer.get("aud") or []
        for_us = not audience.isdisjoint([named] if isinstance(named, str) else named)
    except (KeyError, OverflowError, TypeError, ValueError):
        raise AuthUnavailable("Globus Auth answered an incomplete identity", which="Globus") from None
    if not for_us:
        return _Verdict(None, "the token is not for this facility", 0)
    username, client_id = answer.get("username"), answer.get("client_id")
    identity = Identity(
        urn=urn,
        urns=tuple(dict.fromkeys((urn, *linked))),
        username=username if isinstance(username, str) else None,
        client_id=client_id if isinstance(client_id, str) else None,
        scope=scope,
    )
    return _Verdict(identity, "", expires_at_s)


def _identity_urn(value: Any) -> str:
    return f"urn:globus:auth:identity:{UUID(str(value))}"


def _active_groups(answer: Any) -> tuple[str, ...]:
    """The groups of which the caller is a member: invited, pending and removed ones are not."""
    try:
        return tuple(
            f"urn:globus:groups:id:{UUID(str(group['id']))}"
            for group in answer
            if any(one["status"] == "active" for one in group["my_memberships"])
        )
    except (KeyError, TypeError, ValueError):
        raise AuthUnavailable("Globus Groups answered an incomplete list", which="Globus") from None


def _api_error(wrong: GlobusAPIError) -> AuthUnavailable:
    if wrong.http_status == 401:
        return AuthUnavailable(
            "Globus does not know this facility's client, or its secret",
            which="globus.client_id",
            hint="The facility's administrators have to look at [globus] in its configuration",
        )
    return AuthUnavailable(f"Globus answered {wrong.http_status}", which="Globus", hint=_LATER)
