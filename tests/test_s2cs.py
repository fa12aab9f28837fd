"""The verbs of a facility, with real relays: who may, what is answered, what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from scistream_flows.config import FacilityConfig, load_facility
from scistream_flows.errors import (
    BadRequest,
    CapacityExhausted,
    Conflict,
    NotFound,
    NotSupported,
    PolicyDenied,
    PortsExhausted,
    ProtocolMismatch,
    RelayError,
    ScistreamError,
)
from scistream_flows.gateway import LocalGateway
from scistream_flows.models import Offer, Status
from scistream_flows.relay import Outcome
from scistream_flows.s2cs import S2CS

Facility = Callable[..., S2CS]
Relays = Callable[..., list[int]]
ALICE, BOB, CAROL = "urn:test:alice", "urn:test:bob", "urn:test:carol"


def prod(uid: str = "s", **changes: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": "PROD", "targets": ["127.0.0.1:9"]} | changes


def cons(offer: Offer, **changes: Any) -> dict[str, Any]:
    document = {"protocol": 1, "uid": offer.uid, "role": "CONS", "mode": offer.mode}
    return document | {"offer": offer.model_dump(mode="json")} | changes


def of(uid: str = "s", role: str = "PROD", **more: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": role} | more


def same(one: Offer, other: Offer) -> bool:
    return one.model_copy(update={"lease_remaining_s": 0}) == other.model_copy(
        update={"lease_remaining_s": 0}
    )


def audit(service: S2CS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (service.config.state_dir / "audit.jsonl").read_text().splitlines()]


def files(service: S2CS) -> list[Path]:
    runtime = service.config.state_dir / "relays"
    return list(runtime.iterdir()) if runtime.exists() else []


# --- request


def test_the_same_request_answers_the_same_offer_and_starts_one_relay(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    first = service.request(prod())
    assert same(service.request(prod()), first)
    assert same(facility().request(prod()), first)
    assert len(relays_below(state_base)) == 1
    service.release(of())


def test_the_same_request_again_renews_the_lease(facility: Facility) -> None:
    service = facility()
    service.request(prod(lease_s=60))
    service.renew(of(lease_s=5))
    assert service.status(of()).lease_remaining_s <= 5  # type: ignore[operator]
    assert service.request(prod(lease_s=60)).lease_remaining_s > 50
    service.release(of())


def test_an_offer_says_where_the_relay_listens_and_which_key_it_has(facility: Facility) -> None:
    service = facility()
    offer = service.request(prod(num_conn=3))
    assert (offer.uid, offer.role, offer.mode, offer.dial) == ("s", "PROD", "tls", "cons")
    (relay,) = offer.relays
    assert [one.index for one in relay.listeners] == [0, 1, 2]
    assert len(relay.public_key) == 43
    for address in offer.addresses:
        host, port = address.rsplit(":", 1)
        with contextlib.suppress(
            ConnectionResetError
        ):  # a stranger is reset; where nobody listens it is refused
            socket.create_connection((host, int(port)), timeout=5).close()
    service.release(of())


def test_a_different_request_of_the_same_name_is_a_conflict_that_names_what_differs(
    facility: Facility,
) -> None:
    service = facility()
    service.request(prod())
    with pytest.raises(Conflict, match="different num_conn, mode") as caught:
        service.request(prod(num_conn=2, mode="auth"))
    assert caught.value.details["fields"] == ["num_conn", "mode"]
    assert service.status(of()).state == "LISTENING"
    service.release(of())


def test_two_owners_may_use_the_same_name(facility: Facility) -> None:
    service = facility()
    alices, bobs = (service.request(prod(), owner=owner) for owner in (ALICE, BOB))
    assert alices.relays[0].relay_id != bobs.relays[0].relay_id
    service.release(of(), owner=ALICE)
    assert service.status(of(), owner=BOB).state == "LISTENING"
    service.release(of(), owner=BOB)


def test_a_name_may_be_used_again_after_the_end(facility: Facility) -> None:
    service = facility()
    first = service.request(prod())
    service.release(of())
    second = service.request(prod(num_conn=2))
    assert first.relays[0].relay_id != second.relays[0].relay_id
    service.release(of())


def test_a_request_without_targets_waits_for_hello(facility: Facility, application: Any) -> None:
    service = facility()
    service.request(prod(targets=[]))
    assert service.status(of()).state == "WAITING_HELLO"
    service.hello(of(targets=[application.address]))
    status = service.status(of())
    assert status.state == "LISTENING"
    assert status.relays[0].targets == [application.address]
    service.release(of())


def test_hello_at_cons_adds_to_the_allowed_sources_and_answers_the_listeners(facility: Facility) -> None:
    service, other = facility("aps"), facility("alcf")
    offer = other.request(cons(service.request(prod()), consumers=["127.0.0.1"]))
    again = other.hello(of(role="CONS", consumers=["127.0.0.3"]), caller_address="127.0.0.2")
    assert again.addresses == offer.addresses
    sources = other.status(of(role="CONS")).relays[0].sources
    assert sources == ["127.0.0.1/32", "127.0.0.3/32", "127.0.0.2/32"]
    with pytest.raises(PolicyDenied, match="consumers"):
        other.hello(of(role="CONS", consumers=["10.0.0.1"]))
    other.release(of(role="CONS"))
    service.release(of())


def test_a_host_name_is_resolved_at_the_facility_and_checked_afterwards(facility: Facility) -> None:
    service = facility()
    service.request(prod(targets=["localhost:9"]))
    assert service.status(of()).relays[0].targets == ["127.0.0.1:9"]
    with pytest.raises(BadRequest, match=r"no-such-host\.invalid"):
        service.request(prod("other", targets=["no-such-host.invalid:9"]))
    service.release(of())


def test_a_name_that_resolves_to_what_is_not_allowed_is_denied(facility: Facility) -> None:
    service = facility("aps", SCISTREAM_POLICY_TARGETS='["10.0.0.0/8"]')
    with pytest.raises(PolicyDenied, match=r"localhost:9 in targets: it is .*127\.0\.0\.1"):
        service.request(prod(targets=["localhost:9"]))


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (prod(targets=["10.0.0.1:80"]), PolicyDenied),
        (prod(targets=["169.254.169.254:80"]), PolicyDenied),
        (prod(num_conn=65), PolicyDenied),
        (prod(dial="prod"), NotSupported),
        (prod(uid="../x"), BadRequest),
        (prod(colour="red"), BadRequest),
        (prod(protocol=2), ProtocolMismatch),
        ("nonsense", BadRequest),
    ],
    ids=str,
)
def test_what_is_refused_starts_nothing(
    facility: Facility, document: Any, error: type[ScistreamError], state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    with pytest.raises(error):
        service.request(document)
    assert relays_below(state_base) == []
    assert service.list({"protocol": 1, "include_ended": True}).streams == []


def test_a_peer_that_is_not_allowed_is_not_dialled(facility: Facility) -> None:
    service, other = facility("aps"), facility("alcf", SCISTREAM_POLICY_PEERS='["192.0.2.0/24"]')
    offer = service.request(prod())
    with pytest.raises(PolicyDenied, match="in peers"):
        other.request(cons(offer))
    service.release(of())


def test_an_exhausted_port_range_says_so_and_leaves_nothing(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = facility("aps", SCISTREAM_PORT_RANGE=str(taken.getsockname()[1]))
        with pytest.raises(PortsExhausted) as caught:
            service.request(prod())
        assert caught.value.details["errno"] == "EADDRINUSE"
    assert (relays_below(state_base), files(service)) == ([], [])
    with pytest.raises(PortsExhausted, match="num_conn=1 at most"):
        service.request(prod(num_conn=2))
    service.request(prod())
    service.release(of())


def test_an_address_that_cannot_be_bound_is_named_with_its_errno(
    state_base: Path, relays_below: Relays, tmp_path: Path
) -> None:
    file = tmp_path / "aps.toml"
    file.write_text(
        '[facility]\nname = "aps"\n[[gateway]]\nname = "gw"\nwan_bind = "192.0.2.1"\nlan_bind = "127.0.0.1"\n'
        '[policy]\ntargets = ["127.0.0.0/8"]\n'
    )
    with S2CS(load_facility("aps", file=file)) as service:
        with pytest.raises(RelayError, match="gateway gw did not start") as caught:
            service.request(prod())
        assert caught.value.errno == "EADDRNOTAVAIL"
        assert files(service) == []
        with pytest.raises(NotFound):
            service.status(of())
    assert relays_below(state_base) == []


def with_capacity(tmp_path: Path, mbits: int) -> FacilityConfig:
    file = tmp_path / "aps.toml"
    file.write_text(
        '[facility]\nname = "aps"\n[[gateway]]\nname = "gw"\nwan_bind = "127.0.0.1"\nlan_bind = "127.0.0.1"\n'
        f'capacity_mbits_per_s = {mbits}\n[policy]\ntargets = ["127.0.0.0/8"]\n'
    )
    return load_facility("aps", file=file)


@pytest.mark.usefixtures("state_base")
def test_capacity_is_reserved_until_the_release(tmp_path: Path) -> None:
    with S2CS(with_capacity(tmp_path, 1000)) as service:
        service.request(prod("one", rate_mbits_per_s=700))
        with pytest.raises(CapacityExhausted, match="300 Mbit/s are free"):
            service.request(prod("two", rate_mbits_per_s=400))
        service.release(of("one"))
        service.request(prod("two", rate_mbits_per_s=400))
        service.release(of("two"))


@pytest.mark.parametrize(
    "limit", [{"SCISTREAM_POLICY_MAX_STREAMS_PER_OWNER": "1"}, {"SCISTREAM_PORT_RANGE": "PORT"}]
)
def test_what_a_relay_that_has_just_ended_had_booked_is_free_for_the_next_request(
    facility: Facility, state_base: Path, relays_below: Relays, limit: dict[str, str]
) -> None:
    """Also within the second in which what runs is not compared again with what is written."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    service = facility("aps", **{name: value.replace("PORT", port) for name, value in limit.items()})
    service.request(prod("one"))
    (pid,) = relays_below(state_base)
    service.status(of("one"))
    os.kill(pid, signal.SIGKILL)
    assert relays_below(state_base, patience_s=5) == []
    service.request(prod("two"))
    assert service.status(of("one")).reason == "relay_lost"
    service.release(of("two"))


