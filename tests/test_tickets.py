"""Late binding: an application on a node that nobody knew before says where it is, with a ticket from its workflow."""

from __future__ import annotations

import hashlib
import json
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, serving

from scistream_flows import connect_facility, open_stream, say_hello
from scistream_flows.errors import (
    BadRequest,
    CapacityExhausted,
    FacilityUnreachable,
    NotFound,
    PolicyDenied,
    ScistreamError,
    StreamNotReady,
    Unauthenticated,
)
from scistream_flows.facility import RestFacility
from scistream_flows.models import Ticket, split_address
from scistream_flows.registry import MOST_TICKETS
from scistream_flows.s2cs import S2CS

Talk = Callable[[str, bytes], str]
Make = Callable[..., S2CS]

OWNER = "urn:globus:auth:identity:00000000-0000-4000-8000-000000000001"
MONITOR = "urn:globus:auth:identity:00000000-0000-4000-8000-000000000002"
NOT_HERE = "127.0.0.77/32"  # so that nobody else on loopback may connect


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- over HTTP, as a job meets it


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def aps(base: Path) -> Iterator[Served]:
    with serving(base, "aps") as served:
        yield served


@pytest.fixture(scope="module")
def alcf(base: Path) -> Iterator[Served]:
    with serving(base, "alcf") as served:
        yield served


@pytest.fixture
def far(
    base: Path, monkeypatch: pytest.MonkeyPatch, relays_below: Callable[..., list[int]]
) -> Iterator[None]:
    monkeypatch.setenv("SCISTREAM_STATE_DIR", str(base))
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(base / "none"))
    yield
    assert relays_below(base, patience_s=5) == []


def is_refused(address: str) -> bool:
    """Whether a LAN listener lets nobody in from here."""
    try:
        with socket.create_connection(split_address(address), timeout=10) as connection:
            return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.usefixtures("far")
def test_a_consumer_that_nobody_knew_comes_in_with_a_ticket(
    aps: Served, alcf: Served, application: Any, talk: Talk
) -> None:
    options: dict[str, Any] = {"targets": [application.address], "consumers": [NOT_HERE], "linger_s": 1}
    with open_stream(aps.url, alcf.url, **options) as stream:
        (listener,) = stream.listeners
        assert is_refused(listener)
        ticket = stream.ticket("CONS", networks=["127.0.0.0/24"], expires_s=60)
        assert (ticket.url, ticket.facility, ticket.networks) == (alcf.url, "alcf", ["127.0.0.0/24"])
        # it travels as text, or as the object
        for one in (ticket.model_dump_json(), pickle.loads(pickle.dumps(ticket))):  # noqa: S301 - our own
            assert say_hello(one).addresses == [listener]
        assert talk(listener, b"hello") == sha(application.payload)
        stream.wait(20).check()


@pytest.mark.usefixtures("far")
def test_a_producer_that_nobody_knew_is_connected_to_with_a_ticket(
    aps: Served, alcf: Served, application: Any, talk: Talk
) -> None:
    with open_stream(aps.url, alcf.url, targets=[], linger_s=1) as stream:
        assert stream.status().prod.state == "WAITING_HELLO"
        with pytest.raises(StreamNotReady, match="no target was named"):
            stream.wait_ready(timeout_s=0.3)
        say_hello(stream.ticket("PROD"), targets=[application.address])
        stream.wait_ready(timeout_s=20)
        assert talk(stream.listeners[0], b"hello") == sha(application.payload)
        stream.wait(20).check()


@pytest.mark.usefixtures("far")
def test_the_workflow_itself_says_hello_when_it_learns_the_target(
    aps: Served, alcf: Served, application: Any, talk: Talk
) -> None:
    with open_stream(aps.url, alcf.url, targets=[], consumers=[NOT_HERE], linger_s=1) as stream:
        stream.hello("PROD", targets=[application.address])
        stream.wait_ready(timeout_s=20)
        stream.hello("CONS", consumers=["127.0.0.1"])
        assert talk(stream.listeners[0], b"hello") == sha(application.payload)
        stream.wait(20).check()


@pytest.mark.usefixtures("far")
def test_a_ticket_is_no_token(aps: Served, alcf: Served, application: Any) -> None:
    with open_stream(aps.url, alcf.url, targets=[application.address]) as stream:
        secret = stream.ticket("CONS").ticket
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/hello"), ("POST", "/ticket")):
            answer = httpx.request(
                method,
                f"{alcf.url}/streams/{stream.uid}/CONS{path}",
                headers={"Authorization": f"Bearer {secret}"},
                timeout=30,
            )
            assert answer.status_code == 401
        with RestFacility(alcf.url, authorizer=lambda _: secret) as facility, pytest.raises(Unauthenticated):
            facility.list()


