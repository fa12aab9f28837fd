"""The user's login at Globus: for which facility, at which address, which token.

At login a scope is pinned to the facility's address, and its token goes to that address only. Tokens are renewed by
refresh tokens; both are kept in a file that only the user may read, and are never shown unless that is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scistream_flows.cli.console import plain, say
from scistream_flows.cli.ledger import user_directory
from scistream_flows.errors import (
    AuthUnavailable,
    BadRequest,
    ConfigError,
    FacilityUnreachable,
    MissingExtra,
    Unauthenticated,
)
from scistream_flows.rest import base_url
from scistream_flows.web import NoAnswer, ask, new_session

if TYPE_CHECKING:
    from globus_sdk import UserApp
    from globus_sdk.authorizers import GlobusAuthorizer

CLIENT_VARIABLE: Final = "SCISTREAM_FLOWS_CLIENT_ID"
SCOPE_SUFFIX: Final = "action_all"
_APP_NAME: Final = "scistream-flows s2uc"
_UUID: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_ANSWER_TIMEOUT_S: Final = 15.0
_RETRIES: Final = 1
_LONGEST_PAUSE_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A scope pinned to an address, and the application of Globus by which the user logged in for it."""

    scope: str
    client_id: str


class Logins:
    """The logins of one user."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = (folder or user_directory()) / "login"
        self._authorizers: dict[str, GlobusAuthorizer] = {}

    def pins(self) -> Mapping[str, Pin]:
        """The pins, from the address of a facility's service.

        Raises:
            ConfigError: When their file cannot be read.
        """
        try:
            known = json.loads(self._pins.read_text(encoding="utf-8"))
            return {url: Pin(**pin) for url, pin in known["pins"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{self._pins} cannot be read as the logins of s2uc",
                which=str(self._pins),
                hint="s2uc logout removes it; then log in again",
                file=str(self._pins),
            ) from None

    def pin(self, address: str, scope: str | None = None) -> Pin | None:
        """The pin of an address; None when there is none.

        Raises:
            Unauthenticated: When another scope than `scope` is pinned to it.
        """
        pin = self.pins().get(base_url(address))
        if pin is not None and scope and whole_scope(scope) != pin.scope:
            raise Unauthenticated(
                f"the scope of {address} is {pin.scope} since the login, not {whole_scope(scope)}",
                which=address,
                hint="If the facility has really changed it: s2uc logout, then s2uc login",
            )
        return pin

    def log_in(
        self,
        address: str,
        *,
        scope: str | None,
        client_id: str | None,
        prompt: Callable[[], str],
        ca_file: str | None = None,
    ) -> bool:
        """Log in for the facility at an address; False when the user is already.

        Args:
            address: Of its service.
            scope: Its scope; by default the one that it tells itself.
            client_id: The application of Globus to log in with.
            prompt: Asks for the code that Globus shows.
            ca_file: Certificates to verify the facility with, PEM.

        Raises:
            Unauthenticated: Globus refused, or the scope is not the pinned one, or what the facility tells is pinned to
                another address.
            MissingExtra, BadRequest, FacilityUnreachable, AuthUnavailable: Why it was not possible.
        """
        url = base_url(address)
        known = self.pin(address, scope)
        told = None if scope else scope_told_by(address, ca_file=ca_file)
        if known is not None and told is not None and told != known.scope:
            self.pin(address, told)
        wanted = whole_scope(scope) if scope else told or ""
        owner = next(
            (one for one, pin in self.pins().items() if one != url and _same_client(pin.scope, told)), None
        )
        if owner is not None:
            # whoever names a scope of another facility's client would be sent the tokens for that one
            raise Unauthenticated(
                f"{address} names a scope of {owner}, to which it is pinned",
                which=address,
                hint=f"If it is the same facility, say so: --scope {told}",
            )
        client_id = client_id or (known.client_id if known else None)
        if client_id is None:
            raise BadRequest(
                "a login needs an application at Globus",
                which="client_id",
                hint="Register one (app.globus.org, Settings, Developers: a native application), and give its UUID with"
                f" --client-id or ${CLIENT_VARIABLE}; your facility may publish one",
            )
        self._folder.mkdir(mode=0o700, exist_ok=True)
        pin = Pin(scope=wanted, client_id=client_id)
        app = self._app(pin, prompt=prompt)
        with self._asking_globus():
            if known is not None and not app.login_required():
                return False
            app.login()
        with self._alone():
            self._write({**self.pins(), url: pin})
        return True

    def token(self, address: str, scope: str | None = None) -> str | None:
        """The token for an address, renewed where necessary; None when the user is not logged in for it.

        Raises:
            Unauthenticated: The login does not count any more, or was for another scope.
            AuthUnavailable: Globus did not answer.
        """
        pin = self.pin(address, scope)
        if pin is None:
            return None
        with self._alone(), self._asking_globus():
            if pin.scope not in self._authorizers:
                self._authorizers[pin.scope] = self._app(pin).get_authorizer(_resource_server(pin.scope))
            header = self._authorizers[pin.scope].get_authorization_header()
        return (header or "").removeprefix("Bearer ") or None

    def log_out(self) -> list[str]:
        """Revoke and forget every token; answers the addresses. When Globus cannot be told, they are forgotten."""
        pins: Mapping[str, Pin] = {}
        with contextlib.suppress(ConfigError):
            pins = self.pins()
        for client_id in {pin.client_id for pin in pins.values()}:
            one = next(pin for pin in pins.values() if pin.client_id == client_id)
            try:
                with self._asking_globus():
                    self._app(one).logout(sweep=True)
            except (AuthUnavailable, ConfigError, Unauthenticated, MissingExtra) as wrong:
                say(f"Globus was not told, so the tokens expire by themselves: {plain(wrong.message)}")
        for file in (self._pins, self._tokens):
            file.unlink(missing_ok=True)
        return list(pins)

    @property
    def _pins(self) -> Path:
        return self._folder / "pins.json"

    @property
    def _tokens(self) -> Path:
        return self._folder / "tokens.json"

    def _write(self, pins: Mapping[str, Pin]) -> None:
        new = self._pins.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as out:
            json.dump({"protocol": 1, "pins": {url: asdict(pin) for url, pin in pins.items()}}, out)
        new.replace(self._pins)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two commands that read and write what is kept wait for each other: the SDK writes its file in place."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _asking_globus(self) -> Iterator[None]:
        """Turn what globus_sdk raises into our errors."""
        try:
            from globus_sdk import GlobusAPIError, GlobusError, NetworkError
        except ImportError:
            yield  # whoever asks says what is missing
            return
        try:
            yield
        except NetworkError as wrong:
            raise AuthUnavailable(
                f"Globus Auth does not answer: {_first_line(wrong)}",
                which="Globus Auth",
                hint="Try again later",
            ) from None
        except GlobusAPIError as wrong:
            refused = 400 <= wrong.http_status < 500
            said = "; ".join(wrong.messages) or wrong.text[:200] or str(wrong.http_status)
            kind: Any = Unauthenticated if refused else AuthUnavailable
            hint = "s2uc logout, then s2uc login" if refused else "Try again later"
            raise kind(f"Globus Auth: {said}", which="Globus Auth", hint=hint) from None
        except GlobusError as wrong:
            raise Unauthenticated(
                f"the login at Globus does not count: {_first_line(wrong)}",
                which="Globus Auth",
                hint="s2uc logout, then s2uc login",
            ) from None
        except ValueError as wrong:
            raise ConfigError(
                f"{self._tokens} cannot be read as the tokens of s2uc: {_first_line(wrong)}",
                which=str(self._tokens),
                hint="s2uc logout removes it; then log in again",
                file=str(self._tokens),
            ) from None

    def _app(self, pin: Pin, *, prompt: Callable[[], str] | None = None) -> UserApp:
        try:
            import globus_sdk
            from globus_sdk.login_flows import CommandLineLoginFlowManager
            from globus_sdk.token_storage import JSONTokenStorage
            from globus_sdk.transport import RetryConfig
        except ImportError:
            raise MissingExtra(
                "a login at Globus needs globus-sdk",
                which="globus-sdk",
                hint="pip install 'scistream-flows[login]'",
            ) from None

        class Login(CommandLineLoginFlowManager):
            """The login of the SDK, with SciStream's words on stderr: stdout is data."""

            def print_authorize_url(self, authorize_url: str) -> None:
                rule = "-" * 60
                say(
                    "To obtain token for the scope, please open the URL in your browser and follow the instructions"
                )
                say(f"{rule}\n{authorize_url}\n{rule}")

            def prompt_for_code(self) -> str:
                if prompt is None:
                    raise Unauthenticated("the login does not count any more", hint="s2uc login")
                return prompt()

        config = globus_sdk.GlobusAppConfig(
            login_flow_manager=Login,
            token_storage=JSONTokenStorage(self._tokens),
            request_refresh_tokens=True,
            # only a login asks the user
            token_validation_error_handler=None,
        )
        requirements = {_resource_server(pin.scope): [pin.scope]}
        client = globus_sdk.NativeAppAuthClient(
            client_id=pin.client_id,
            app_name=_APP_NAME,
            retry_config=RetryConfig(max_retries=_RETRIES, max_sleep=_LONGEST_PAUSE_S),
        )
        return globus_sdk.UserApp(
            _APP_NAME, login_client=client, scope_requirements=requirements, config=config
        )