def test_requests_one_after_the_other_do_not_each_look_at_every_relay(facility: Facility) -> None:
    service, verbs = facility(), list[str]()
    with S2CS(service.config, gateways={"local": Watched(service, verbs.append)}) as watched:
        began = time.monotonic()
        for number in range(10):
            watched.request(prod(f"s{number}"))
        looks, seconds = verbs.count("list"), time.monotonic() - began
        for number in range(10):
            watched.release(of(f"s{number}"))
    assert verbs.count("start") == 10
    assert 1 <= looks <= 1 + seconds


def test_an_owner_reaches_the_limit_but_not_others(facility: Facility) -> None:
    service = facility("aps", SCISTREAM_POLICY_MAX_STREAMS_PER_OWNER="1")
    service.request(prod("one"), owner=ALICE)
    with pytest.raises(PolicyDenied, match="the limit is 1"):
        service.request(prod("two"), owner=ALICE)
    service.request(prod("two"), owner=BOB)
    service.release(of("one"), owner=ALICE)
    service.release(of("two"), owner=BOB)


# --- rights


def test_a_foreign_stream_gets_the_very_same_answers_as_one_that_is_not_there(facility: Facility) -> None:
    service = facility()
    service.request(prod("hers"), owner=ALICE)
    verbs: list[tuple[str, dict[str, Any]]] = [
        ("status", {}),
        ("renew", {}),
        ("hello", {"targets": ["127.0.0.1:9"]}),
        ("update", {"targets": ["127.0.0.1:9"]}),
        ("release", {}),
    ]
    for verb, more in verbs:
        foreign = service.answer(verb, of("hers", **more), owner=BOB)
        unknown = service.answer(verb, of("none", **more), owner=BOB)
        assert json.dumps(foreign).replace("hers", "none") == json.dumps(unknown), verb
    assert service.list({"protocol": 1}, owner=BOB).streams == []
    assert service.status(of("hers"), owner=ALICE).state == "LISTENING"
    service.release(of("hers"), owner=ALICE)