@pytest.mark.usefixtures("far")
def test_of_several_tickets_the_first_that_counts_is_used(
    aps: Served, alcf: Served, application: Any
) -> None:
    """As for a job that is tried again on another node."""
    with open_stream(aps.url, alcf.url, targets=[application.address], consumers=[NOT_HERE]) as stream:
        used, fresh = stream.ticket("CONS"), stream.ticket("CONS")
        elsewhere = httpx.HTTPTransport(local_address="127.0.0.5")
        with httpx.Client(transport=elsewhere, timeout=30) as another_node:
            said = another_node.post(f"{alcf.url}/hello", json={"ticket": used.ticket})
            assert said.raise_for_status().json()["uid"] == stream.uid
        with pytest.raises(Unauthenticated, match="was used"):
            say_hello(used)
        assert say_hello([used, fresh.model_dump_json()]).addresses == stream.listeners
        with pytest.raises(Unauthenticated, match="was used"):
            say_hello([used, used])
        with connect_facility(alcf.url) as facility:  # type: ignore[attr-defined]
            assert facility.list().streams[0].relays[0].sources == [NOT_HERE, "127.0.0.5/32", "127.0.0.1/32"]


def test_a_ticket_that_leads_nowhere_is_refused_in_words(free_address: str) -> None:
    about = {"facility": "aps", "uid": "s", "role": "CONS", "networks": ["127.0.0.0/8"], "expires_s": 60}
    ticket = {"protocol": 1, "ticket": "sst_" + 43 * "x", **about}
    with pytest.raises(BadRequest, match="does not say where the service of facility aps is"):
        say_hello(ticket)
    with pytest.raises(BadRequest, match="there is no ticket"):
        say_hello([])
    with pytest.raises(BadRequest, match="plain http"):
        say_hello(ticket, url="http://aps.example.org")
    with pytest.raises(FacilityUnreachable, match="Connection refused"):
        say_hello(ticket, url=free_address, deadline_s=0.5)


# --- what a ticket is good for


@pytest.fixture
def prod(facility: Make) -> Callable[..., tuple[S2CS, Ticket]]:
    """A function that opens PROD and draws a ticket for it."""

    def make(**wish: Any) -> tuple[S2CS, Ticket]:
        service = facility()
        service.request({"protocol": 1, "uid": "s", "role": "PROD", "monitors": [MONITOR]}, owner=OWNER)
        return service, drawn(service, **wish)

    return make


def drawn(service: S2CS, *, owner: str = OWNER, **wish: Any) -> Ticket:
    return service.ticket({"protocol": 1, "uid": "s", "role": "PROD", **wish}, owner=owner)


def hello(service: S2CS, ticket: Ticket, *, by: str = "127.0.0.1", **more: Any) -> Any:
    document = {"protocol": 1, "ticket": ticket.ticket, "targets": ["127.0.0.1:9"], **more}
    return service.hello_by_ticket(document, caller_address=by)


def released(service: S2CS) -> None:
    service.release({"protocol": 1, "uid": "s", "role": "PROD"}, owner=OWNER)


Prod = Callable[..., tuple[S2CS, Ticket]]


def test_it_is_for_one_hello_which_may_be_said_again(prod: Prod) -> None:
    service, ticket = prod()
    first = hello(service, ticket)
    assert hello(service, ticket).relays == first.relays
    for other in ({"by": "127.0.0.2"}, {"targets": ["127.0.0.1:10"]}):
        with pytest.raises(Unauthenticated, match="not known, has expired, or was used"):
            hello(service, ticket, **other)
    (relay,) = service.status({"protocol": 1, "uid": "s", "role": "PROD"}, owner=OWNER).relays
    assert relay.targets == ["127.0.0.1:9"]
    released(service)


def test_of_many_who_use_it_at_once_one_is_let_in(prod: Prod) -> None:
    service, ticket = prod()

    def use(number: int) -> str:
        try:
            hello(service, ticket, by=f"127.0.0.{number}")
        except Unauthenticated:
            return "refused"
        return "let in"

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(use, range(1, 9))) == ["let in", *7 * ["refused"]]
    released(service)


def test_it_expires(prod: Prod, within: Callable[..., None]) -> None:
    service, ticket = prod(expires_s=1)

    def counts() -> bool:
        try:
            hello(service, ticket, by="192.0.2.1")  # uses nothing up
        except PolicyDenied:
            return True
        except Unauthenticated:
            return False
        raise AssertionError("let in")

    assert counts()
    within(lambda: not counts(), timeout_s=10)
    with pytest.raises(Unauthenticated):
        hello(service, ticket)
    released(service)


