"""Globus, from the command line: put a flow there, and register a facility as a resource server.

Tokens are kept by globus_sdk in its own storage, a file that only the user may read; nothing here stores one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO
from urllib.parse import urlsplit

from scistream_flows.errors import (
    AuthUnavailable,
    BadRequest,
    Conflict,
    FacilityUnreachable,
    MissingExtra,
    NotFound,
    PolicyDenied,
    ScistreamError,
    Unauthenticated,
)
from scistream_flows.models import ip_of
from scistream_flows.tokens import read_secret

from .render import FlowDocument, validate

if TYPE_CHECKING:
    from globus_sdk import AuthClient, FlowsClient, GlobusApp

log = logging.getLogger(__name__)

APP_NAME: Final = "scistream-flows"
SCOPE_SUFFIX: Final = "action_all"
GROUPS_SCOPE_ID: Final = "73320ffe-4cb4-4b25-a0a3-83d53d59ce4f"
"""Of Globus Groups, `view_my_groups_and_memberships`: what a facility needs to tell of which groups its callers are."""

_RETRIES: Final = 2
_LONGEST_PAUSE_S: Final = 5
_REFUSALS: Final[dict[int, type[ScistreamError]]] = {
    400: BadRequest,
    401: Unauthenticated,
    403: PolicyDenied,
    404: NotFound,
    409: Conflict,
    422: BadRequest,
}


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A flow at Globus; `created` is False for one that was there and has been updated."""

    flow_id: str
    title: str
    url: str
    scope: str
    created: bool

    def to_document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A facility's client at Globus Auth. Its secret is in `secret_file` and nowhere else."""

    project_id: str
    client_id: str
    scope: str
    secret_file: str

    def to_document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @property
    def table(self) -> str:
        """The lines for the facility's configuration."""
        return f'[globus]\nclient_id = "{self.client_id}"\nclient_secret_file = "{self.secret_file}"\n'


def deploy(
    flow: FlowDocument,
    *,
    client: FlowsClient,
    flow_id: str | None = None,
    viewers: Sequence[str] = (),
    starters: Sequence[str] = (),
    administrators: Sequence[str] = (),
    subscription_id: str | None = None,
) -> Deployed:
    """Create a flow at Globus Flows, or update the one that is `flow_id`.

    Globus validates it first. Globus asks each action provider for its scope when a flow is created: the facilities'
    services must run, and be reachable from Globus.

    Args:
        flow: What `render` answers.
        client: A client of Globus Flows; `flows_client` makes one.
        flow_id: The flow to update.
        viewers: Who may see it: URNs, or `public`. With none, on an update, they stay as they are.
        starters: Who may run it: URNs, or `all_authenticated_users`.
        administrators: Who may change it: URNs.
        subscription_id: The subscription that a flow beyond the first one needs.

    Raises:
        BadRequest: The definition is wrong, or no facility of it can be reached from Globus.
        Unauthenticated, PolicyDenied, NotFound, Conflict: Globus refused, in its own words.
        FacilityUnreachable: Globus did not answer. Whether a flow was created is then unknown, and it says so.
    """
    errors = [
        one for one in validate(flow.definition, input_schema=flow.input_schema) if one.level == "error"
    ]
    if errors:
        raise BadRequest(
            f"{flow.title!r} is not a flow that Globus takes: {errors[0]}",
            which=flow.title,
            hint="scistream-flows validate names every problem",
            problems=[str(one) for one in errors],
        )
    _reachable_from_globus(flow)
    with _asking("Globus Flows", "the definition"):
        client.validate_flow(flow.definition, flow.input_schema)
    words: dict[str, Any] = flow.model_dump(exclude={"title", "definition", "input_schema"})
    people = {"flow_viewers": viewers, "flow_starters": starters, "flow_administrators": administrators}
    words |= {name: list(urns) for name, urns in people.items() if urns}
    if subscription_id is not None:
        words["subscription_id"] = subscription_id
    if flow_id is None:
        # sent once: a second one after a lost answer would be a second flow
        with _asking("Globus Flows", flow.title, changes=True), client.retry_config.tune(max_retries=0):
            answer = client.create_flow(flow.title, flow.definition, flow.input_schema, **words)
    else:
        with _asking("Globus Flows", flow_id):
            answer = client.update_flow(
                flow_id, title=flow.title, definition=flow.definition, input_schema=flow.input_schema, **words
            )
    found = str(answer["id"])
    return Deployed(
        flow_id=found,
        title=str(answer["title"]),
        url=f"https://app.globus.org/flows/{found}",
        scope=str(answer.get("globus_auth_scope") or ""),
        created=flow_id is None,
    )