def test_a_manager_may_do_what_the_owner_may_and_a_monitor_may_only_look(facility: Facility) -> None:
    service = facility()
    service.request(prod(managers=[BOB], monitors=["urn:test:group"]), owner=ALICE)
    looker = (CAROL, "urn:test:group")
    assert service.status(of(), owner=looker).owner == ALICE
    assert [one.uid for one in service.list({"protocol": 1}, owner=looker).streams] == ["s"]
    for verb in ("renew", "release", "update"):
        answer = service.answer(verb, of(), owner=looker)
        assert answer["error"]["code"] == "denied", verb
    service.renew(of(), owner=BOB)
    assert service.release(of(), owner=BOB).end is not None
    assert service.status(of(), owner=ALICE).reason == "released"


def test_ones_own_stream_comes_before_one_that_is_shared(facility: Facility) -> None:
    service = facility()
    service.request(prod(managers=[BOB]), owner=ALICE)
    service.request(prod(), owner=BOB)
    assert service.status(of(), owner=BOB).owner == BOB
    assert service.status(of(owner=ALICE), owner=BOB).owner == ALICE
    service.release(of(), owner=BOB)
    service.release(of(owner=ALICE), owner=BOB)


def test_two_shared_streams_of_one_name_ask_for_the_owner(facility: Facility) -> None:
    service = facility()
    for owner in (ALICE, BOB):
        service.request(prod(monitors=[CAROL]), owner=owner)
    with pytest.raises(Conflict, match="2 owners share") as caught:
        service.status(of(), owner=CAROL)
    assert caught.value.details["owners"] == [ALICE, BOB]
    assert service.status(of(owner=BOB), owner=CAROL).owner == BOB
    for owner in (ALICE, BOB):
        service.release(of(), owner=owner)