def test_it_is_bound_to_its_networks(prod: Prod) -> None:
    service, ticket = prod(networks=["127.0.0.0/30"])
    with pytest.raises(PolicyDenied, match=r"not for 127\.0\.0\.9"):
        hello(service, ticket, by="127.0.0.9")
    with pytest.raises(PolicyDenied, match=r"not for 127\.0\.0\.9"):
        hello(service, ticket, targets=["127.0.0.9:9"])
    for nonsense in ("", "localhost", "::1%lo"):
        with pytest.raises(PolicyDenied):
            hello(service, ticket, by=nonsense)
    assert hello(service, ticket, by="::ffff:127.0.0.1").uid == "s"  # as a socket of both versions says it
    released(service)


def test_it_ends_with_its_stream(prod: Prod) -> None:
    service, ticket = prod()
    released(service)
    with pytest.raises(NotFound, match="has ended: released"):
        hello(service, ticket)
    service.request({"protocol": 1, "uid": "s", "role": "PROD"}, owner=OWNER)  # another one, of the same name
    with pytest.raises(Unauthenticated):
        hello(service, ticket)
    released(service)


@pytest.mark.parametrize(
    ("wish", "error", "words"),
    [
        ({"owner": MONITOR}, PolicyDenied, "may monitor stream 's'"),
        ({"owner": "urn:x:stranger"}, NotFound, "no stream 's'"),
        ({"networks": ["192.0.2.0/24"]}, PolicyDenied, "does not allow 192"),
        ({"networks": ["127.0.0.0/7"]}, PolicyDenied, "does not allow 126"),
        ({"networks": ["here"]}, BadRequest, "networks"),
        ({"expires_s": 0}, BadRequest, "expires_s"),
        ({"expires_s": 90_000}, PolicyDenied, "above the limit"),
        ({"uid": "other"}, NotFound, "no stream 'other'"),
    ],
    ids=str,
)
def test_who_may_not_draw_one_is_told_why(
    prod: Prod, wish: dict[str, Any], error: type[ScistreamError], words: str
) -> None:
    service, _ = prod()
    with pytest.raises(error, match=words):
        drawn(service, **wish)
    released(service)


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"ticket": "sst_" + 43 * "x"}, Unauthenticated),
        ({"ticket": "x"}, BadRequest),
        ({"ticket": "sst_" + 44 * "x"}, BadRequest),
        ({"ticket": ["x"]}, BadRequest),
        ({}, BadRequest),
        ({"targets": []}, BadRequest),
        ({"consumers": ["127.0.0.1"]}, BadRequest),
        ({"targets": ["192.0.2.1:9"]}, PolicyDenied),
    ],
    ids=str,
)
def test_what_is_no_hello_uses_nothing_up(
    prod: Prod, document: dict[str, Any], error: type[ScistreamError]
) -> None:
    service, ticket = prod()
    asked = {"protocol": 1, "targets": ["127.0.0.1:9"], **document}
    if document and "ticket" not in document:
        asked["ticket"] = ticket.ticket
    with pytest.raises(error):
        service.hello_by_ticket(asked, caller_address="127.0.0.1")
    assert hello(service, ticket).uid == "s"
    released(service)


def test_a_stream_has_so_many_at_most(prod: Prod) -> None:
    service, _ = prod()
    for _ in range(MOST_TICKETS - 1):
        service._registry.keep_ticket(
            str(time.monotonic()),
            service._registry.named("s", "PROD")[0],
            networks=["127.0.0.0/8"],
            expires_s=60,
        )
    with pytest.raises(CapacityExhausted, match="256 tickets"):
        drawn(service)
    released(service)


def test_nobody_finds_it_in_the_state_the_log_or_a_message(prod: Prod, state_base: Path) -> None:
    service, ticket = prod(networks=["127.0.0.0/8"])
    hello(service, ticket)
    assert ticket.ticket not in repr(ticket)
    for file in (state_base / "aps").rglob("*"):
        if file.is_file():
            assert ticket.ticket.encode() not in file.read_bytes()
    lines = [json.loads(line) for line in (state_base / "aps/audit.jsonl").read_text().splitlines()]
    events = {one["event"]: one for one in lines}
    assert events["ticket"]["networks"] == ["127.0.0.0/8"]
    assert (events["hello"]["by_ticket"], events["hello"]["targets"]) == ("127.0.0.1", ["127.0.0.1:9"])
    with pytest.raises(BadRequest) as wrong:
        service.hello_by_ticket({"protocol": 1, "ticket": ticket.ticket, "x": 1}, caller_address="127.0.0.1")
    assert ticket.ticket not in str(wrong.value.to_document())
    released(service)