def register(
    name: str,
    *,
    client: AuthClient,
    secret_file: Path,
    project_id: str | None = None,
    contact_email: str | None = None,
) -> Registered:
    """Register a facility at Globus Auth: a client, its secret in a file, and the scope of its actions.

    What was created is deleted again when a later step fails.

    Args:
        name: The facility, as users see it where they consent.
        client: A client of Globus Auth; `auth_client` makes one.
        secret_file: A file to be made, for the owner alone (0600); it must not exist.
        project_id: The project at Globus that the client belongs to; without it one is made.
        contact_email: For the project that is made.

    Raises:
        BadRequest: The file exists or cannot be made; or there is neither project nor address.
        Unauthenticated, PolicyDenied, NotFound, Conflict: Globus refused, in its own words.
        AuthUnavailable: Globus Auth did not answer.
    """
    from globus_sdk import DependentScopeSpec

    secret_file = Path(os.path.abspath(secret_file))  # noqa: PTH100 - a link in it stays
    if project_id is None and not contact_email:
        raise BadRequest(
            "contact_email: a new project needs one", which="contact_email", hint="Or name a project"
        )
    with contextlib.ExitStack() as undo, client.retry_config.tune(max_retries=0):
        file = _new_secret_file(secret_file)
        undo.callback(secret_file.unlink, missing_ok=True)
        undo.callback(file.close)
        if project_id is None:
            with _asking("Globus Auth", "the caller"):
                owner = str(client.userinfo()["sub"])
            with _asking("Globus Auth", name, changes=True):
                made = client.create_project(f"SciStream {name}", str(contact_email), admin_ids=owner)
            project_id = str(made["project"]["id"])
            undo.callback(_undone, "project", project_id, client.delete_project)
        with _asking("Globus Auth", name, changes=True):
            made = client.create_client(
                f"SciStream {name}",
                project_id,
                # it vouches for tokens that callers bring, and sees their groups on their behalf
                client_type="hybrid_confidential_client_resource_server",
                visibility="public",
            )
        client_id = str(made["client"]["id"])
        undo.callback(_undone, "client", client_id, client.delete_client)
        with _asking("Globus Auth", client_id, changes=True):
            made = client.create_scope(
                client_id,
                f"SciStream at {name}",
                f"Open, watch and release streams at {name}",
                SCOPE_SUFFIX,
                dependent_scopes=[
                    DependentScopeSpec(GROUPS_SCOPE_ID, optional=False, requires_refresh_token=False)
                ],
                advertised=True,
                allows_refresh_token=True,
            )
        scope = str(made["scope"]["scope_string"])
        with _asking("Globus Auth", client_id, changes=True):
            made = client.create_client_credential(client_id, f"{APP_NAME} register")
        file.write(made["credential"]["secret"] + "\n")
        file.flush()
        os.fsync(file.fileno())
        file.close()
        undo.pop_all()  # nothing is to be undone any more
    return Registered(project_id=project_id, client_id=client_id, scope=scope, secret_file=str(secret_file))


# --- clients


def globus_app(*, client_id: str, client_secret_file: Path | None = None) -> GlobusApp:
    """A login at Globus: of a person, or with a secret, of an application.

    Args:
        client_id: A native application; with a secret, a confidential one.
        client_secret_file: A file with the secret, for its owner alone.

    Raises:
        MissingExtra: When globus-sdk is not installed.
        ConfigError: When others may read the file.
    """
    try:
        import globus_sdk
        from globus_sdk.login_flows import CommandLineLoginFlowManager
    except ImportError:
        raise MissingExtra(
            "Globus needs globus-sdk", which="globus-sdk", hint="pip install 'scistream-flows[flows]'"
        ) from None

    class Login(CommandLineLoginFlowManager):
        """The login of the SDK, with its words on stderr: stdout is data."""

        def print_authorize_url(self, authorize_url: str) -> None:
            _say(f"Log in to Globus here:\n\n    {authorize_url}\n")

        def prompt_for_code(self) -> str:
            _say("The code that Globus shows: ", end="")
            with self._handle_input_errors():
                return input().strip()

    if client_secret_file is not None:
        secret = read_secret(client_secret_file, key="client_secret_file")
        return globus_sdk.ClientApp(APP_NAME, client_id=client_id, client_secret=secret)
    config = globus_sdk.GlobusAppConfig(login_flow_manager=Login, auto_redrive_gares=True)
    return globus_sdk.UserApp(APP_NAME, client_id=client_id, config=config)