def test_a_caller_that_is_no_urn_is_refused(facility: Facility) -> None:
    with pytest.raises(BadRequest, match="not a URN"):
        facility().request(prod(), owner="alice")


# --- update, renew, status


def test_update_replaces_targets_within_the_allow_list(facility: Facility) -> None:
    service = facility()
    service.request(prod())
    assert service.update(of(targets=["127.0.0.1:10", "[::1]:11"])).relays[0].targets == [
        "127.0.0.1:10",
        "[::1]:11",
    ]
    with pytest.raises(PolicyDenied):
        service.update(of(targets=["10.0.0.1:10"]))
    assert service.status(of()).relays[0].targets == ["127.0.0.1:10", "[::1]:11"]
    service.release(of())


@pytest.mark.usefixtures("state_base")
def test_a_reserved_rate_can_only_be_lowered(tmp_path: Path) -> None:
    with S2CS(with_capacity(tmp_path, 1000)) as service:
        service.request(prod(rate_mbits_per_s=100))
        service.update(of(rate_mbits_per_s=50))
        for more in (101, 0):
            with pytest.raises(BadRequest, match="100 Mbit/s are reserved"):
                service.update(of(rate_mbits_per_s=more))
        service.release(of())


def test_a_lease_above_the_limit_is_denied(facility: Facility) -> None:
    service = facility("aps", SCISTREAM_POLICY_LONGEST_LEASE_S="60")
    service.request(prod())
    with pytest.raises(PolicyDenied, match="Ask for 60 at most"):
        service.renew(of(lease_s=61))
    service.release(of())


def test_a_lease_that_nobody_renews_ends_the_relay(facility: Facility, within: Callable[..., None]) -> None:
    service = facility()
    service.request(prod(lease_s=1))
    within(lambda: service.status(of()).ended, timeout_s=6)
    status = service.status(of())
    assert (status.state, status.reason) == ("ENDED", "lease_expired")
    assert files(service) == []
    assert service.renew(of()).reason == "lease_expired"
    with pytest.raises(NotFound, match="has ended: lease_expired"):
        service.update(of(targets=["127.0.0.1:9"]))


