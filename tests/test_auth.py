"""Who calls and whether it may: real globus_sdk against the stand-in for Globus, and the development token."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from standins import globus as standin
from standins.globus import Globus, Outage

from scistream_flows.actions import auth
from scistream_flows.actions.auth import (
    AuthConfig,
    DevelopmentToken,
    GlobusAuth,
    Identity,
    admit,
    authenticator,
    check_host,
    loopback_hosts,
    may,
    names_group,
)
from scistream_flows.config import load_facility
from scistream_flows.errors import (
    AuthUnavailable,
    ConfigError,
    MissingExtra,
    PolicyDenied,
    ScistreamError,
    Unauthenticated,
)
from scistream_flows.s2cs import unix_owner

CREW = "45d14160-9ad2-42da-9e7c-5640886b2945"
GUESTS = "0b1f5a9e-93f4-4d0a-8a51-1f3d2f9f7c11"
CREW_URN = f"urn:globus:groups:id:{CREW}"
SOMEBODY = "urn:globus:auth:identity:7d1b9b0e-6f3c-4a38-9a53-1f9c6f5f2a10"


class World:
    """A facility with a Globus client, and Ada, who is in its crew."""

    def __init__(self, globus: Globus) -> None:
        self.globus = globus
        self.client, self.scope = globus.add_facility()
        self.ada = globus.add_person("ada@example.org", groups=[CREW])
        self._made: list[GlobusAuth] = []

    def auth(self, *, client_secret: str | None = None, **times: float) -> GlobusAuth:
        config = AuthConfig(
            client_id=self.client.id, client_secret=client_secret or self.client.secret, scope=self.scope
        )
        self._made.append(GlobusAuth(config, **times))
        return self._made[-1]

    def header(self, **options: Any) -> str:
        return "Bearer " + self.globus.mint(self.ada, options.pop("scope", self.scope), **options)

    @property
    def introspections(self) -> int:
        return self.globus.calls[standin.INTROSPECT]

    def close(self) -> None:
        for one in self._made:
            one.close()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with Globus() as globus:
        for name, value in globus.environment.items():
            monkeypatch.setenv(name, value)
        world = World(globus)
        yield world
        world.close()


def refused(
    auth: GlobusAuth | DevelopmentToken, authorization: str | None, **options: bool
) -> ScistreamError:
    with pytest.raises(ScistreamError) as no:
        auth.identify(authorization, **options)
    return no.value


# --- Globus: who it is


def test_a_token_proves_who_calls(world: World) -> None:
    identity = world.auth().identify(world.header(client_id="6c2b5f0e-0000-4000-8000-00000000000a"))
    assert identity == Identity(
        urn=world.ada.urn,
        urns=(world.ada.urn,),
        username="ada@example.org",
        client_id="6c2b5f0e-0000-4000-8000-00000000000a",
        scope=world.scope,
    )


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   ", "  Bearer "])
def test_the_scheme_is_read_as_http_writes_it(world: World, scheme: str) -> None:
    assert world.auth().identify(world.header().replace("Bearer ", scheme)).urn == world.ada.urn


def test_linked_identities_count_and_the_effective_one_is_first(world: World) -> None:
    alias = world.globus.add_person("ada@elsewhere.example", linked=[world.ada])
    identity = world.auth().identify(world.header())
    assert identity.urn == world.ada.urn
    assert identity.urns == (world.ada.urn, alias.urn)
    assert may(identity, [alias.urn])


def test_an_application_may_call_for_itself(world: World) -> None:
    robot, _ = world.globus.add_facility()
    header = "Bearer " + world.globus.mint(world.globus.person(robot.id), world.scope)
    assert world.auth().identify(header).urn == f"urn:globus:auth:identity:{robot.id}"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic YWRhOnNlY3JldA==",
        "Token abc",
        "Bearer two words",
        "Bearer a,b",
        "Bearer a\r\nX-Other: b",
        "Bearer \u00e9t\u00e9",
        "Bearer " + "a" * (auth.LONGEST_TOKEN + 1),
    ],
    ids=lambda header: repr(header)[:20],
)
def test_what_is_no_token_is_refused_without_asking_globus(world: World, header: str | None) -> None:
    error = refused(world.auth(), header)
    assert isinstance(error, Unauthenticated)
    assert error.http_status == 401
    assert error.challenge.startswith('Bearer realm="scistream"')
    assert world.scope in error.challenge
    assert world.introspections == 0


def test_a_missing_token_is_not_called_invalid(world: World) -> None:
    globus = world.auth()
    assert "error=" not in getattr(refused(globus, None), "challenge", "error=")
    assert 'error="invalid_token"' in getattr(refused(globus, "Bearer guessed"), "challenge", "")


@pytest.mark.parametrize("how", ["invented", "expired", "revoked", "of another facility"])
def test_a_token_that_does_not_count_here_is_refused(world: World, how: str) -> None:
    _, elsewhere = world.globus.add_facility()
    headers = {
        "invented": "Bearer invented",
        "expired": world.header(lifetime_s=-1),
        "revoked": world.header(),
        "of another facility": world.header(scope=elsewhere),
    }
    world.globus.revoke(headers["revoked"].removeprefix("Bearer "))
    assert isinstance(refused(world.auth(), headers[how]), Unauthenticated)
    assert world.introspections == 1


def test_a_token_with_another_scope_of_the_same_client_is_denied(world: World) -> None:
    other = world.scope + "_but_not_this"
    client = world.globus.add_client(client_id=world.client.id, scopes=[other])
    error = refused(world.auth(client_secret=client.secret), world.header(scope=other))
    assert isinstance(error, PolicyDenied)
    assert error.details["required_scopes"] == [world.scope]
    assert 'error="insufficient_scope"' in error.details["challenge"]


def test_a_scope_among_others_is_enough(world: World) -> None:
    other = world.scope.replace("action_all", "look_only")
    client = world.globus.add_client(client_id=world.client.id, scopes=[world.scope, other])
    header = world.header(scope=f"{other} {world.scope}")
    assert world.auth(client_secret=client.secret).identify(header).urn == world.ada.urn


# --- Globus: what is remembered


def test_a_good_token_is_asked_about_once(world: World) -> None:
    globus, header = world.auth(), world.header()
    assert len({globus.identify(header) for _ in range(5)}) == 1
    assert world.introspections == 1


def test_a_bad_token_is_asked_about_once(world: World) -> None:
    globus = world.auth()
    for _ in range(5):
        refused(globus, "Bearer invented")
    assert world.introspections == 1


def test_a_revocation_counts_within_the_time_a_token_is_believed(
    world: World, within: Callable[..., None]
) -> None:
    globus, header = world.auth(accepted_s=0.3), world.header()
    globus.identify(header)
    world.globus.revoke(header.removeprefix("Bearer "))

    def is_refused() -> bool:
        try:
            globus.identify(header)
        except Unauthenticated:
            return True
        return False

    within(is_refused, timeout_s=10)


@pytest.mark.parametrize("remembered", [True, False])
def test_a_token_is_not_believed_beyond_its_end(
    world: World, monkeypatch: pytest.MonkeyPatch, *, remembered: bool
) -> None:
    globus, header = world.auth(accepted_s=100_000), world.header(lifetime_s=3600)
    globus.identify(header)
    passed_s = 0 if remembered else 7200
    later = SimpleNamespace(time=lambda: time.time() + 7200, monotonic=lambda: time.monotonic() + passed_s)
    monkeypatch.setattr(auth, "time", later)
    assert "expired" in str(refused(globus, header))
    assert world.introspections == (1 if remembered else 2)


def test_a_token_refused_too_early_is_asked_about_again(world: World, within: Callable[..., None]) -> None:
    """As with a consent that arrives a moment after the first request."""
    globus = world.auth(refused_s=0.1)
    refused(globus, "Bearer soon")

    def is_asked_again() -> bool:
        refused(globus, "Bearer soon")
        return world.introspections > 1

    within(is_asked_again, timeout_s=10)


def test_a_flood_of_bad_tokens_pushes_no_good_one_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_REMEMBERED", 4)
    globus, header = world.auth(), world.header()
    globus.identify(header)
    for number in range(20):
        refused(globus, f"Bearer invented{number}")
    asked = world.introspections
    globus.identify(header)
    assert world.introspections == asked
    refused(globus, "Bearer invented0")
    assert world.introspections == asked + 1, "what was refused is remembered without bound"


def test_many_threads_with_one_token_ask_once(world: World) -> None:
    globus, header = world.auth(), world.header()
    together = threading.Barrier(32)

    def call(_: int) -> Identity:
        together.wait(30)
        return globus.identify(header)

    with ThreadPoolExecutor(32) as threads:
        identities = list(threads.map(call, range(32)))
    assert {one.urn for one in identities} == {world.ada.urn}
    assert world.introspections == 1


def test_many_threads_with_many_tokens_each_get_their_own_answer(world: World) -> None:
    globus = world.auth()
    people = [world.globus.add_person(f"user{number}@example.org", groups=[CREW]) for number in range(24)]
    headers = ["Bearer " + world.globus.mint(one, world.scope) for one in people]
    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(lambda header: globus.identify(header, groups=True), headers * 3))
    assert [one.urn for one in found] == [one.urn for one in people] * 3
    assert world.introspections == len(people)
    assert world.globus.calls[standin.MY_GROUPS] == len(people)


# --- Globus: groups


def test_groups_are_asked_for_only_when_wanted(world: World) -> None:
    globus, header = world.auth(), world.header()
    assert CREW_URN not in globus.identify(header).urns
    assert world.globus.calls[standin.MY_GROUPS] == 0
    identity = globus.identify(header, groups=True)
    assert identity.urns == (world.ada.urn, CREW_URN)
    globus.identify(header, groups=True)
    assert world.globus.calls[standin.MY_GROUPS] == 1


def test_only_an_active_member_is_in_a_group(world: World) -> None:
    world.ada.groups |= {GUESTS: "invited", "5a3ff0c2-9d5c-4f9f-8f3a-2f6f0e8e9a77": "pending"}
    assert world.auth().identify(world.header(), groups=True).urns == (world.ada.urn, CREW_URN)


def test_groups_of_linked_identities_count(world: World) -> None:
    alias = world.globus.add_person("ada@elsewhere.example", groups=[GUESTS], linked=[world.ada])
    identity = world.auth().identify(world.header(), groups=True)
    assert set(identity.urns) == {world.ada.urn, alias.urn, CREW_URN, f"urn:globus:groups:id:{GUESTS}"}


def test_leaving_a_group_counts_within_the_time_groups_are_believed(
    world: World, within: Callable[..., None]
) -> None:
    globus, header = world.auth(groups_s=0.1), world.header()
    assert CREW_URN in globus.identify(header, groups=True).urns
    world.ada.groups[CREW] = "left"
    within(lambda: CREW_URN not in globus.identify(header, groups=True).urns, timeout_s=10)


@pytest.mark.parametrize(
    "answer", [None, {"groups": []}, ["x"], [{"id": CREW}], [{"id": 5, "my_memberships": []}, 5]]
)
def test_a_list_of_groups_that_says_nothing_sure_is_no_list(answer: object) -> None:
    with pytest.raises(AuthUnavailable):
        auth._active_groups(answer)


def test_a_membership_counts_by_its_own_status() -> None:
    memberships = [{"status": "pending"}, {"status": "removed"}]
    assert auth._active_groups([{"id": CREW, "my_memberships": memberships}]) == ()
    assert auth._active_groups([{"id": CREW, "my_memberships": [*memberships, {"status": "active"}]}]) == (
        CREW_URN,
    )


def test_a_caller_who_did_not_consent_to_groups_is_told_which_scope(world: World) -> None:
    globus, header = world.auth(), world.header(consents=[])
    assert globus.identify(header).urn == world.ada.urn
    for _ in range(3):
        error = refused(globus, header, groups=True)
        assert isinstance(error, PolicyDenied)
        assert error.details["required_scopes"] == [f"{world.scope}[{auth.GROUPS_SCOPE}]"]
    assert world.globus.calls[standin.TOKEN] == 1


@pytest.mark.parametrize("how", ["refused", "503", "nonsense"])
def test_groups_that_cannot_be_told_are_not_taken_for_none(world: World, how: Outage) -> None:
    globus, header = world.auth(), world.header()
    globus.identify(header)
    world.globus.down(how)
    assert isinstance(refused(globus, header, groups=True), AuthUnavailable)
    assert globus.identify(header).urn == world.ada.urn


# --- Globus: when it does not answer


@pytest.mark.parametrize("how", ["refused", "503", "silent", "nonsense"])
def test_nobody_comes_in_while_globus_does_not_answer(world: World, how: Outage) -> None:
    globus, header = world.auth(http_timeout_s=0.2 if how == "silent" else 30), world.header()
    world.globus.down(how)
    error = refused(globus, header)
    assert isinstance(error, AuthUnavailable)
    assert error.http_status == 502
    assert "Globus" in str(error)
    before = world.introspections
    world.globus.up()
    if how != "silent":  # whoever is as impatient as that may not get an answer on a busy machine either
        assert globus.identify(header).urn == world.ada.urn, "an outage is remembered"
        assert world.introspections == before + 1


def test_each_call_is_tried_twice_and_no_more(world: World) -> None:
    globus, header = world.auth(), world.header()
    world.globus.down("503")
    refused(globus, header)
    assert world.introspections == 2


def test_who_is_known_comes_in_while_globus_does_not_answer(world: World) -> None:
    globus, header = world.auth(), world.header()
    globus.identify(header)
    world.globus.down("refused")
    assert globus.identify(header).urn == world.ada.urn


def test_all_threads_that_wait_learn_that_globus_does_not_answer(world: World) -> None:
    globus = world.auth(http_timeout_s=0.2)
    headers = [world.header() for _ in range(4)] * 4
    world.globus.down("silent")
    with ThreadPoolExecutor(len(headers)) as threads:
        errors = list(threads.map(lambda header: refused(globus, header), headers))
    assert {type(one) for one in errors} == {AuthUnavailable}


def test_callers_do_not_queue_up_without_bound_behind_a_slow_globus(
    world: World, monkeypatch: pytest.MonkeyPatch, within: Callable[..., None]
) -> None:
    monkeypatch.setattr(auth, "_CALLS_AT_ONCE", 1)
    monkeypatch.setattr(auth, "_TURN_TIMEOUT_S", 0.05)
    globus = world.auth(http_timeout_s=30)
    world.globus.down("silent")
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(globus.identify, world.header())
        within(lambda: world.introspections)
        assert "slow" in str(refused(globus, world.header()))
        world.globus.up()
        assert first.result(60).urn == world.ada.urn, "the second try is not made"


def test_nobody_waits_without_bound_for_the_answer_to_another(
    world: World, monkeypatch: pytest.MonkeyPatch, within: Callable[..., None]
) -> None:
    monkeypatch.setattr(auth, "_LONGEST_WAIT_S", 0.05)
    globus, header = world.auth(http_timeout_s=30), world.header()
    world.globus.down("silent")
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(globus.identify, header)
        within(lambda: world.introspections)
        assert isinstance(refused(globus, header), AuthUnavailable)
        world.globus.up()
        assert first.result(60).urn == world.ada.urn


def test_a_wrong_client_secret_is_the_facility_s_fault(world: World) -> None:
    error = refused(world.auth(client_secret="outdated"), world.header())
    assert isinstance(error, AuthUnavailable)
    assert "secret" in str(error)
    assert "outdated" not in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        {"active": "yes"},
        {"active": True},
        {"active": True, "sub": "root", "exp": 9e9, "scope": "s", "aud": ["me"]},
        {"active": True, "sub": CREW, "exp": "never", "scope": "s", "aud": ["me"]},
        {"active": True, "sub": CREW, "exp": 10**400, "scope": "s", "aud": ["me"]},
        {"active": True, "sub": CREW, "exp": 9e9, "scope": "s", "aud": 5},
        {"active": True, "sub": CREW, "exp": 9e9, "aud": ["me"]},
        {"active": True, "sub": CREW, "exp": 9e9, "scope": "s", "aud": ["me"], "identity_set": ["x"]},
    ],
)
def test_a_document_that_says_nothing_sure_admits_nobody(answer: object) -> None:
    with pytest.raises(AuthUnavailable):
        auth._verdict(answer, {"me"})


@pytest.mark.parametrize("aud", [[], None, ["somebody"], "somebody"])
def test_a_document_for_another_audience_admits_nobody(aud: object) -> None:
    document = {"active": True, "sub": CREW, "exp": 9e9, "scope": "s", "aud": aud}
    assert auth._verdict(document, {"me"}).identity is None


def test_the_audience_may_be_the_name_that_owns_the_scope() -> None:
    document = {"active": True, "sub": CREW, "exp": 9e9, "scope": "s", "aud": "s2cs.example.org"}
    assert auth._verdict(document, {"me", "s2cs.example.org"}).identity is not None


# --- secrets stay where they are


def test_no_token_and_no_secret_is_logged_or_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    globus, header = world.auth(), world.header()
    token, told = header.removeprefix("Bearer "), ""
    globus.identify(header, groups=True)
    world.globus.revoke(token)
    told += repr(refused(world.auth(), header).to_document())
    world.globus.down("503")
    error = refused(world.auth(), header)
    told += repr(error.to_document()) + repr(pickle.dumps(error)) + repr(globus.config) + caplog.text
    for secret in (token, world.client.secret or ""):
        assert secret not in told
    dependent = [text for text, one in world.globus._tokens.items() if one.resource_server == standin.GROUPS]
    assert dependent
    assert not [one for one in dependent if one in told]


# --- rules


@pytest.mark.parametrize(
    ("principals", "admitted"),
    [
        (["public"], True),
        (["all_authenticated_users"], True),
        ([SOMEBODY], True),
        ([SOMEBODY.upper()], True),
        ([CREW_URN], True),
        ([f"urn:globus:groups:id:{GUESTS}"], False),
        ([f"urn:globus:auth:identity:{CREW}"], False),
        ([], False),
        (["ada@example.org"], False),
    ],
)
def test_a_caller_is_admitted_by_its_urns(principals: Sequence[str], admitted: bool) -> None:  # noqa: FBT001
    ada = Identity(urn=SOMEBODY, urns=(SOMEBODY, CREW_URN), username="ada@example.org")
    assert may(ada, principals) is admitted


def test_who_is_nobody_sees_only_what_is_public() -> None:
    assert may(None, ["public"])
    assert not may(None, ["all_authenticated_users", SOMEBODY])


def test_groups_are_asked_for_only_when_nothing_else_decides(world: World) -> None:
    globus, header = world.auth(), world.header()
    admit(globus, header, [world.ada.urn, CREW_URN])
    with pytest.raises(PolicyDenied, match=r"ada@example\.org"):
        admit(globus, header, [SOMEBODY])
    assert world.globus.calls[standin.MY_GROUPS] == 0
    assert CREW_URN in admit(globus, header, [SOMEBODY, CREW_URN]).urns
    with pytest.raises(PolicyDenied):
        admit(globus, header, [f"urn:globus:groups:id:{GUESTS}"])


def test_a_rule_that_names_a_group_is_seen() -> None:
    assert names_group([SOMEBODY, CREW_URN.upper()])
    assert not names_group([SOMEBODY, "all_authenticated_users"])


# --- development


def test_the_development_token_is_the_unix_user(tmp_path: Path) -> None:
    development = DevelopmentToken(tmp_path / "aps")
    identity = development.identify(f"Bearer {DevelopmentToken.read(tmp_path / 'aps')}", groups=True)
    assert (identity.urn, identity.urns) == (unix_owner(), (unix_owner(),))
    assert may(identity, development.config.runnable_by)
    development.close()


def test_nobody_else_can_read_the_development_token(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        file = DevelopmentToken(tmp_path / "aps").file
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in file.parent.iterdir()] == ["token"]


def test_processes_that_start_together_share_one_token(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def start(_: int) -> tuple[DevelopmentToken, str]:
        together.wait(30)
        return DevelopmentToken(tmp_path / "aps"), DevelopmentToken.read(tmp_path / "aps")

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(start, range(8)))
    assert len({token for _, token in made}) == 1
    assert {one.identify(f"Bearer {made[0][1]}").urn for one, _ in made} == {unix_owner()}
    assert [one.name for one in (tmp_path / "aps").iterdir()] == ["token"]


def test_the_token_of_one_facility_is_none_at_another(tmp_path: Path) -> None:
    DevelopmentToken(tmp_path / "aps")
    other = DevelopmentToken(tmp_path / "alcf")
    error = refused(other, f"Bearer {DevelopmentToken.read(tmp_path / 'aps')}")
    assert isinstance(error, Unauthenticated)
    assert DevelopmentToken.read(tmp_path / "alcf") not in repr(error.to_document())


@pytest.mark.parametrize("header", [None, "Bearer", "Basic abc", "Bearer wrong", "Bearer \u00e9"])
def test_without_the_development_token_nobody_comes_in(tmp_path: Path, header: str | None) -> None:
    assert isinstance(refused(DevelopmentToken(tmp_path / "aps"), header), Unauthenticated)


@pytest.mark.parametrize("spoil", ["open", "empty", "directory", "fifo", "two lines", "huge"])
def test_a_spoiled_token_file_is_refused_with_what_to_do(tmp_path: Path, spoil: str) -> None:
    file = DevelopmentToken(tmp_path / "aps").file
    if spoil == "open":
        file.chmod(0o640)
    elif spoil in ("directory", "fifo"):
        file.unlink()
        file.mkdir() if spoil == "directory" else os.mkfifo(file, 0o600)
    else:
        file.write_text({"empty": "", "two lines": "a\nb\n", "huge": "a" * 100_000}[spoil])
    with pytest.raises(ConfigError) as wrong:
        DevelopmentToken(tmp_path / "aps")
    assert str(file) in str(wrong.value)
    assert wrong.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_token_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(DevelopmentToken(tmp_path / "aps").file, 65_534, -1)
    with pytest.raises(ConfigError, match="not a file of this user alone"):
        DevelopmentToken(tmp_path / "aps")


def test_a_missing_development_token_is_said_to_the_client(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        DevelopmentToken.read(tmp_path)


# --- configuration

FACILITY = """
[facility]
name = "aps"
[[gateway]]
name = "dtn1"
wan_bind = "127.0.0.1"
lan_bind = "127.0.0.1"
"""
CLIENT_ID = "3f5a1c1e-8e0c-4a6e-9c36-0d1f6a1b2c3d"


def configured(tmp_path: Path, tables: str, **environment: str) -> AuthConfig:
    file = tmp_path / "aps.toml"
    file.write_text(FACILITY + tables)
    facility = load_facility("aps", file=file, state_dir=tmp_path / "state", environment={})
    return AuthConfig.of(facility, environment=environment)


def test_without_a_globus_client_the_facility_is_in_development_mode(tmp_path: Path) -> None:
    config = configured(tmp_path, "")
    assert config.development
    made = authenticator(load_facility("dev", state_dir=tmp_path / "dev", environment={}), environment={})
    assert isinstance(made, DevelopmentToken)
    assert made.file == tmp_path / "dev" / "token"


def test_a_globus_client_has_its_secret_from_a_file_or_the_environment(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("from-the-file\n")
    secret.chmod(0o600)
    table = f'[globus]\nclient_id = "{CLIENT_ID.upper()}"\nclient_secret_file = "{secret}"\n'
    config = configured(tmp_path, table)
    assert (config.client_id, config.client_secret) == (CLIENT_ID, "from-the-file")
    assert config.scope == f"https://auth.globus.org/scopes/{CLIENT_ID}/action_all"
    assert not config.development
    other = configured(tmp_path, table, SCISTREAM_GLOBUS_CLIENT_SECRET="from-the-environment")
    assert other.client_secret == "from-the-environment"
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600") as wrong:
        configured(tmp_path, table)
    assert wrong.value.key == "globus.client_secret_file"
    assert "from-the-file" not in repr(wrong.value.to_document())


def test_a_globus_client_needs_globus_sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "globus_sdk.transport", None)
    config = configured(tmp_path, f'[globus]\nclient_id = "{CLIENT_ID}"\n', **{auth.SECRET_VARIABLE: "s"})
    with pytest.raises(MissingExtra) as missing:
        GlobusAuth(config)
    assert "scistream-flows[server]" in missing.value.hint


def test_development_mode_needs_no_globus_sdk() -> None:
    ask = "import sys, scistream_flows.actions.auth; sys.exit('globus_sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], timeout=60).returncode == 0


def test_a_globus_client_without_a_secret_is_not_development_mode(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no secret"):
        configured(tmp_path, f'[globus]\nclient_id = "{CLIENT_ID}"\n')


def test_who_may_run_actions_is_who_may_open_streams(tmp_path: Path) -> None:
    users = f'["{SOMEBODY}", "{CREW_URN}", "urn:scistream:unix:1000@host"]'
    policy = f'[policy]\nusers = {users}\nadministrators = ["{SOMEBODY}"]\n'
    config = configured(
        tmp_path, f'{policy}[globus]\nclient_id = "{CLIENT_ID}"\n', **{auth.SECRET_VARIABLE: "s"}
    )
    assert config.visible_to == ("public",)
    assert config.runnable_by == (SOMEBODY, CREW_URN)
    assert config.administered_by == (SOMEBODY,)


def test_a_policy_that_names_nobody_lets_nobody_run_actions(tmp_path: Path) -> None:
    config = configured(tmp_path, f'[globus]\nclient_id = "{CLIENT_ID}"\n', **{auth.SECRET_VARIABLE: "s"})
    assert (config.runnable_by, config.administered_by) == ((), ())


def test_principals_may_be_given_for_the_actions_alone(tmp_path: Path) -> None:
    table = f"""[globus]
