"""The action providers as Globus Flows meets them: two facilities over HTTP, real relays, real tokens of a stand-in."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Caller, Served, serving
from standins.globus import Globus, Person

from scistream_flows.models import split_address

GLOBUS_TABLE = """
[globus]
client_id = "{client_id}"
client_secret_file = "{secret}"
"""


@dataclass
class World:
    """Two facilities of one Globus; `a` has the instrument."""

    globus: Globus
    a: Served
    b: Served
    base: Path
    callers: list[Caller] = field(default_factory=list)

    def caller(self, served: Served, person: Person, **token: Any) -> Caller:
        caller = Caller(served, self.globus.mint(person, served.scope, **token))
        self.callers.append(caller)
        return caller


@contextlib.contextmanager
def with_client(
    globus: Globus, base: Path, name: str, *, quota: str = "", **options: Any
) -> Iterator[Served]:
    """A facility that has a client at the stand-in."""
    client, scope = globus.add_facility()
    secret = base / f"{name}-secret"
    secret.write_text(str(client.secret))
    secret.chmod(0o600)
    table = GLOBUS_TABLE.format(client_id=client.id, secret=secret) + quota
    with serving(base, name, more=table, environment=globus.environment, **options) as served:
        served.scope = scope
        yield served


@pytest.fixture(scope="module")
def facilities(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("facilities")
    with Globus() as globus, with_client(globus, base, "aps") as a, with_client(globus, base, "alcf") as b:
        yield World(globus, a, b, base)


@pytest.fixture
def world(facilities: World, relays_below: Callable[..., list[int]]) -> Iterator[World]:
    """The facilities; after the test no relay of theirs runs."""
    yield facilities
    for caller in facilities.callers:
        caller.close()
    facilities.callers.clear()
    assert relays_below(facilities.base, patience_s=5) == []


@pytest.fixture
def alice(world: World) -> Person:
    return world.globus.add_person("alice@example.org")


@pytest.fixture
def bob(world: World) -> Person:
    return world.globus.add_person("bob@example.org", groups=[str(uuid.uuid4())])


@pytest.fixture
def at_a(world: World, alice: Person) -> Caller:
    return world.caller(world.a, alice)


@pytest.fixture
def at_b(world: World, alice: Person) -> Caller:
    return world.caller(world.b, alice)


@pytest.fixture
def uid(at_a: Caller, at_b: Caller) -> Iterator[str]:
    """The name of a stream, which is released after the test."""
    uid = f"run-{uuid.uuid4()}"
    yield uid
    for caller, role in ((at_b, "CONS"), (at_a, "PROD")):
        caller.details("release", {"stream_id": uid, "role": role})


def group_of(person: Person) -> str:
    return f"urn:globus:groups:id:{next(iter(person.groups))}"


def prod(uid: str, **more: Any) -> dict[str, Any]:
    return {"stream_id": uid, "role": "PROD", "targets": ["127.0.0.1:9"]} | more


def of(uid: str, role: str = "PROD", **more: Any) -> dict[str, Any]:
    return {"stream_id": uid, "role": role} | more


def watching(uid: str, **until: Any) -> dict[str, Any]:
    return of(uid, until=until or {"duration_s": 600})


def connected(at_a: Caller, at_b: Caller, uid: str, target: str, **more: Any) -> str:
    """A stream through both facilities; the address at which its consumer connects."""
    first = at_a.details("start", prod(uid, targets=[target], linger_s=0, **more))
    second = at_b.details("start", of(uid, "CONS", producer=first["offer"], linger_s=0, **more))
    at_a.details("connect", of(uid, consumer=second["offer"]))
    listener: str = second["listeners"][0]
    return listener


def in_time(seconds: float) -> str:
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).isoformat()


# --- a flow's way through


def test_a_flow_starts_connects_monitors_and_releases_a_stream(
    at_a: Caller, at_b: Caller, uid: str, application: Any, talk: Callable[[str, bytes], str]
) -> None:
    payload = random.Random(7).randbytes(2_000_000)  # noqa: S311 - no secret
    listener = connected(at_a, at_b, uid, application.address)
    watch = at_a.run("monitor", of(uid)).json()
    assert watch["status"] == "ACTIVE"
    assert talk(listener, payload) == hashlib.sha256(application.payload).hexdigest()
    end = at_a.until_final("monitor", watch)
    assert (end["status"], end["details"]["ended_by"]) == ("SUCCEEDED", "closed")
    assert end["details"]["bytes"] == len(payload) + len(application.payload)
    assert end["display_status"].startswith("closed: 5.0 MB")
    assert application.received == [hashlib.sha256(payload).hexdigest()]
    released = at_a.details("release", of(uid))
    assert released["released"]
    assert released["final"]["reason"] == "finished"


def test_a_monitor_shows_live_progress(
    at_a: Caller, at_b: Caller, uid: str, within: Callable[..., None]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = connected(at_a, at_b, uid, "{}:{}".format(*server.getsockname()))
        watch = at_a.run("monitor", watching(uid)).json()
        assert watch["details"]["state"] == "READY"
        with socket.create_connection(split_address(listener), timeout=10) as consumer:
            producer, _ = server.accept()
            stop = threading.Event()

            def produce() -> None:
                with contextlib.suppress(OSError):
                    while not stop.wait(0.005):
                        producer.sendall(b"x" * 100_000)

            def consume() -> None:
                with contextlib.suppress(OSError):
                    while consumer.recv(1 << 16):
                        pass

            threads = [threading.Thread(target=one) for one in (produce, consume)]
            for thread in threads:
                thread.start()
            seen: list[dict[str, Any]] = []

            def flowing() -> bool:
                seen.append(at_a.status("monitor", watch["action_id"]))
                said = seen[-1]["display_status"]
                return "MB/s" in said and "limited by the " in said

            try:
                within(flowing, timeout_s=15)
            finally:
                stop.set()
                threads[0].join(10)
                producer.close()
                consumer.close()
                threads[1].join(10)
        details = seen[-1]["details"]
        assert seen[-1]["status"] == "ACTIVE"
        assert seen[-1]["display_status"].startswith("streaming: ")
        assert len(seen[-1]["display_status"]) <= 64
        assert details["state"] == "STREAMING"
        assert details["bytes"] > 0
        assert details["bits_per_s"] > 0
        assert details["connections"] == 1
        assert details["lease_remaining_s"] > 0
        assert details["limiting"]
        assert not {"items", "keys", "values", "get", "pop", "copy", "update"} & set(details)
        assert not any(isinstance(value, dict | list) or value is None for value in details.values())


@pytest.mark.parametrize(
    ("until", "ended_by"),
    [({"bytes": 1_000_000}, "bytes"), ({"idle_s": 0.3}, "idle"), ({"duration_s": 0.1}, "duration")],
)
def test_a_monitor_ends_as_asked(
    at_a: Caller, at_b: Caller, uid: str, application: Any, talk: Any, until: dict[str, Any], ended_by: str
) -> None:
    listener = connected(at_a, at_b, uid, application.address, until="released")
    talk(listener, b"")
    end = at_a.done("monitor", of(uid, until=until))
    assert (end["status"], end["details"]["ended_by"]) == ("SUCCEEDED", ended_by)
    assert at_a.details("status", of(uid))["state"] != "ENDED"


def test_a_monitor_without_a_byte_is_not_idle(application: Any, at_a: Caller, at_b: Caller, uid: str) -> None:
    connected(at_a, at_b, uid, application.address)
    watch = at_a.run("monitor", watching(uid, idle_s=0.01)).json()
    assert [at_a.status("monitor", watch["action_id"])["status"] for _ in range(3)] == ["ACTIVE"] * 3


def test_a_monitor_fails_when_the_application_aborts(at_a: Caller, at_b: Caller, uid: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = connected(at_a, at_b, uid, "{}:{}".format(*server.getsockname()))
        watch = at_a.run("monitor", of(uid)).json()
        with socket.create_connection(split_address(listener), timeout=10) as consumer:
            producer, _ = server.accept()
            producer.sendall(b"x" * 1000)
            assert consumer.recv(1000)
            producer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            producer.close()
            end = at_a.until_final("monitor", watch)
    assert (end["status"], end["details"]["code"]) == ("FAILED", "aborted_by_producer")
    assert "not in order" in end["details"]["description"]


def test_cancelling_a_monitor_stops_watching_only(at_a: Caller, uid: str) -> None:
    at_a.details("start", prod(uid))
    watch = at_a.run("monitor", watching(uid)).json()["action_id"]
    for _ in range(2):
        cancelled = at_a.ask("POST", f"/actions/monitor/{watch}/cancel")
        assert cancelled.status_code == 200
        assert cancelled.json()["status"] == "FAILED"
        assert cancelled.json()["details"]["code"] == "cancelled"
    assert at_a.details("status", of(uid))["state"] == "LISTENING"


def test_a_monitor_keeps_the_lease_alive_and_without_it_the_stream_ends(
    at_a: Caller, uid: str, within: Callable[..., None]
) -> None:
    at_a.details("start", prod(uid, lease_s=2))
    watch = at_a.run("monitor", watching(uid)).json()["action_id"]
    began = time.monotonic()

    def longer_than_the_lease() -> bool:
        assert at_a.status("monitor", watch)["status"] == "ACTIVE"
        return time.monotonic() - began > 3

    within(longer_than_the_lease, timeout_s=20)
    at_a.ask("POST", f"/actions/monitor/{watch}/cancel")
    within(lambda: at_a.details("status", of(uid))["state"] in ("ENDED", "FAILED"), timeout_s=20)
    after = at_a.done("monitor", watching(uid))
    assert (after["status"], after["details"]["code"]) == ("FAILED", "lease_expired")


def test_a_monitor_may_set_another_lease(at_a: Caller, uid: str) -> None:
    at_a.details("start", prod(uid, lease_s=20))
    at_a.details("monitor", of(uid, lease_s=300, until={"duration_s": 0.001}))
    assert at_a.details("status", of(uid))["lease_remaining_s"] > 100


def test_connect_waits_for_the_probe_and_for_hello(
    application: Any, at_a: Caller, at_b: Caller, uid: str
) -> None:
    first = at_a.details("start", {"stream_id": uid, "role": "PROD"})
    assert first["state"] == "WAITING_HELLO"
    second = at_b.details("start", of(uid, "CONS", producer=first["offer"]))
    waiting = at_a.run("connect", of(uid, consumer=second["offer"])).json()
    assert (waiting["status"], waiting["display_status"]) == ("ACTIVE", "waiting for hello")
    at_a.ask("POST", f"/streams/{uid}/PROD/hello", json={"targets": [application.address]}).raise_for_status()
    assert at_a.until_final("connect", waiting)["details"]["state"] == "READY"


def test_connect_may_say_the_targets(application: Any, at_a: Caller, at_b: Caller, uid: str) -> None:
    first = at_a.details("start", {"stream_id": uid, "role": "PROD"})
    second = at_b.details("start", of(uid, "CONS", producer=first["offer"]))
    done = at_a.details("connect", of(uid, consumer=second["offer"], targets=[application.address]))
    assert done["state"] == "READY"


def test_connect_fails_with_words_when_the_instrument_cannot_be_reached(
    at_a: Caller, at_b: Caller, uid: str, free_address: str
) -> None:
    first = at_a.details("start", prod(uid, targets=[free_address], hello_timeout_s=2))
    second = at_b.details("start", of(uid, "CONS", producer=first["offer"], hello_timeout_s=2))
    waiting = at_a.run("connect", of(uid, consumer=second["offer"])).json()
    assert waiting["status"] == "ACTIVE"
    failed = at_a.until_final("connect", waiting)
    assert failed["status"] == "FAILED"
    assert failed["details"]["code"] in ("hello_timeout", "target_unreachable")
    assert "unreachable" in failed["details"]["description"]
    assert free_address in failed["details"]["description"]


def test_connect_fails_when_the_stream_is_gone(at_a: Caller, at_b: Caller, uid: str) -> None:
    first = at_a.details("start", prod(uid))
    second = at_b.details("start", of(uid, "CONS", producer=first["offer"]))
    at_a.details("release", of(uid))
    failed = at_a.done("connect", of(uid, consumer=second["offer"]))
    assert (failed["status"], failed["details"]["code"]) == ("FAILED", "not-found")
    assert "released" in failed["details"]["description"]


def test_what_policy_denies_fails_with_its_words(at_a: Caller, uid: str) -> None:
    failed = at_a.done("start", prod(uid, targets=["192.0.2.1:5000"]))
    assert (failed["status"], failed["details"]["code"]) == ("FAILED", "denied")
    assert "does not allow 192.0.2.1:5000" in failed["details"]["description"]
    assert failed["details"]["hint"]


def test_release_is_idempotent(at_a: Caller, uid: str) -> None:
    at_a.details("start", prod(uid))
    first, second, never = (at_a.details("release", of(name)) for name in (uid, uid, f"{uid}-never"))
    assert [one["released"] for one in (first, second, never)] == [True, True, True]
    assert (first["final"]["reason"], second["final"]["reason"]) == ("released", "released")
    assert "final" not in never


@pytest.mark.parametrize("way", ["action", "rest"])
def test_no_quota_of_a_group_is_escaped_by_keeping_the_group_secret(
    world: World, bob: Person, tmp_path: Path, way: str
) -> None:
    quota = f'[[policy.quota]]\nusers = ["{group_of(bob)}"]\nmax_num_conn = 1\n'
    with with_client(world.globus, tmp_path, "strict", quota=quota) as strict:
        open_, secretive = world.caller(strict, bob), world.caller(strict, bob, consents=[])
        if way == "action":
            refused = secretive.run("start", prod("s", num_conn=2))
            assert "num_conn" in open_.done("start", prod("s", num_conn=2))["details"]["description"]
        else:
            request = {"protocol": 1, "uid": "s", "role": "PROD", "num_conn": 2, "targets": ["127.0.0.1:9"]}
            refused = secretive.ask("POST", "/streams", json=request)
            assert open_.ask("POST", "/streams", json=request).status_code == 403
        assert refused.status_code == 403
        assert "scope" in refused.headers["WWW-Authenticate"]
        assert secretive.ask("GET", "/streams").json()["streams"] == []


def test_a_manager_through_a_group_releases_the_stream(
    world: World, at_a: Caller, bob: Person, uid: str
) -> None:
    at_a.details("start", prod(uid), manage_by=[group_of(bob)])
    assert world.caller(world.a, bob).details("release", of(uid))["final"]["reason"] == "released"
    assert at_a.details("status", of(uid))["reason"] == "released"


# --- the same request again


def test_twenty_threads_with_one_request_start_one_relay(
    world: World, at_a: Caller, uid: str, relays_below: Callable[..., list[int]]
) -> None:
    request_id = str(uuid.uuid4())
    with ThreadPoolExecutor(20) as pool:
        runs = [pool.submit(at_a.run, "start", prod(uid), request_id=request_id) for _ in range(20)]
        answers = [run.result() for run in runs]
    assert sorted({one.status_code for one in answers}) == [200, 202]
    assert [one.status_code for one in answers].count(202) == 1
    assert len({one.json()["action_id"] for one in answers}) == 1
    assert len(relays_below(world.base)) == 1


def test_a_request_id_with_other_content_is_refused_and_another_callers_is_another(
    world: World, at_a: Caller, uid: str, bob: Person
) -> None:
    request_id = "the-flow's-own"
    first = at_a.run("start", prod(uid), request_id=request_id)
    assert (first.status_code, first.json()["status"]) == (202, "SUCCEEDED")
    again = at_a.run("start", prod(uid), request_id=request_id)
    assert (again.status_code, again.json()) == (200, first.json())
    other = at_a.run("start", prod(uid, num_conn=2), request_id=request_id)
    assert (other.status_code, other.json()["code"]) == (409, "conflict")
    at_bobs = world.caller(world.a, bob)
    bobs = at_bobs.run("start", prod(uid), request_id=request_id)
    assert bobs.status_code == 202
    assert bobs.json()["action_id"] != first.json()["action_id"]
    at_bobs.details("release", of(uid))
    assert at_a.details("status", of(uid))["state"] == "LISTENING"


# --- who may


def test_without_a_token_or_with_a_wrong_one_nothing_is_done(
    world: World, at_a: Caller, at_b: Caller, alice: Person, uid: str
) -> None:
    at_a.details("start", prod(uid))
    expired = world.globus.mint(alice, world.a.scope, lifetime_s=-1)
    for headers in (
        {},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": f"Bearer {at_b.token}"},  # of another facility
        {"Authorization": f"Bearer {expired}"},
    ):
        for method, path in (
            ("POST", "/actions/start/run"),
            ("GET", "/actions/monitor/x/status"),
            ("GET", "/actions/start/actions"),
            ("GET", "/streams"),
            ("DELETE", f"/streams/{uid}/PROD"),
        ):
            document = {"request_id": "r", "body": prod(uid)}
            body = {"json": document} if method == "POST" else {}
            answer = httpx.request(method, world.a.url + path, headers=headers, timeout=30, **body)  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), path
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert at_a.details("status", of(uid))["state"] == "LISTENING"


def test_a_stream_of_somebody_else_is_not_there_in_the_same_words(
    world: World, at_a: Caller, bob: Person, uid: str
) -> None:
    offer = at_a.details("start", prod(uid))["offer"]
    consumer = {**offer, "role": "CONS"}
    bobs = world.caller(world.a, bob)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("monitor", {}),
        ("status", {}),
        ("connect", {"consumer": consumer}),
    ]
    for action, more in asked:
        foreign, unknown = (bobs.done(action, of(name, **more))["details"] for name in (uid, f"{uid}-never"))
        assert foreign["code"] == unknown["code"] == "not-found"
        assert foreign["description"].replace(uid, "") == unknown["description"].replace(f"{uid}-never", "")
    assert bobs.details("release", of(uid)) == {"stream_id": uid, "role": "PROD", "released": True}
    assert at_a.details("status", of(uid))["state"] == "LISTENING"


def test_an_action_of_somebody_else_is_forbidden_and_an_unknown_one_not_found(
    world: World, at_a: Caller, bob: Person, uid: str
) -> None:
    at_a.details("start", prod(uid))
    watch = at_a.run("monitor", watching(uid)).json()["action_id"]
    bobs = world.caller(world.a, bob)
    for method, path in (("GET", "status"), ("GET", "log"), ("POST", "cancel"), ("POST", "release")):
        assert bobs.ask(method, f"/actions/monitor/{watch}/{path}").status_code == 403
        assert at_a.ask(method, f"/actions/monitor/{uuid.uuid4()}/{path}").status_code == 404
        assert at_a.ask(method, f"/actions/start/{watch}/{path}").status_code == 404  # of another provider
    assert at_a.status("monitor", watch)["status"] == "ACTIVE"
    at_a.ask("POST", f"/actions/monitor/{watch}/cancel")


@pytest.mark.parametrize("by", ["identity", "group"])
def test_monitor_by_may_look_and_manage_by_may_end(
    world: World, at_a: Caller, bob: Person, uid: str, by: str
) -> None:
    named = [bob.urn if by == "identity" else group_of(bob)]
    bobs = world.caller(world.a, bob)
    at_a.details("start", prod(uid), monitor_by=named)
    watch = at_a.run("monitor", watching(uid), monitor_by=named).json()
    path = f"/actions/monitor/{watch['action_id']}"
    assert watch["monitor_by"] == named
    assert bobs.ask("GET", f"{path}/status").json()["status"] == "ACTIVE"
    assert bobs.ask("POST", f"{path}/cancel").status_code == 403
    # the stream has the same rights
    assert bobs.ask("GET", f"/streams/{uid}/PROD").json()["state"] == "LISTENING"
    assert bobs.ask("DELETE", f"/streams/{uid}/PROD").status_code == 403
    refused = bobs.done("release", of(uid))
    assert (refused["status"], refused["details"]["code"]) == ("FAILED", "denied")
    assert bobs.details("status", of(uid))["state"] == "LISTENING"
    assert bobs.details("monitor", watching(uid, duration_s=0.001))["ended_by"] == "duration"
    at_a.ask("POST", f"{path}/cancel")

    other = at_a.run("monitor", watching(uid), manage_by=named).json()["action_id"]
    assert bobs.ask("POST", f"/actions/monitor/{other}/cancel").json()["status"] == "FAILED"
    assert bobs.ask("POST", f"/actions/monitor/{other}/release").status_code == 200


def test_linked_identities_are_the_same_caller(world: World, alice: Person, at_a: Caller, uid: str) -> None:
    home = world.globus.add_person("alice@home.example", linked=[alice])
    watch = at_a.run("start", prod(uid)).json()["action_id"]
    linked = world.caller(world.a, home)
    assert linked.ask("GET", f"/actions/start/{watch}/status").status_code == 200
    assert linked.ask("GET", f"/streams/{uid}/PROD").status_code == 200


def test_when_globus_auth_does_not_answer_nobody_comes_in(world: World, alice: Person, uid: str) -> None:
    fresh = world.caller(world.a, alice)
    world.globus.down("503")
    try:
        answer = fresh.run("start", prod(uid))
    finally:
        world.globus.up()
    assert (answer.status_code, answer.json()["code"]) == (502, "auth-unavailable")
    assert fresh.details("start", prod(uid))["state"] == "LISTENING"


# --- requests that cannot be


@pytest.mark.parametrize(
    "body",
    [
        {"role": "PROD"},
        {"stream_id": "s"},
        {"stream_id": "../s", "role": "PROD"},
        {"stream_id": "s", "role": "producer"},
        {"stream_id": "s", "role": "PROD", "num_conn": 0},
        {"stream_id": "s", "role": "PROD", "num_conn": 257},
        {"stream_id": "s", "role": "PROD", "targets": ["nope"]},
        {"stream_id": "s", "role": "PROD", "uid": "s"},
        {"stream_id": "s", "role": "PROD", "surprise": 1},
        {"stream_id": "s", "role": "CONS"},
        {"stream_id": "s", "role": "CONS", "producer": {}},
    ],
)
def test_an_input_that_is_wrong_is_refused_with_its_field(at_a: Caller, body: dict[str, Any]) -> None:
    answer = at_a.run("start", body)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad-request")
    assert answer.json()["message"].startswith("the request is wrong: body")


@pytest.mark.parametrize(
    "more",
    [
        {"monitor_by": ["urn:bad"]},
        {"manage_by": "urn:globus:auth:identity:x"},
        {"deadline": "2001-01-01T00:00:00Z"},
        {"deadline": "2999-01-01T00:00:00Z"},
        {"deadline": 12},
        {"label": "x" * 65},
        {"label": ""},
        {"release_after": "soon"},
        {"release_after": "-P1D"},
        {"release_after": "P1000D"},
        {"request_id": ""},
        {"surprise": 1},
        {"allowed_clients": ["somebody"]},
    ],
)
def test_a_request_that_is_wrong_is_refused(at_a: Caller, more: dict[str, Any]) -> None:
    answer = at_a.run("start", prod("never"), **more)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad-request")


def test_a_role_that_lacks_its_field_is_told_its_name(at_a: Caller) -> None:
    answer = at_a.run("start", {"stream_id": "s", "role": "CONS"})
    assert "producer: a CONS request needs the offer" in answer.json()["message"]


@pytest.mark.parametrize("field", ["request_id", "label"])
def test_half_a_character_is_refused(at_a: Caller, field: str) -> None:
    text = '{"request_id": "r", "body": {"stream_id": "s", "role": "PROD"}, "%s": "\\ud800"}' % field  # noqa: UP031
    answer = at_a.ask(
        "POST", "/actions/start/run", content=text, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "bad-request")


def test_optional_fields_may_be_null(at_a: Caller, uid: str) -> None:
    nothing = dict.fromkeys(
        ("label", "monitor_by", "manage_by", "deadline", "release_after", "allowed_clients")
    )
    status = at_a.run("start", prod(uid), **nothing).json()
    assert status["status"] == "SUCCEEDED"
    assert None not in status.values()


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"text"', "nul", "\x00", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000]
)
def test_what_is_no_json_object_is_refused(at_a: Caller, text: str) -> None:
    answer = at_a.ask(
        "POST", "/actions/start/run", content=text, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert answer.json()["code"] == "bad-request"


def test_a_body_that_is_not_json_is_a_bad_request(at_a: Caller) -> None:
    answer = at_a.ask("POST", "/actions/start/run", content="{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["message"]) == (400, "the body is not JSON")


@pytest.mark.parametrize("announced", ["its length", "nothing"])
def test_a_body_that_is_too_large_is_refused(at_a: Caller, announced: str) -> None:
    large = b'{"request_id": "' + b"x" * 400_000 + b'"}'
    content: Any = iter([large[:200_000], large[200_000:]]) if announced == "nothing" else large
    answer = at_a.ask(
        "POST", "/actions/start/run", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413
    assert "larger" in answer.json()["message"]


def test_errors_of_the_framework_are_json_too(at_a: Caller) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/actions/nothing/", 404),
        ("PUT", "/actions/start/run", 405),
        ("PATCH", "/health", 405),
    ):
        answer = at_a.ask(method, path)
        assert answer.status_code == status
        assert {"protocol", "code", "message"} <= set(answer.json())
        assert status != 405 or answer.headers["Allow"]


# --- the interface


@pytest.mark.parametrize("action", ["start", "connect", "monitor", "status", "release"])
def test_anybody_may_read_what_an_action_is(world: World, action: str) -> None:
    for path in (f"/actions/{action}/", f"/actions/{action}"):
        answer = httpx.get(world.a.url + path, timeout=30)
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert httpx.options(world.a.url + path, timeout=30).headers["Access-Control-Allow-Origin"] == "*"
    document = answer.json()
    assert document["globus_auth_scope"] == world.a.scope
    assert (document["api_version"], document["types"]) == ("1.0", ["Action"])
    assert document["input_schema"]["additionalProperties"] is False
    assert "stream_id" in document["input_schema"]["required"]
    assert document["maximum_deadline"] == "P30D"
    assert None not in document.values()


def test_the_names_of_version_1_1_are_the_same_actions(at_a: Caller, uid: str) -> None:
    run = at_a.ask("POST", "/actions/start/actions", json={"request_id": "one", "body": prod(uid)})
    assert run.status_code == 202
    action = run.json()["action_id"]
    assert at_a.ask("GET", f"/actions/start/actions/{action}").json() == at_a.status("start", action)
    assert at_a.ask("GET", f"/actions/start/actions/{action}/log").status_code == 200
    assert at_a.ask("POST", f"/actions/start/actions/{action}/cancel").json()["status"] == "SUCCEEDED"
    assert at_a.ask("DELETE", f"/actions/start/actions/{action}").status_code == 200
    assert at_a.ask("GET", f"/actions/start/actions/{action}").status_code == 404


def test_an_action_is_released_when_it_has_ended_and_then_gone_for_ever(at_a: Caller, uid: str) -> None:
    at_a.details("start", prod(uid))
    watch = at_a.run("monitor", watching(uid), request_id="watch").json()["action_id"]
    early = at_a.ask("POST", f"/actions/monitor/{watch}/release")
    assert (early.status_code, early.json()["code"]) == (409, "conflict")
    at_a.ask("POST", f"/actions/monitor/{watch}/cancel")
    last = at_a.ask("POST", f"/actions/monitor/{watch}/release")
    assert (last.status_code, last.json()["status"]) == (200, "FAILED")
    for method, path in (("GET", "status"), ("POST", "cancel"), ("POST", "release"), ("GET", "log")):
        assert at_a.ask(method, f"/actions/monitor/{watch}/{path}").status_code == 404


def test_an_action_is_forgotten_after_release_after(
    at_a: Caller, uid: str, within: Callable[..., None]
) -> None:
    status = at_a.run("release", of(uid), release_after="PT0.2S").json()
    assert status["release_after"] == "PT0.2S"
    path = f"/actions/release/{status['action_id']}/status"
    within(lambda: at_a.ask("GET", path).status_code == 404)


def test_an_action_fails_at_its_deadline_and_leaves_the_stream_alone(at_a: Caller, uid: str) -> None:
    at_a.details("start", prod(uid))
    watch = at_a.run("monitor", watching(uid), deadline=in_time(1)).json()
    end = at_a.until_final("monitor", watch)
    assert (end["status"], end["details"]["code"]) == ("FAILED", "deadline")
    assert at_a.details("status", of(uid))["state"] == "LISTENING"


def test_enumerate_lists_the_callers_actions_by_role_and_status(
    world: World, at_a: Caller, bob: Person, uid: str
) -> None:
    at_a.details("start", prod(uid))
    watch = at_a.run("monitor", watching(uid), monitor_by=[group_of(bob)], label="mine").json()

    def listed(caller: Caller, query: str) -> list[str]:
        answer = caller.ask("GET", f"/actions/monitor/actions{query}").raise_for_status().json()
        return [one["action_id"] for one in answer]

    bobs = world.caller(world.a, bob)
    assert listed(at_a, "") == [watch["action_id"]]
    assert watch["label"] == "mine"
    assert listed(at_a, "?status=succeeded,failed") == []
    assert listed(bobs, "") == []
    assert listed(bobs, "?roles=monitor_by,creator_id") == [watch["action_id"]]
    at_a.ask("POST", f"/actions/monitor/{watch['action_id']}/cancel")
    assert listed(at_a, "?status=FAILED") == [watch["action_id"]]
    assert at_a.ask("GET", "/actions/monitor/actions?status=odd").status_code == 422


def test_the_log_of_an_action_says_what_happened(at_a: Caller, uid: str) -> None:
    done = at_a.run("start", prod(uid)).json()
    log = at_a.ask("GET", f"/actions/start/{done['action_id']}/log").json()
    assert [entry["code"] for entry in log["entries"]] == ["succeeded", "begun"]
    assert (log["limit"], log["has_next_page"]) == (100, False)
    first = at_a.ask("GET", f"/actions/start/{done['action_id']}/log?limit=1").json()
    assert len(first["entries"]) == 1
