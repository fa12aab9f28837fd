"""The stand-in for Globus, driven by the real globus_sdk: what tests of ours rest on has tests of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import globus_sdk
import pytest
import requests
from globus_sdk.transport import RetryConfig
from standins import globus as standin
from standins.globus import Client, Globus, Person, top_level

CREW = "45d14160-9ad2-42da-9e7c-5640886b2945"


class World:
    """A facility and a person, and the clients that a test wants to see them through."""

    def __init__(self, globus: Globus) -> None:
        self.globus = globus
        self.facility, self.scope = globus.add_facility()
        self.ada = globus.add_person("ada@example.org", groups=[CREW])
        self.native = globus.add_native_app()

    def client(
        self, of: Client | None = None, secret: str | None = None
    ) -> globus_sdk.ConfidentialAppAuthClient:
        client = of or self.facility
        return globus_sdk.ConfidentialAppAuthClient(
            client.id, secret or client.secret or "", retry_config=RetryConfig(max_retries=0)
        )

    def introspect(self, token: object, *, include: str = "") -> globus_sdk.GlobusHTTPResponse:
        with self.client() as client:
            return client.oauth2_token_introspect(str(token), include=include)

    def logged_in(
        self, person: Person, *, redirect_uri: str | globus_sdk.MissingType = globus_sdk.MISSING
    ) -> globus_sdk.OAuthTokenResponse:
        """What a native app gets after a person has logged in in a browser."""
        self.globus.login_as = person
        with globus_sdk.NativeAppAuthClient(self.native.id) as client:
            client.oauth2_start_flow(
                requested_scopes=[self.scope, "openid", "email"],
                refresh_tokens=True,
                redirect_uri=redirect_uri,
            )
            return client.oauth2_exchange_code_for_tokens(code_of(client.oauth2_get_authorize_url()))


def code_of(authorize_url: str) -> str:
    """What the page shows, or the application is sent, at the end of a login."""
    answer = requests.get(authorize_url, allow_redirects=False, timeout=10)
    return parse_qs(urlsplit(answer.headers["Location"]).query)["code"][0]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with Globus() as globus:
        for name, value in globus.environment.items():
            monkeypatch.setenv(name, value)
        yield World(globus)


def test_a_token_is_active_for_its_own_resource_server(world: World) -> None:
    token = world.globus.mint(world.ada, world.scope)
    answer = world.introspect(token)
    assert answer["active"] is True
    assert answer["sub"] == world.ada.id
    assert answer["scope"] == world.scope
    assert world.facility.id in answer["aud"]
    assert "identity_set" not in answer.data


def test_a_token_of_another_resource_server_is_not_active(world: World) -> None:
    _, elsewhere = world.globus.add_facility()
    assert world.introspect(world.globus.mint(world.ada, elsewhere)).data == {"active": False}


@pytest.mark.parametrize("how", ["expired", "revoked", "invented"])
def test_a_token_that_is_no_more_is_not_active(world: World, how: str) -> None:
    token = world.globus.mint(world.ada, world.scope, lifetime_s=-1 if how == "expired" else 100)
    if how == "revoked":
        with world.client() as client:
            client.oauth2_revoke_token(token)
    assert world.introspect("invented" if how == "invented" else token).data == {"active": False}


def test_introspection_includes_what_is_asked_for(world: World) -> None:
    alias = world.globus.add_person("ada@elsewhere.example", linked=[world.ada])
    token = world.globus.mint(world.ada, world.scope)
    answer = world.introspect(token, include="identity_set,identity_set_detail,session_info")
    assert answer["identity_set"] == [world.ada.id, alias.id]
    assert [one["username"] for one in answer["identity_set_detail"]] == [
        "ada@example.org",
        "ada@elsewhere.example",
    ]
    assert list(answer["session_info"]["authentications"]) == [world.ada.id]


def test_a_client_has_tokens_of_its_own(world: World) -> None:
    caller, _ = world.globus.add_facility()
    with world.client(caller) as client:
        tokens = client.oauth2_client_credentials_tokens(requested_scopes=[world.scope, "openid"])
    assert set(tokens.by_resource_server) == {world.facility.id, standin.AUTH}
    answer = world.introspect(tokens.by_scopes[world.scope]["access_token"])
    assert answer["sub"] == caller.id


def test_a_wrong_secret_is_refused(world: World) -> None:
    with (
        world.client(secret="guessed") as client,
        pytest.raises(globus_sdk.AuthAPIError) as wrong,
    ):
        client.oauth2_token_introspect(world.globus.mint(world.ada, world.scope))
    assert wrong.value.http_status == 401


def test_an_unknown_scope_is_refused(world: World) -> None:
    with world.client() as client, pytest.raises(globus_sdk.AuthAPIError, match="unknown_scope"):
        client.oauth2_client_credentials_tokens(requested_scopes="https://auth.globus.org/scopes/x/y")


def test_a_person_logs_in_to_a_native_app(world: World) -> None:
    tokens = world.logged_in(world.ada)
    access = tokens.by_resource_server[world.facility.id]
    assert world.introspect(access["access_token"])["sub"] == world.ada.id
    claims = tokens.decode_id_token()
    assert (claims["sub"], claims["aud"]) == (world.ada.id, world.native.id)


def test_a_login_may_lead_back_to_an_address_of_the_application(world: World) -> None:
    tokens = world.logged_in(world.ada, redirect_uri="http://localhost:9/back")
    assert world.facility.id in tokens.by_resource_server


def test_a_code_counts_once_and_only_with_its_verifier(world: World) -> None:
    world.globus.login_as = world.ada
    with (
        globus_sdk.NativeAppAuthClient(world.native.id) as client,
        globus_sdk.NativeAppAuthClient(world.native.id) as thief,
    ):
        for one in (client, thief):
            one.oauth2_start_flow(requested_scopes=world.scope)
        with pytest.raises(globus_sdk.AuthAPIError, match="invalid_grant"):
            thief.oauth2_exchange_code_for_tokens(code_of(client.oauth2_get_authorize_url()))
        code = code_of(client.oauth2_get_authorize_url())
        client.oauth2_exchange_code_for_tokens(code)
        with pytest.raises(globus_sdk.AuthAPIError, match="invalid_grant"):
            client.oauth2_exchange_code_for_tokens(code)


def test_a_login_can_be_refused(world: World) -> None:
    with globus_sdk.NativeAppAuthClient(world.native.id) as client:
        client.oauth2_start_flow(requested_scopes=world.scope)
        answer = requests.get(client.oauth2_get_authorize_url(), allow_redirects=False, timeout=10)
    assert "error=access_denied" in answer.headers["Location"]


def test_a_refresh_token_gives_new_access_until_it_is_revoked(world: World) -> None:
    old = world.logged_in(world.ada).by_resource_server[world.facility.id]
    with globus_sdk.NativeAppAuthClient(world.native.id) as client:
        new = client.oauth2_refresh_token(old["refresh_token"]).by_resource_server[world.facility.id]
        assert new["access_token"] != old["access_token"]
        assert world.introspect(new["access_token"])["active"]
        client.oauth2_revoke_token(old["refresh_token"])
        with pytest.raises(globus_sdk.AuthAPIError, match="invalid_grant"):
            client.oauth2_refresh_token(old["refresh_token"])


def test_a_dependent_token_shows_the_groups_of_the_caller(world: World) -> None:
    world.ada.groups["7f3e2a7e-0000-4000-8000-000000000002"] = "invited"
    with world.client() as client:
        granted = client.oauth2_get_dependent_tokens(
            world.globus.mint(world.ada, world.scope), scope=standin.GROUPS_SCOPE
        )
    authorizer = globus_sdk.AccessTokenAuthorizer(granted.by_resource_server[standin.GROUPS]["access_token"])
    with globus_sdk.GroupsClient(authorizer=authorizer) as groups:
        assert [one["id"] for one in groups.get_my_groups()] == [CREW]
        assert len(list(groups.get_my_groups(statuses=["active", "invited"]))) == 2


def test_a_dependent_token_needs_consent(world: World) -> None:
    token = world.globus.mint(world.ada, world.scope, consents=[])
    with world.client() as client, pytest.raises(globus_sdk.AuthAPIError) as wrong:
        client.oauth2_get_dependent_tokens(token)
    assert wrong.value.http_status == 403


def test_nobody_gets_dependent_tokens_for_a_token_of_another(world: World) -> None:
    stranger, _ = world.globus.add_facility()
    with world.client(stranger) as client, pytest.raises(globus_sdk.AuthAPIError, match="invalid_grant"):
        client.oauth2_get_dependent_tokens(world.globus.mint(world.ada, world.scope))


def test_groups_takes_only_tokens_for_groups(world: World) -> None:
    authorizer = globus_sdk.AccessTokenAuthorizer(world.globus.mint(world.ada, world.scope))
    with (
        globus_sdk.GroupsClient(authorizer=authorizer) as groups,
        pytest.raises(globus_sdk.GroupsAPIError) as wrong,
    ):
        groups.get_my_groups()
    assert wrong.value.http_status == 401


def test_userinfo_and_identities_name_people(world: World) -> None:
    authorizer = globus_sdk.AccessTokenAuthorizer(world.globus.mint(world.ada, "openid profile"))
    with globus_sdk.AuthClient(authorizer=authorizer) as auth:
        assert auth.userinfo()["preferred_username"] == "ada@example.org"
        assert [one["id"] for one in auth.get_identities(usernames="ada@example.org")] == [world.ada.id]
        assert [one["username"] for one in auth.get_identities(ids=world.ada.id)] == ["ada@example.org"]


def test_calls_are_counted(world: World) -> None:
    for _ in range(3):
        world.introspect("invented")
    assert world.globus.calls[standin.INTROSPECT] == 3
    assert world.globus.calls[standin.MY_GROUPS] == 0


def test_a_refused_connection_is_over_when_it_is_up_again(world: World) -> None:
    token = world.globus.mint(world.ada, world.scope)
    world.globus.down("refused")
    with pytest.raises(globus_sdk.GlobusConnectionError):
        world.introspect(token)
    world.globus.up()
    assert world.introspect(token)["active"]


def test_an_outage_may_have_an_answer(world: World) -> None:
    world.globus.down("503")
    with pytest.raises(globus_sdk.AuthAPIError) as wrong:
        world.introspect("any")
    assert wrong.value.http_status == 503
    world.globus.down("nonsense")
    assert isinstance(world.introspect("any").data, list)
    world.globus.up()
    assert world.introspect("any").data == {"active": False}


def test_an_outage_may_be_silence_which_ends_with_it(world: World, within: Callable[..., None]) -> None:
    world.globus.down("silent")
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            world.introspect("any")
        except globus_sdk.GlobusConnectionError as wrong:
            failed.append(wrong)

    asking = threading.Thread(target=ask)
    asking.start()
    within(lambda: world.globus.calls[standin.INTROSPECT])
    world.globus.up()
    asking.join(30)
    assert len(failed) == 1


def test_an_unknown_path_is_not_found(world: World) -> None:
    assert requests.get(world.globus.url + "v2/api/policies", timeout=10).status_code == 404


def test_a_client_is_registered_with_its_scope_and_secret(world: World) -> None:
    authorizer = globus_sdk.AccessTokenAuthorizer(
        world.globus.mint(world.ada, f"openid {standin.MANAGE_SCOPE}")
    )
    groups = globus_sdk.DependentScopeSpec(
        standin.GROUPS_SCOPE_ID, optional=False, requires_refresh_token=False
    )
    with globus_sdk.AuthClient(authorizer=authorizer) as auth:
        project = auth.create_project("Beamline", "ops@example.org", admin_ids=world.ada.id)["project"]["id"]
        made = auth.create_client("S2CS", project, client_type="hybrid_confidential_client_resource_server")
        client_id = made["client"]["id"]
        scope = auth.create_scope(client_id, "SciStream", "Streams", "action_all", dependent_scopes=[groups])
        secret = auth.create_client_credential(client_id, "first")["credential"]["secret"]
        assert [one["id"] for one in auth.get_projects()] == [project]
        with globus_sdk.ConfidentialAppAuthClient(client_id, secret) as registered:
            token = world.globus.mint(world.ada, scope["scope"]["scope_string"])
            assert registered.oauth2_token_introspect(token)["sub"] == world.ada.id
            assert standin.GROUPS in registered.oauth2_get_dependent_tokens(token).by_resource_server
        with pytest.raises(globus_sdk.AuthAPIError) as wrong:
            auth.delete_project(project)
        assert wrong.value.http_status == 409
        auth.delete_client(client_id)
        auth.delete_project(project)
        assert list(auth.get_projects()) == []


def test_nobody_registers_clients_in_a_project_of_another(world: World) -> None:
    tokens = [
        world.globus.mint(person, standin.MANAGE_SCOPE)
        for person in (world.ada, world.globus.add_person("eve@example.org"))
    ]
    ada, eve = (globus_sdk.AuthClient(authorizer=globus_sdk.AccessTokenAuthorizer(one)) for one in tokens)
    with ada, eve:
        project = ada.create_project("Beamline", "ops@example.org", admin_ids=world.ada.id)["project"]["id"]
        with pytest.raises(globus_sdk.AuthAPIError) as no_client:
            eve.create_client("Mine", project, public_client=False)
        with pytest.raises(globus_sdk.AuthAPIError) as not_deleted:
            eve.delete_project(project)
        assert [no_client.value.http_status, not_deleted.value.http_status] == [403, 403]


def test_registration_needs_its_own_scope(world: World) -> None:
    authorizer = globus_sdk.AccessTokenAuthorizer(world.globus.mint(world.ada, "openid"))
    with (
        globus_sdk.AuthClient(authorizer=authorizer) as auth,
        pytest.raises(globus_sdk.AuthAPIError) as wrong,
    ):
        auth.create_project("Beamline", "ops@example.org", admin_ids=world.ada.id)
    assert wrong.value.http_status == 403


def test_scopes_in_brackets_belong_to_others() -> None:
    assert top_level("a b[c[d] *e] *f") == ("a", "b", "f")
    assert top_level("") == ()


def test_it_runs_as_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(
        [sys.executable, str(Path(standin.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            about = json.loads(process.stdout.readline())
            for name, value in about["environment"].items():
                monkeypatch.setenv(name, value)
            token = requests.post(
                about["url"] + "standin/mint",
                data={"username": "grace@example.org", "scope": about["scope"]},
                timeout=10,
            ).json()["access_token"]
            with globus_sdk.ConfidentialAppAuthClient(about["client_id"], about["client_secret"]) as client:
                answer = client.oauth2_token_introspect(token)
            assert answer["sub"] == about["people"]["grace@example.org"]
        finally:
            process.stdin.close()
            assert process.wait(30) == 0
