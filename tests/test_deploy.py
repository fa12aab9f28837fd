"""Flows put at Globus, and facilities registered there, with real clients of globus_sdk.

Globus Flows is what `globus_sdk.testing` answers in its place; Globus Auth is a stand-in over HTTP.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import globus_sdk
import pytest
import responses
from globus_sdk.testing import RegisteredResponse, get_last_request, load_response
from globus_sdk.transport import RetryConfig
from standins.globus import MANAGE_SCOPE, Globus, Outage

from scistream_flows.actions.auth import AuthConfig
from scistream_flows.actions.deploy import Deployed, auth_client, deploy, flows_client, globus_app, register
from scistream_flows.actions.render import FlowDocument, render
from scistream_flows.config import load_facility
from scistream_flows.errors import (
    AuthUnavailable,
    BadRequest,
    ConfigError,
    FacilityUnreachable,
    NotFound,
    PolicyDenied,
    ScistreamError,
)

FLOW_ID = "3f7a1f6e-0000-4000-8000-000000000001"
PAIR = {"producer": "https://aps.example.org", "consumer": "https://alcf.example.org"}


@pytest.fixture
def hosted() -> Iterator[responses.RequestsMock]:
    """Nothing but what a test registers is answered."""
    with responses.mock:
        yield responses.mock
        responses.mock.reset()


@pytest.fixture
def flow() -> FlowDocument:
    return render("slices", **PAIR)


@pytest.fixture
def client() -> globus_sdk.FlowsClient:
    return globus_sdk.FlowsClient(
        authorizer=globus_sdk.AccessTokenAuthorizer("a-token"),
        retry_config=RetryConfig(max_retries=1, max_sleep=0.01),
    )


def answered(
    path: str, *, method: Literal["POST", "PUT"] = "POST", status: int = 200, **document: Any
) -> None:
    load_response(RegisteredResponse(service="flows", path=path, method=method, status=status, json=document))


def valid_and_created(flow: FlowDocument) -> None:
    answered("/flows/validate", scopes={"User": []})
    scope = f"https://auth.globus.org/scopes/{FLOW_ID}/flow_{FLOW_ID.replace('-', '_')}_user"
    answered("/flows", id=FLOW_ID, title=flow.title, globus_auth_scope=scope)


def last_request() -> Any:
    request = get_last_request()
    assert request is not None
    return request


def sent() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(last_request().body)
    return document


def test_a_flow_is_validated_and_created_as_it_was_rendered(
    hosted: responses.RequestsMock, flow: FlowDocument, client: globus_sdk.FlowsClient
) -> None:
    valid_and_created(flow)
    deployed = deploy(flow, client=client, viewers=["public"], starters=["all_authenticated_users"])
    assert deployed == Deployed(
        flow_id=FLOW_ID,
        title=flow.title,
        url=f"https://app.globus.org/flows/{FLOW_ID}",
        scope=deployed.scope,
        created=True,
    )
    assert FLOW_ID in deployed.scope
    assert [str(call.request.url).rpartition("globus.org")[2] for call in hosted.calls] == [
        "/flows/validate",
        "/flows",
    ]
    assert sent() == {
        **flow.model_dump(),
        "flow_viewers": ["public"],
        "flow_starters": ["all_authenticated_users"],
    }


def test_a_flow_that_is_there_is_updated_and_its_people_stay(
    hosted: responses.RequestsMock,  # noqa: ARG001
    flow: FlowDocument,
    client: globus_sdk.FlowsClient,
) -> None:
    answered("/flows/validate", scopes={"User": []})
    answered(f"/flows/{FLOW_ID}", method="PUT", id=FLOW_ID, title=flow.title)
    deployed = deploy(flow, client=client, flow_id=FLOW_ID)
    assert deployed.created is False
    assert sent() == flow.model_dump()


def test_what_the_sdk_knows_of_a_created_flow_is_read(
    hosted: responses.RequestsMock,  # noqa: ARG001
    flow: FlowDocument,
    client: globus_sdk.FlowsClient,
) -> None:
    answered("/flows/validate", scopes={"User": []})
    known = load_response(client.create_flow)
    deployed = deploy(flow, client=client)
    assert deployed.title == known.metadata["params"]["title"]
    assert deployed.flow_id


def test_what_globus_minds_about_a_definition_is_said_in_its_words(
    hosted: responses.RequestsMock, flow: FlowDocument, client: globus_sdk.FlowsClient
) -> None:
    answered(
        "/flows/validate",
        status=422,
        error={
            "code": "UNPROCESSABLE_ENTITY",
            "message": "1 validation error in body. $.definition: no",
            "detail": [],
        },
    )
    with pytest.raises(BadRequest, match=r"Globus Flows refused .*1 validation error in body"):
        deploy(flow, client=client)
    assert len(hosted.calls) == 1


@pytest.mark.parametrize(("status", "error"), [(403, PolicyDenied), (404, NotFound), (422, BadRequest)])
def test_a_refusal_is_an_error_of_ours(
    hosted: responses.RequestsMock,  # noqa: ARG001
    flow: FlowDocument,
    client: globus_sdk.FlowsClient,
    status: int,
    error: type[ScistreamError],
) -> None:
    answered("/flows/validate", scopes={"User": []})
    answered(
        f"/flows/{FLOW_ID}", method="PUT", status=status, error={"code": "NO", "detail": "that may not be"}
    )
    with pytest.raises(error) as refused:
        deploy(flow, client=client, flow_id=FLOW_ID)
    assert "that may not be" in refused.value.message or "NO" in refused.value.message
    assert "a-token" not in json.dumps(refused.value.to_document())


def test_a_creation_that_gets_no_answer_is_sent_once_and_said_to_be_unknown(
    hosted: responses.RequestsMock, flow: FlowDocument, client: globus_sdk.FlowsClient
) -> None:
    answered("/flows/validate", scopes={"User": []})
    answered("/flows", status=503)
    with pytest.raises(FacilityUnreachable, match="Whether it was created is not known") as unknown:
        deploy(flow, client=client)
    assert "app.globus.org" in unknown.value.hint
    assert [str(call.request.url).rpartition("/")[2] for call in hosted.calls] == ["validate", "flows"]


def test_a_service_that_is_down_is_asked_a_bounded_number_of_times(
    hosted: responses.RequestsMock, flow: FlowDocument, client: globus_sdk.FlowsClient
) -> None:
    answered("/flows/validate", status=503)
    with pytest.raises(FacilityUnreachable):
        deploy(flow, client=client)
    assert len(hosted.calls) == 2


def test_nothing_is_sent_for_a_definition_with_errors_or_facilities_that_globus_cannot_reach(
    hosted: responses.RequestsMock, flow: FlowDocument, client: globus_sdk.FlowsClient
) -> None:
    local = render("slices", producer="http://127.0.0.1:5000", consumer="https://alcf.example.org")
    with pytest.raises(BadRequest, match="cannot be reached from Globus"):
        deploy(local, client=client)
    broken = flow.model_copy(update={"definition": {"StartAt": "A", "States": {"A": {"Type": "Pass"}}}})
    with pytest.raises(BadRequest, match="Next and End"):
        deploy(broken, client=client)
    assert len(hosted.calls) == 0


def test_our_clients_give_up_within_bounds_and_keep_tokens_for_the_user_alone(
    hosted: responses.RequestsMock,  # noqa: ARG001
    flow: FlowDocument,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    secret = tmp_path / "secret"
    secret.write_text("not-told-to-anybody\n")
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match="not a file of this user alone"):
        globus_app(client_id=FLOW_ID, client_secret_file=secret)
    secret.chmod(0o600)
    load_response(
        RegisteredResponse(
            service="auth",
            path="/v2/oauth2/token",
            method="POST",
            json={
                "access_token": "a-token-of-flows",
                "scope": str(globus_sdk.FlowsClient.scopes.all),
                "expires_in": 172_800,
                "token_type": "Bearer",
                "resource_server": globus_sdk.FlowsClient.resource_server,
                "other_tokens": [],
            },
        )
    )
    valid_and_created(flow)
    client = flows_client(globus_app(client_id=FLOW_ID, client_secret_file=secret))
    assert client.retry_config.max_retries <= 2
    assert deploy(flow, client=client).created
    assert last_request().headers["Authorization"] == "Bearer a-token-of-flows"
    (stored,) = (tmp_path / ".globus").rglob("*.json")
    assert "a-token-of-flows" in stored.read_text()
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600


# --- register


@pytest.fixture
def globus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Globus]:
    with Globus() as globus:
        for name, url in globus.environment.items():
            monkeypatch.setenv(name, url)
        yield globus


@pytest.fixture
def auth(globus: Globus) -> globus_sdk.AuthClient:
    ada = globus.add_person("ada@example.org")
    token = globus.mint(ada, f"openid profile email {MANAGE_SCOPE}")
    return globus_sdk.AuthClient(
        authorizer=globus_sdk.AccessTokenAuthorizer(token),
        retry_config=RetryConfig(max_retries=1, max_sleep=0.1),
    )


def projects(auth: globus_sdk.AuthClient) -> list[Any]:
    return list(auth.get_projects())


def test_a_facility_is_registered_and_can_vouch_for_tokens_with_what_it_got(
    globus: Globus, auth: globus_sdk.AuthClient, tmp_path: Path
) -> None:
    from scistream_flows.actions.auth import GlobusAuth

    registered = register(
        "aps", client=auth, secret_file=tmp_path / "secret", contact_email="ada@example.org"
    )
    secret_file = Path(registered.secret_file)
    assert stat.S_IMODE(secret_file.stat().st_mode) == 0o600
    assert registered.scope == f"https://auth.globus.org/scopes/{registered.client_id}/action_all"
    assert secret_file.read_text().strip() not in json.dumps(registered.to_document()) + registered.table
    assert [one["id"] for one in projects(auth)] == [registered.project_id]

    file = tmp_path / "aps.toml"
    gateway = '[[gateway]]\nname = "gw1"\nwan_bind = "127.0.0.1"\nlan_bind = "127.0.0.1"\n'
    file.write_text(f'[facility]\nname = "aps"\n{gateway}{registered.table}')
    config = AuthConfig.of(load_facility("aps", file=file))
    assert config.scope == registered.scope
    group = "7d2a3f6e-0000-4000-8000-000000000002"
    grace = globus.add_person("grace@example.org", groups=[group])
    proven = GlobusAuth(config)
    try:
        who = proven.identify(f"Bearer {globus.mint(grace, registered.scope)}", groups=True)
    finally:
        proven.close()
    assert who.urn == grace.urn
    assert f"urn:globus:groups:id:{group}" in who.urns


def test_an_existing_project_is_used(auth: globus_sdk.AuthClient, tmp_path: Path) -> None:
    owner = str(auth.userinfo()["sub"])
    project = str(auth.create_project("mine", "ada@example.org", admin_ids=owner)["project"]["id"])
    registered = register("aps", client=auth, secret_file=tmp_path / "secret", project_id=project)
    assert registered.project_id == project
    assert len(projects(auth)) == 1


@pytest.mark.parametrize("step", ["create_client", "create_scope", "create_client_credential"])
@pytest.mark.parametrize("wrong", ["refused", "interrupted"])
def test_a_registration_that_fails_half_way_leaves_nothing(
    auth: globus_sdk.AuthClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, wrong: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        if wrong == "interrupted":
            raise KeyboardInterrupt
        auth.post("/v2/api/projects", data={"project": {"admin_ids": []}})

    monkeypatch.setattr(auth, step, fail)
    with pytest.raises(KeyboardInterrupt if wrong == "interrupted" else ScistreamError):
        register("aps", client=auth, secret_file=tmp_path / "secret", contact_email="ada@example.org")
    assert projects(auth) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("outage", ["refused", "503"])
def test_a_registration_while_globus_is_down_leaves_nothing_here(
    globus: Globus, auth: globus_sdk.AuthClient, tmp_path: Path, outage: Outage
) -> None:
    globus.down(outage)
    with pytest.raises(AuthUnavailable):
        register("aps", client=auth, secret_file=tmp_path / "secret", contact_email="ada@example.org")
    assert list(tmp_path.iterdir()) == []


def test_a_secret_is_never_written_over_another_file(auth: globus_sdk.AuthClient, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("precious")
    with pytest.raises(BadRequest, match="File exists"):
        register("aps", client=auth, secret_file=tmp_path / "secret", contact_email="ada@example.org")
    assert (tmp_path / "secret").read_text() == "precious"
    assert projects(auth) == []


def test_a_new_project_needs_an_address(auth: globus_sdk.AuthClient, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="contact_email"):
        register("aps", client=auth, secret_file=tmp_path / "secret")
    assert list(tmp_path.iterdir()) == []


def test_a_client_of_globus_auth_asks_for_no_more_than_projects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    app = globus_app(client_id=FLOW_ID)
    auth_client(app)
    (scopes,) = app.scope_requirements.values()
    assert {str(one) for one in scopes} == {"openid", "profile", "email", MANAGE_SCOPE}