client_id = "{CLIENT_ID}"
scope = "https://auth.globus.org/scopes/s2cs.example.org/action_all"
visible_to = ["all_authenticated_users"]
runnable_by = ["{CREW_URN.replace(CREW, CREW.upper())}"]
administered_by = ["{SOMEBODY}"]
"""
    config = configured(tmp_path, table, **{auth.SECRET_VARIABLE: "s"})
    assert config.scope == "https://auth.globus.org/scopes/s2cs.example.org/action_all"
    assert config.visible_to == ("all_authenticated_users",)
    assert config.runnable_by == (CREW_URN,)
    assert config.administered_by == (SOMEBODY,)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('client_id = "my-client"', "globus.client_id"),
        ('client_secret = "in-the-open"', "globus.client_secret"),
        ('runnable_by = ["public"]', "globus.runnable_by"),
        ('runnable_by = ["ada@example.org"]', "globus.runnable_by.0"),
        ('administered_by = ["all_authenticated_users"]', "globus.administered_by"),
        ("visible_to = []", "globus.visible_to"),
        ('scope = "two scopes"', "globus.scope"),
        ('client_secret_file = "relative"', "globus.client_secret_file"),
    ],
)
def test_a_wrong_globus_table_says_where(tmp_path: Path, line: str, key: str) -> None:
    client_id = "" if line.startswith("client_id") else f'client_id = "{CLIENT_ID}"\n'
    with pytest.raises(ConfigError) as wrong:
        configured(tmp_path, f"[globus]\n{client_id}{line}\n")
    assert wrong.value.key == key
    assert "in-the-open" not in str(wrong.value)


# --- where a request may come from


@pytest.mark.parametrize("host", ["127.0.0.1:6000", "localhost:6000", "LOCALHOST:6000", "[::1]:6000"])
@pytest.mark.parametrize("origin", [None, "http://127.0.0.1:6000", "http://localhost:6000"])
def test_a_request_to_this_machine_is_let_in(host: str, origin: str | None) -> None:
    check_host(host, origin, allowed=loopback_hosts(6000))


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:6000",
        "127.0.0.1",
        "127.0.0.1:6001",
        "127.0.0.1.evil.example:6000",
        "evil@127.0.0.1:6000",
        "127.0.0.1:6000, evil.example",
        "127.1:6000",
        "localhost.:6000",
    ],
)
def test_a_name_that_was_made_to_point_here_is_refused(host: str | None) -> None:
    with pytest.raises(PolicyDenied) as no:
        check_host(host, None, allowed=loopback_hosts(6000))
    assert no.value.which == "Host"


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "http://evil.example",
        "http://127.0.0.1:8888",
        "http://localhost:6000.evil.example",
        "file://",
        "http://evil.example http://localhost:6000",
    ],
)
def test_a_page_of_somewhere_else_is_refused(origin: str) -> None:
    with pytest.raises(PolicyDenied) as no:
        check_host("localhost:6000", origin, allowed=loopback_hosts(6000))
    assert no.value.which == "Origin"