def whole_scope(scope: str) -> str:
    """The scope that a word means: itself, or for the UUID of a facility's client the one of its actions.

    Raises:
        BadRequest: When it is neither.
    """
    if re.fullmatch(_UUID, scope.lower()):
        return f"https://auth.globus.org/scopes/{scope.lower()}/{SCOPE_SUFFIX}"
    _resource_server(scope)
    return scope


def scope_told_by(address: str, *, ca_file: str | None = None) -> str:
    """The scope that the facility at an address names.

    Raises:
        FacilityUnreachable: When none is there.
        BadRequest: When it is a development facility, which takes no login.
    """
    url = base_url(address)
    with contextlib.closing(new_session()) as session:
        try:
            reply = ask(
                session,
                "GET",
                f"{url}/actions/status/",
                token=None,
                answer_timeout_s=_ANSWER_TIMEOUT_S,
                ca_file=ca_file,
            )
            scope = json.loads(reply.content)["globus_auth_scope"]
        except (NoAnswer, ValueError, KeyError, TypeError, RecursionError) as wrong:
            raise FacilityUnreachable(
                f"{url} does not say what its scope is"
                + (f": {wrong}" if isinstance(wrong, NoAnswer) else ""),
                which=url,
                hint="See that its s2cs serves there, or give the scope that its administrators publish: --scope",
            ) from None
    if str(scope).startswith("urn:scistream:scope:"):
        raise BadRequest(
            f"{url} is a development facility: it takes no login, and its token is found by itself",
            which=url,
            hint="Nothing to do; use it as the same user",
        )
    return whole_scope(str(scope))


def masked(token: str) -> str:
    """A token as it may be shown: that there is one, and how it ends."""
    return f"{'*' * 12}{token[-4:]}" if len(token) >= 16 else "*" * 12


def ask_for_code() -> str:
    """The code that Globus has shown, from the terminal or a pipe.

    Raises:
        Unauthenticated: When there is no more input.
    """
    sys.stderr.write("Enter the resulting Authorization Code here: ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line.strip():
        raise Unauthenticated("no code was entered", which="login", hint="Run s2uc login again")
    return line.strip()


def _same_client(scope: str, told: str | None) -> bool:
    """Whether both are scopes of one client: the SDK keeps one token for all of these."""
    return told is not None and _resource_server(scope) == _resource_server(told)


def _resource_server(scope: str) -> str:
    match = re.fullmatch(rf"https://auth\.globus\.org/scopes/({_UUID})/[A-Za-z0-9_]+", scope)
    if match is None:
        raise BadRequest(
            f"{scope!r} is no scope of a facility",
            which="scope",
            hint="It is the UUID of the facility's client, or https://auth.globus.org/scopes/UUID/action_all",
        )
    return match[1]


def _first_line(wrong: Exception) -> str:
    return (str(wrong).splitlines() or [type(wrong).__name__])[0][:200]
