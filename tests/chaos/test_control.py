"""The control plane under faults: services restarted or doubled, calls that come twice or late, tokens that expire."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from conftest import relay_pids
from relay.apps import Applications, Payload
from relay.gateway import eventually
from serving import Served, serving
from standins.globus import Globus

from scistream_flows.config import load_facility
from scistream_flows.errors import ScistreamError, Unauthenticated
from scistream_flows.facility import LocalFacility, RestFacility, _Verbs
from scistream_flows.models import Release, Renewal, Request, Role, StatusQuery, read
from scistream_flows.s2cs import S2CS
from scistream_flows.stream import Stream, open_stream

from .report import DEAD, PAST, Record
from .scene import DETECT_S, FACILITIES, LEASE_SLACK_S, ROLES, Scene, frozen

STREAMS: Final = 50
# A relay that does not answer is waited for 5 s.
FROZEN_S: Final = 8.0


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_services_that_are_killed_with_fifty_running_streams_find_all_of_them(
    scene: Scene, record: Record, chance: random.Random
) -> None:
    """Both services are killed and started again: every stream carries on meanwhile, and each is found and released."""
    server = scene.apps.listen()
    streams: list[Stream] = []
    ends: list[tuple[socket.socket, socket.socket]] = []
    for number in range(STREAMS):
        options = {"mode": chance.choice(["tls", "auth", "none"]), "lease_s": 300, "uid": f"s{number}"}
        streams.append(scene.open(server, probe="path", **options))
        ends.append(scene.converse(server, streams[-1].listeners[0]))
    record.notes["streams"] = STREAMS
    record.struck()
    for role in ROLES:
        scene.kill_service(role)
    for number, (consumer, producer) in enumerate(ends):
        sizes = [chance.randrange(1, 500_000) for _ in range(2)]
        scene.apps.exchange(consumer, producer, Payload(number, sizes[0]), Payload(number + 100, sizes[1]))
    with record.recovering():
        for role in ROLES:
            scene.start_service(role)
        for role in ROLES:
            found = {one.uid: one.state for one in scene.list(role).streams}
            assert found == {one.uid: "STREAMING" for one in streams} | {"bystander": "STREAMING"}
    for stream in streams:
        end = stream.release()
        assert end.reasons == {"PROD": "released", "CONS": "released"}
        assert end.prod.bytes == end.cons.bytes


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_two_services_on_one_registry_are_one_facility(
    scene: Scene, record: Record, chance: random.Random
) -> None:
    """The same calls to either, at the same moment: one relay for each stream, and both tell the same."""
    with serving(scene.base, "site-a") as second:
        clients = [
            scene.client("PROD"),
            RestFacility(second.url, authorizer=lambda _: second.token, deadline_s=30),
        ]
        server = scene.apps.listen()
        target = ["{}:{}".format(*server.getsockname())]
        requests = [
            read(Request, {"protocol": 1, "uid": f"s{number}", "role": "PROD", "targets": target})
            for number in range(8)
        ]
        calls = [(client, request) for request in requests for client in clients for _ in range(3)]
        chance.shuffle(calls)
        with ThreadPoolExecutor(8) as pool:
            offers = list(pool.map(lambda call: call[0].request(call[1]), calls))
        by_name: dict[str, set[str]] = {}
        for offer in offers:
            by_name.setdefault(offer.uid, set()).add(offer.relays[0].relay_id)
        assert all(len(relays) == 1 for relays in by_name.values()), by_name
        told = [{(one.uid, one.state) for one in client.list().streams} for client in clients]
        assert told[0] == told[1]
        record.struck()
        (victim,) = [
            row for row in scene.gateway("PROD").verb("list")["relays"] if row["relay_id"] in by_name["s0"]
        ]
        os.kill(victim["pid"], signal.SIGKILL)
        eventually(
            lambda: all(
                client.status(StatusQuery(uid="s0", role="PROD")).reason == "relay_lost" for client in clients
            )
        )
        record.notes[DEAD] = record.detected()
        assert record.notes[DEAD] <= DETECT_S
        releases = [
            (client, Release(uid=f"s{number}", role="PROD")) for number in range(8) for client in clients
        ]
        chance.shuffle(releases)
        with ThreadPoolExecutor(8) as pool:
            ends = list(pool.map(lambda call: call[0].release(call[1]), releases))
        assert all(one.end is not None for one in ends)
        clients[1].close()


@pytest.mark.chaos
@pytest.mark.parametrize("step", ["claimed", "started"])
def test_a_service_waits_for_the_other_that_is_opening_the_same_stream(
    scene: Scene, record: Record, step: str
) -> None:
    """One stands still in the midst of a request; the same to the other is answered when that goes on, no sooner."""
    with serving(scene.base, "site-a", stopped_at=step) as second, ThreadPoolExecutor(2) as pool:
        slow = RestFacility(second.url, authorizer=lambda _: second.token, deadline_s=30)
        target = ["{}:{}".format(*scene.apps.listen().getsockname())]
        request = read(Request, {"protocol": 1, "uid": "s", "role": "PROD", "targets": target})
        opening = pool.submit(slow.request, request)
        process = psutil.Process(second.process.pid)
        try:
            eventually(lambda: process.status() == psutil.STATUS_STOPPED)
            record.struck()
            waiting = pool.submit(scene.client("PROD").request, request)
            time.sleep(1)
            assert not waiting.done(), waiting.result()
        finally:
            process.resume()
        with record.recovering():
            offers = [opening.result(), waiting.result()]
        assert offers[0].relays == offers[1].relays
        named = [row["relay_id"] for row in scene.gateway("PROD").verb("list")["relays"]]
        assert len(named) == 2  # this one, and the bystander's
        assert offers[0].relays[0].relay_id in named
        slow.release(Release(uid="s", role="PROD"))
        slow.close()


class Unreliable(_Verbs):
    """A way to a facility on which calls are delayed, and come twice: at once, and again in any order later."""

    def __init__(self, way: _Verbs, chance: random.Random) -> None:
        self._way = way
        self._chance = chance
        self._again: list[threading.Thread] = []
        self.sent: list[tuple[str, str]] = []

    @property
    def name(self) -> str:
        return self._way.name

    def close(self) -> None:
        self._way.close()

    def _answer(self, verb: str, document: str) -> dict[str, Any]:
        time.sleep(self._chance.uniform(0, 0.05))
        for _ in range(self._chance.choice((0, 1, 2))):
            self.repeat(verb, document, after_s=self._chance.uniform(0, 0.1))
        self.sent.append((verb, document))
        return self._way._answer(verb, document)

    def repeat(self, verb: str, document: str, *, after_s: float) -> None:
        """The same call once more, in a while; nobody waits for its answer."""

        def send() -> None:
            time.sleep(after_s)
            with contextlib.suppress(ScistreamError):
                self._way._answer(verb, document)

        self._again.append(threading.Thread(target=send))
        self._again[-1].start()

    def storm(self, *, but: tuple[str, ...]) -> None:
        """Every call so far once more, in another order; returns when all have been answered."""
        calls = [one for one in self.sent if one[0] not in but]
        self._chance.shuffle(calls)
        for verb, document in calls:
            self.repeat(verb, document, after_s=self._chance.uniform(0, 0.2))
        self.settle()

    def settle(self) -> None:
        """Returns when nothing is under way any more."""
        for thread in self._again:
            thread.join(60)
            assert not thread.is_alive()
        self._again.clear()


def over_http(scene: Scene, role: Role) -> RestFacility:
    return RestFacility(scene.url(role), authorizer=lambda _: scene.services[role].token, deadline_s=30)


def in_process(scene: Scene, role: Role) -> LocalFacility:
    """A second service of the same facility, here."""
    name = FACILITIES[role]
    config = load_facility(name, file=scene.base / f"{name}.toml", environment=scene.environment)
    return LocalFacility(S2CS(config))


@pytest.mark.parametrize("way", [over_http, pytest.param(in_process, marks=pytest.mark.chaos)])
def test_calls_that_come_twice_late_and_in_any_order_change_nothing(
    scene: Scene, record: Record, chance: random.Random, way: Callable[[Scene, Role], _Verbs]
) -> None:
    """The stream that they belong to goes on untouched; what a late request opens after the release, its lease ends."""
    lease_s = 3
    sides: dict[Role, Unreliable] = {role: Unreliable(way(scene, role), chance) for role in ROLES}
    server = scene.apps.listen()
    target = "{}:{}".format(*server.getsockname())
    stream = open_stream(
        sides["PROD"],
        sides["CONS"],
        targets=[target],
        uid="s",
        until="released",
        lease_s=lease_s,
        probe="path",
    )
    ends = scene.converse(server, stream.listeners[0])
    before = {role: scene.relay_pid(role) for role in ROLES}
    for side in sides.values():
        side.storm(but=("release",))
    assert {role: scene.relay_pid(role) for role in ROLES} == before
    scene.apps.exchange(*ends, Payload(1, 2_000_000), Payload(2, 2_000_000))
    assert stream.release().reasons == {"PROD": "released", "CONS": "released"}
    for side in sides.values():
        side.settle()
    for side in sides.values():  # what was delayed for so long that the stream is over
        side.storm(but=())
    record.struck()
    opened_at = time.monotonic()
    eventually(lambda: all(not _named(scene, role, "s") for role in ROLES), within_s=30)
    over_s = time.monotonic() - opened_at - lease_s
    assert over_s <= LEASE_SLACK_S
    record.notes[PAST] = round(max(0.0, over_s), 3)
    for side in sides.values():
        side.close()


def _named(scene: Scene, role: Role, uid: str) -> list[object]:
    return [one for one in scene.list(role).streams if one.uid == uid]


@pytest.mark.chaos
def test_releases_at_any_moment_of_opening_leave_nothing(
    scene: Scene, record: Record, chance: random.Random
) -> None:
    """A release before, while and after a request, several at once: none fails, and after the last nothing is there."""
    server = scene.apps.listen()
    for turn in range(10):
        opened: list[Stream] = []

        def open_it() -> None:
            with contextlib.suppress(ScistreamError):
                opened.append(scene.open(server, uid="s", probe="path", ready_timeout_s=5))  # noqa: B023

        opening = scene.apps.task(open_it)
        time.sleep(chance.uniform(0, 0.4))
        with ThreadPoolExecutor(4) as pool:
            calls = [
                (role, pool.submit(scene.client(role).release, Release(uid="s", role=role)))
                for role in ROLES * 2
            ]
            for role, call in calls:
                assert call.result().role == role
        opening.result()
        record.struck()
        for role in ROLES:
            scene.client(role).release(Release(uid="s", role=role))
            assert _named(scene, role, "s") == [], turn
        record.recovered()


@pytest.mark.chaos
@pytest.mark.parametrize("role", ROLES)
def test_a_relay_that_is_frozen_is_said_and_ends_with_its_release(
    scene: Scene, record: Record, role: Role
) -> None:
    """Who asks for its status is told in bounded time; a release ends it, though it does not listen."""
    server = scene.apps.listen()
    stream = scene.open(server, uid="s", lease_s=60)
    pid = scene.relay_pid(role)
    with frozen(pid):
        record.struck()
        with pytest.raises(ScistreamError, match="does not answer"):
            scene.status(role)
        assert record.detected() < FROZEN_S  # asked once: who has not answered for so long is not asked again
        with record.recovering():
            end = stream.release()
    assert end.reasons[role] == "relay_lost"
    assert not end.in_order
    assert pid not in relay_pids(scene.base)


GLOBUS: Final = """
[globus]
client_id = "{client_id}"
client_secret_file = "{secret}"
"""


@pytest.fixture
def with_globus(tmp_path: Path) -> Iterator[tuple[Globus, str, dict[Role, Served]]]:
    """The stand-in for Globus, a scope, and two facilities that ask it who calls."""
    with Globus() as globus, contextlib.ExitStack() as stack:
        client, scope = globus.add_facility()
        secret = tmp_path / "secret"
        secret.write_text(str(client.secret))
        secret.chmod(0o600)
        more = GLOBUS.format(client_id=client.id, secret=secret)
        served = {
            role: stack.enter_context(serving(tmp_path, name, more=more, environment=globus.environment))
            for role, name in (("PROD", "site-a"), ("CONS", "site-b"))
        }
        yield globus, scope, served  # type: ignore[misc]
    assert relay_pids(tmp_path, patience_s=5) == []


@pytest.mark.chaos
def test_a_token_that_expires_in_mid_stream_stops_calls_and_no_byte(
    with_globus: tuple[Globus, str, dict[Role, Served]], apps: Applications, record: Record
) -> None:
    """Without a token nobody renews or releases; bytes that move renew the lease; with a new token all goes on."""
    globus, scope, served = with_globus
    ada = globus.add_person("ada@example.org")
    token = [globus.mint(ada, scope, lifetime_s=8)]
    sides: dict[Role, RestFacility] = {
        role: RestFacility(one.url, authorizer=lambda _: token[0], deadline_s=20)
        for role, one in served.items()
    }
    server = apps.listen()
    target = "{}:{}".format(*server.getsockname())
    stream = open_stream(sides["PROD"], sides["CONS"], targets=[target], uid="s", lease_s=3, until="released")
    host, _, port = stream.listeners[0].rpartition(":")
    consumer = apps.dial((host, int(port)))
    producer = apps.accept(server)

    def refused() -> bool:
        consumer.sendall(b"?")  # a byte now and then keeps the lease
        assert producer.recv(1) == b"?"
        try:
            sides["PROD"].renew(Renewal(uid="s", role="PROD"))
        except Unauthenticated:
            return True
        return False

    record.struck()
    eventually(refused, within_s=30, every_s=0.3)
    record.detected()
    with pytest.raises(Unauthenticated):
        stream.release()
    until = time.monotonic() + 5  # longer than the lease
    while time.monotonic() < until:
        consumer.sendall(b"?")
        assert producer.recv(1) == b"?"
        time.sleep(0.2)
    apps.exchange(consumer, producer, Payload(1, 2_000_000), Payload(2, 2_000_000))
    with record.recovering():
        token[0] = globus.mint(ada, scope)
        stream.renew()
    assert stream.release().reasons == {"PROD": "released", "CONS": "released"}
    for one in sides.values():
        one.close()