def test_renewing_keeps_a_relay_alive(facility: Facility) -> None:
    service = facility()
    service.request(prod(lease_s=2))
    for _ in range(6):
        time.sleep(0.5)
        assert not service.renew(of()).ended
    service.release(of())


def test_a_relay_that_was_killed_is_reported_lost_within_a_second(
    facility: Facility, state_base: Path, relays_below: Relays, within: Callable[..., None]
) -> None:
    service = facility()
    service.request(prod())
    (pid,) = relays_below(state_base)
    os.kill(pid, signal.SIGKILL)
    within(lambda: service.status(of()).state == "FAILED", timeout_s=1)
    assert service.status(of()).reason == "relay_lost"
    assert files(service) == []
    assert audit(service)[-1]["reason"] == "relay_lost"


def test_a_lost_stream_can_be_requested_again(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    first = service.request(prod())
    os.kill(relays_below(state_base)[0], signal.SIGKILL)
    relays_below(state_base, patience_s=5)
    second = service.request(prod())
    assert first.relays[0].relay_id != second.relays[0].relay_id
    service.release(of())


# --- release, list, audit


def test_release_ends_the_relay_and_may_be_repeated(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    service.request(prod())
    first = service.release(of())
    assert isinstance(first.end, Status)
    assert (first.end.state, first.end.reason) == ("ENDED", "released")
    assert (relays_below(state_base), files(service)) == ([], [])
    assert service.release(of()) == first


def test_releasing_what_never_was_is_no_error(facility: Facility) -> None:
    assert facility().release(of("never")).end is None


def test_the_ports_of_a_released_stream_are_free_at_once(facility: Facility) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    service = facility("aps", SCISTREAM_PORT_RANGE=str(port))
    for number in range(5):
        assert service.request(prod(f"s{number}")).addresses == [f"127.0.0.1:{port}"]
        service.release(of(f"s{number}"))


def test_list_shows_what_lives_and_on_request_what_has_ended(facility: Facility) -> None:
    service = facility()
    service.request(prod("one"))
    service.request(prod("two"))
    service.release(of("one"))
    listed = service.list({"protocol": 1})
    assert listed.facility == "aps"
    assert [one.uid for one in listed.streams] == ["two"]
    everything = service.list({"protocol": 1, "include_ended": True})
    assert [(one.uid, one.reason) for one in everything.streams] == [("one", "released"), ("two", None)]
    service.release(of("two"))


def test_each_open_deny_and_close_has_an_audit_line_without_keys(facility: Facility) -> None:
    service = facility()
    offer = service.request(prod(), owner=ALICE)
    with pytest.raises(PolicyDenied):
        service.request(prod("other", targets=["10.0.0.1:1"]), owner=BOB)
    service.release(of(), owner=ALICE)
    assert [(line["event"], line["owner"], line["uid"]) for line in audit(service)] == [
        ("open", ALICE, "s"),
        ("deny", BOB, "other"),
        ("close", ALICE, "s"),
    ]
    assert offer.relays[0].public_key not in (service.config.state_dir / "audit.jsonl").read_text()


def test_every_verb_answers_and_refuses_in_json(facility: Facility) -> None:
    service = facility()
    opened = json.loads(json.dumps(service.answer("request", json.dumps(prod()))))
    assert opened["ok"] is True
    assert Offer.model_validate(opened["value"]).uid == "s"
    assert service.answer("release", of())["value"]["released"] is True
    assert service.answer("rm -rf", of())["error"]["code"] == "bad-request"
    assert service.answer("close", of())["error"]["code"] == "bad-request"


def test_a_missing_binary_is_an_error_that_says_how_to_build_it(
    facility: Facility, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2DS", "/nowhere/s2ds")
    service = facility()
    with pytest.raises(RelayError, match="cargo build"):
        service.request(prod())
    with pytest.raises(NotFound):
        service.status(of())


class Watched(LocalGateway):
    """This machine; says before each call of a relay's verb that it will be made."""

    def __init__(self, service: S2CS, before: Callable[[str], object]) -> None:
        (config,) = service.config.gateways
        super().__init__(config, runtime_dir=service.config.state_dir / "relays")
        self._before = before

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float) -> Outcome:
        self._before(argv[1])
        return super().run(argv, stdin=stdin, timeout_s=timeout_s)


def test_a_stream_that_another_process_is_closing_is_not_reported_lost(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    service.request(prod(lease_s=1))
    assert relays_below(state_base, patience_s=10) == []
    closing, go_on, asked = threading.Event(), threading.Event(), []

    def wait(verb: str) -> None:
        if verb == "status":
            closing.set()
            assert go_on.wait(30)

    def let_go(verb: str) -> None:
        asked.append(verb)
        if asked.count("status") == 2:  # it has read that the stream is open, and not ended
            go_on.set()
            closer.join(30)

    with (
        S2CS(service.config, gateways={"local": Watched(service, wait)}) as other,
        S2CS(service.config, gateways={"local": Watched(service, let_go)}) as this,
    ):
        closer = threading.Thread(target=other.list, args=({"protocol": 1},))
        closer.start()
        assert closing.wait(30)
        status = this.status({"protocol": 1, "uid": "s", "role": "PROD"})
        go_on.set()
        closer.join(30)
    assert (status.state, status.reason) == ("ENDED", "lease_expired")


def test_what_ended_while_another_thread_looked_is_free_for_the_next_request(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    """That thread may have listed the relays before."""
    service = facility("aps", SCISTREAM_POLICY_MAX_STREAMS_PER_OWNER="1")
    service.request(prod(uid="one"))
    (pid,) = relays_below(state_base)
    listed, go_on = threading.Event(), threading.Event()
    with S2CS(service.config, gateways={"local": Lagging(service, listed, go_on)}) as other:
        looking = threading.Thread(target=other.list, args=({"protocol": 1},))
        looking.start()
        try:
            assert listed.wait(30)
            os.kill(pid, signal.SIGKILL)
            assert relays_below(state_base, patience_s=5) == []
            threading.Timer(0.2, go_on.set).start()
            other.request(prod(uid="two"))
        finally:
            go_on.set()
            looking.join(30)
        other.release(of(uid="two"))


class Lagging(LocalGateway):
    """This machine, whose first list of relays is late."""

    def __init__(self, service: S2CS, listed: threading.Event, go_on: threading.Event) -> None:
        (config,) = service.config.gateways
        super().__init__(config, runtime_dir=service.config.state_dir / "relays")
        self._listed, self._go_on = listed, go_on

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float) -> Outcome:
        outcome = super().run(argv, stdin=stdin, timeout_s=timeout_s)
        if argv[1] == "list" and not self._listed.is_set():
            self._listed.set()
            assert self._go_on.wait(30)
        return outcome


def test_what_no_end_of_a_stream_can_change_is_denied_without_a_look_at_the_relays(
    facility: Facility,
) -> None:
    service = facility()
    asked: list[str] = []
    with S2CS(service.config, gateways={"local": Watched(service, asked.append)}) as watched:
        watched.request(prod())
        before = asked.count("list")
        for number in range(3):
            with pytest.raises(PolicyDenied):
                watched.request(prod(uid=f"x{number}", num_conn=65))
        assert asked.count("list") == before
        watched.release(of())


def test_a_stream_that_another_process_is_opening_has_been_requested(facility: Facility) -> None:
    service = facility()
    starting, go_on = threading.Event(), threading.Event()

    def wait(verb: str) -> None:
        if verb == "start":
            starting.set()
            assert go_on.wait(30)

    with S2CS(service.config, gateways={"local": Watched(service, wait)}) as other:
        opener = threading.Thread(target=other.request, args=(prod(),))
        opener.start()
        try:
            assert starting.wait(30)
            seen = [service.status(of()), *service.list({"protocol": 1}).streams]
        finally:
            go_on.set()
            opener.join(30)
    assert [one.state for one in seen] == ["REQUESTED", "REQUESTED"]
    service.release(of())