def flows_client(app: GlobusApp) -> FlowsClient:
    """A client of Globus Flows that gives up within bounds."""
    from globus_sdk import FlowsClient
    from globus_sdk.transport import RetryConfig

    return FlowsClient(app=app, retry_config=RetryConfig(max_retries=_RETRIES, max_sleep=_LONGEST_PAUSE_S))


def auth_client(app: GlobusApp) -> AuthClient:
    """A client of Globus Auth that may manage projects and gives up within bounds."""
    from globus_sdk import AuthClient
    from globus_sdk.scopes import AuthScopes
    from globus_sdk.transport import RetryConfig

    scopes = [AuthScopes.openid, AuthScopes.profile, AuthScopes.email, AuthScopes.manage_projects]
    return AuthClient(
        app=app,
        app_scopes=scopes,
        retry_config=RetryConfig(max_retries=_RETRIES, max_sleep=_LONGEST_PAUSE_S),
    )


def _say(words: str, *, end: str = "\n") -> None:
    print(words, end=end, file=sys.stderr, flush=True)


# --- asking


@contextlib.contextmanager
def _asking(whom: str, which: str, *, changes: bool = False) -> Iterator[None]:
    """Turn what globus_sdk raises into our errors; where the answer to a change was lost, say that it is unknown."""
    from globus_sdk import GlobusAPIError, GlobusError, NetworkError

    silent = AuthUnavailable if whom == "Globus Auth" else FacilityUnreachable
    unknown = ". Whether it was created is not known" if changes else ""
    look = "Look at https://app.globus.org before you try again" if changes else "Try again later"
    try:
        yield
    except GlobusAPIError as wrong:
        said = "; ".join(wrong.messages) or wrong.text[:300] or str(wrong.http_status)
        if wrong.http_status in _REFUSALS:
            refusal = _REFUSALS[wrong.http_status]
            raise refusal(f"{whom} refused {which}: {said}", which=which, status=wrong.http_status) from None
        raise silent(
            f"{whom} answered {which} with {wrong.http_status}: {said}{unknown}",
            which=which,
            hint=look,
            status=wrong.http_status,
        ) from None
    except NetworkError as wrong:
        raise silent(
            f"{whom} did not answer about {which}: {_first_line(wrong)}{unknown}", which=which, hint=look
        ) from None
    except GlobusError as wrong:
        raise Unauthenticated(
            f"the login at Globus failed: {_first_line(wrong)}", which=whom, hint="Run it again in a terminal"
        ) from None


def _first_line(wrong: Exception) -> str:
    return (str(wrong).splitlines() or [type(wrong).__name__])[0][:200]


def _reachable_from_globus(flow: FlowDocument) -> None:
    for state in flow.definition["States"].values():
        url = state.get("ActionUrl", "https://")
        parts = urlsplit(url)
        host = parts.hostname or ""
        address = ip_of(host)
        private = address is not None and (address.is_loopback or address.is_private)
        if parts.scheme != "https" or host == "localhost" or private:
            raise BadRequest(
                f"{url} cannot be reached from Globus",
                which=url,
                hint="Render the flow with the public https addresses of the facilities; to try it here, run --local",
            )


def _new_secret_file(path: Path) -> TextIO:
    """A new file for its owner alone."""
    if re.search(r"[\"\\\x00-\x1f]", str(path)):
        raise BadRequest(f"secret_file: {str(path)!r} cannot stand in a configuration", which="secret_file")
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w")
    except OSError as wrong:
        raise BadRequest(
            f"secret_file: {path} cannot be made: {wrong.strerror}",
            which=str(path),
            hint="Name a file that is not there",
        ) from None


def _undone(what: str, name: str, delete: Any) -> None:
    """Delete what a registration that failed has left at Globus."""
    try:
        delete(name)
    except Exception as wrong:  # noqa: BLE001 - the failure itself is the one to raise
        log.warning("%s %s is left at Globus: %s", what, name, _first_line(wrong))
