"""Several gateways in one facility: where a stream is placed, what is spread, what is skipped, what is drained."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scistream_flows import open_stream, s2cs
from scistream_flows.errors import (
    CapacityExhausted,
    GatewayUnreachable,
    NotFound,
    PolicyDenied,
    PortsExhausted,
    RelayError,
    ScistreamError,
)
from scistream_flows.facility import connect_facility
from scistream_flows.gateway import LocalGateway
from scistream_flows.models import Listing, ListQuery, Offer, split_address
from scistream_flows.registry import OUTLIVED_S
from scistream_flows.s2cs import S2CS

Facility = Callable[..., S2CS]
Site = Callable[..., None]
Relays = Callable[..., list[int]]
Talk = Callable[[str, bytes], str]
Within = Callable[..., None]

PAYLOAD = random.Random(3).randbytes(2_000_000)  # noqa: S311 - no secret


def sha(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def prod(uid: str = "s", **changes: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": "PROD", "targets": ["127.0.0.1:9"]} | changes


def cons(offer: Offer, **changes: Any) -> dict[str, Any]:
    document = {"protocol": 1, "uid": offer.uid, "role": "CONS", "mode": offer.mode}
    return document | {"offer": offer.model_dump(mode="json")} | changes


def of(uid: str = "s", role: str = "PROD", **more: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": role} | more


def placed(offer: Offer) -> list[str]:
    return [relay.gateway for relay in offer.relays]


def hosts(addresses: list[str]) -> list[str]:
    return [split_address(one)[0] for one in addresses]


def audit(service: S2CS, *events: str) -> list[dict[str, Any]]:
    return [dict(line) for line in service.audit() if not events or line["event"] in events]


@pytest.fixture
def nowhere() -> Iterator[dict[str, Any]]:
    """The keys of a gateway over SSH at which nobody answers: its port is bound, and nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield {"kind": "ssh", "host": "127.0.0.1", "port": bound.getsockname()[1], "connect_timeout_s": 1}


@pytest.fixture
def nothing_left(state_base: Path, relays_below: Relays) -> Callable[[], None]:
    """A function that fails if a relay, a file of one, or an open stream is left at any facility of the test."""

    def check() -> None:
        assert relays_below(state_base, patience_s=3) == []
        assert [str(one) for one in state_base.glob("*/relays/*")] == []
        for state in state_base.iterdir():
            facility = connect_facility(f"local:{state.name}")
            assert facility.list().streams == []
            facility.close()

    return check


# --- placement


def test_streams_go_to_the_gateway_with_most_free(facility: Facility, site: Site) -> None:
    site("aps", {"capacity_mbits_per_s": 1000}, {"capacity_mbits_per_s": 800})
    service = facility()
    asked = [("a", 500), ("b", 300), ("c", 500), ("d", 300)]
    where = [placed(service.request(prod(uid, rate_mbits_per_s=rate)))[0] for uid, rate in asked]
    assert where == ["gw1", "gw2", "gw1", "gw2"]
    with pytest.raises(CapacityExhausted, match=r"201 Mbit/s more.* 200 Mbit/s are free"):
        service.request(prod("e", rate_mbits_per_s=201))
    service.evict()


def test_a_relay_listens_on_the_addresses_of_its_gateway(facility: Facility, site: Site) -> None:
    site("aps", {}, {})
    service = facility()
    offers = [service.request(prod(uid)) for uid in ("a", "b")]
    assert sorted(hosts(offers[0].addresses + offers[1].addresses)) == ["127.0.0.1", "127.0.0.2"]
    service.evict()


def test_the_connection_budget_is_kept_until_a_release(facility: Facility, site: Site) -> None:
    site("aps", {"connection_budget": 100}, {"connection_budget": 50})
    service = facility()
    assert placed(service.request(prod("a", num_conn=2, max_connections=40))) == ["gw1"]
    assert placed(service.request(prod("b", max_connections=50))) == ["gw2"]
    with pytest.raises(CapacityExhausted, match=r"21 connections more.* 20 are free"):
        service.request(prod("c", max_connections=21))
    service.release(of("b"))
    assert placed(service.request(prod("c", max_connections=21))) == ["gw2"]
    service.evict()


def test_listeners_beyond_a_pipe_budget_go_elsewhere_and_are_never_refused(
    facility: Facility, site: Site
) -> None:
    site("aps", {"pipe_budget_mib": 4, "capacity_mbits_per_s": 1000}, {"capacity_mbits_per_s": 100})
    service = facility()
    assert placed(service.request(prod("a", num_conn=2))) == ["gw1"]
    assert placed(service.request(prod("b"))) == ["gw2"]
    assert placed(service.request(prod("c", rate_mbits_per_s=500))) == ["gw1"]
    service.evict()


# Waits for a file, so that several start at the same moment; prints the answer.
RACING = """
import json, pathlib, sys, time
from scistream_flows.config import load_facility
from scistream_flows.s2cs import S2CS
service = S2CS(load_facility("aps"))
print("ready", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.001)
print(json.dumps(service.answer("request", sys.argv[2])), flush=True)
"""


@pytest.mark.parametrize(
    ("table", "asked"),
    [
        ({"capacity_mbits_per_s": 100}, {"rate_mbits_per_s": 100}),
        ({"connection_budget": 64}, {"max_connections": 33}),
    ],
    ids=["rate", "connections"],
)
def test_the_last_of_what_is_free_is_given_once(
    table: dict[str, int], asked: dict[str, int], facility: Facility, site: Site, tmp_path: Path
) -> None:
    site("aps", table, table)
    go = tmp_path / "go"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACING, str(go), json.dumps(prod(f"s{number}", **asked))],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    go.touch()
    answers = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in processes]
    assert sorted(answer["ok"] for answer in answers) == [False, False, True, True]
    assert {answer["error"]["code"] for answer in answers if not answer["ok"]} == {"capacity"}
    taken = [placed(Offer.model_validate(answer["value"]))[0] for answer in answers if answer["ok"]]
    assert sorted(taken) == ["gw1", "gw2"]
    facility().evict()


# --- spread


def test_a_spread_stream_carries_bytes_over_all_its_gateways(
    site: Site, facility: Facility, application: Any, talk: Talk, nothing_left: Callable[[], None]
) -> None:
    site("aps", {}, {})
    site("alcf", {}, {}, {})
    with open_stream(
        "local:aps", "local:alcf", targets=[application.address], num_conn=4, gateways=2, linger_s=1
    ) as stream:
        offer = stream.offers["PROD"]
        assert [[one.index for one in relay.listeners] for relay in offer.relays] == [[0, 2], [1, 3]]
        assert len({relay.public_key for relay in offer.relays}) == 2
        for side in stream.offers.values():
            where = hosts(side.addresses)
            assert where[0] == where[2] != where[1] == where[3]
        with ThreadPoolExecutor(4) as pool:
            heard = [*pool.map(lambda address: talk(address, PAYLOAD), stream.listeners)]
        assert heard == [sha(application.payload)] * 4
        end = stream.wait(30).check()
    assert application.received == [sha(PAYLOAD)] * 4
    assert end.reasons == {"PROD": "finished", "CONS": "finished"}
    for status in (end.prod, end.cons):
        assert status.connections.total == 4
        assert [relay.bytes.to_consumer for relay in status.relays] == [2 * len(application.payload)] * 2
        assert (status.bytes.to_consumer, status.bytes.to_producer) == (
            4 * len(application.payload),
            4 * len(PAYLOAD),
        )
    assert len(facility("alcf").gateways()) == 3
    nothing_left()


@pytest.mark.parametrize("mode", ["auth", "none"])
def test_a_spread_stream_works_in_every_mode(
    mode: Any, site: Site, application: Any, talk: Talk, nothing_left: Callable[[], None]
) -> None:
    site("aps", {}, {})
    site("alcf", {}, {})
    with open_stream(
        "local:aps", "local:alcf", targets=[application.address], num_conn=3, gateways=2, mode=mode
    ) as stream:
        assert [talk(address, b"x") for address in stream.listeners] == [sha(application.payload)] * 3
    nothing_left()


def test_a_stream_ends_when_the_relays_that_carried_have_finished_although_others_never_did(
    site: Site, application: Any, talk: Talk, nothing_left: Callable[[], None]
) -> None:
    site("aps", {}, {})
    site("alcf", {}, {})
    with open_stream(
        "local:aps", "local:alcf", targets=[application.address], num_conn=2, gateways=2, linger_s=1
    ) as stream:
        assert talk(stream.listeners[1], PAYLOAD) == sha(application.payload)
        end = stream.wait(30).check()
    assert end.reasons == {"PROD": "finished", "CONS": "finished"}
    for side in (end.prod, end.cons):
        assert [relay.reason for relay in side.relays] == ["finished", "finished"]
        assert [relay.bytes.to_consumer for relay in side.relays] == [0, len(application.payload)]
    nothing_left()


def test_a_relay_that_has_finished_does_not_end_what_another_still_carries(
    site: Site, facility: Facility, application: Any, talk: Talk, within: Within
) -> None:
    site("aps", {}, {})
    site("alcf", {}, {})
    producer = facility("aps")
    with (
        open_stream(
            "local:aps", "local:alcf", targets=[application.address], num_conn=2, gateways=2, linger_s=0
        ) as stream,
        socket.create_connection(split_address(stream.listeners[1]), timeout=30) as open_one,
    ):
        assert len(open_one.recv(1000)) > 0
        talk(stream.listeners[0], b"x")
        within(
            lambda: [one.reason for one in producer.status(of(stream.uid)).relays] == ["finished", None],
            timeout_s=10,
        )
        status = stream.status()
        assert not status.ended
        assert status.prod.state == status.cons.state == "STREAMING"
        received = 1
        while block := open_one.recv(1 << 16):
            received += len(block)
        open_one.shutdown(socket.SHUT_WR)
        end = stream.wait(30).check()
    assert received > 2_000_000
    assert end.reasons == {"PROD": "finished", "CONS": "finished"}


def test_an_aborted_connection_fails_the_spread_stream_when_it_is_over(
    site: Site, application: Any, talk: Talk
) -> None:
    site("aps", {}, {})
    site("alcf", {}, {})
    with open_stream(
        "local:aps", "local:alcf", targets=[application.address], num_conn=2, gateways=2, linger_s=1
    ) as stream:
        aborting = socket.create_connection(split_address(stream.listeners[0]), timeout=30)
        assert len(aborting.recv(1000)) > 0
        aborting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        aborting.close()
        assert talk(stream.listeners[1], b"x") == sha(application.payload)
        end = stream.wait(30)
    assert end.reasons == {"PROD": "aborted_by_consumer", "CONS": "aborted_by_consumer"}
    assert not end.in_order


def test_a_relay_lost_on_one_gateway_fails_the_stream_and_stops_the_rest(
    site: Site, facility: Facility, state_base: Path, relays_below: Relays, within: Within
) -> None:
    site("aps", {}, {}, {})
    service = facility()
    service.request(prod(num_conn=3, gateways=3))
    pids = relays_below(state_base)
    assert len(pids) == 3
    os.kill(pids[0], signal.SIGKILL)
    within(lambda: service.status(of()).state == "FAILED", timeout_s=5)
    status = service.status(of())
    assert status.reason == "relay_lost"
    assert sorted(str(one.reason) for one in status.relays) == ["admin", "admin", "relay_lost"]
    assert relays_below(state_base, patience_s=3) == []


def test_a_rate_is_booked_and_enforced_in_shares(site: Site, facility: Facility) -> None:
    site("aps", {"capacity_mbits_per_s": 100}, {"capacity_mbits_per_s": 100})
    service = facility()
    service.request(prod(num_conn=3, gateways=2, rate_mbits_per_s=101))
    assert sorted(one.reserved_mbits_per_s for one in service.gateways()) == [34, 68]
    assert enforced(service) == [67, 34]
    service.update(of(rate_mbits_per_s=50))
    assert enforced(service) == [33, 17]
    with pytest.raises(CapacityExhausted, match=r"fewer than 2 gateways .* 33 Mbit/s more.* 32 Mbit/s"):
        service.request(prod("other", num_conn=2, gateways=2, rate_mbits_per_s=66))
    service.release(of())
    assert [one.reserved_mbits_per_s for one in service.gateways()] == [0, 0]


def enforced(service: S2CS) -> list[int]:
    """The rate that each relay of the stream enforces, as it says itself."""
    rates = []
    for relay in service.status(of()).relays:
        runtime = service.config.state_dir / "relays"
        command = ["relay/target/release/s2ds", "status", relay.relay_id, "--runtime-dir", str(runtime)]
        root = Path(__file__).resolve().parent.parent
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=root)
        rates.append(json.loads(said.stdout)["rate_mbits_per_s"])
    return rates


def test_hello_and_renewal_reach_every_relay_of_a_spread_stream(
    site: Site, facility: Facility, application: Any
) -> None:
    site("aps", {}, {})
    service = facility()
    offer = service.request(prod(num_conn=2, gateways=2, targets=[]))
    assert service.status(of()).state == "WAITING_HELLO"
    assert service.hello(of(targets=[application.address])).addresses == offer.addresses
    status = service.renew(of(lease_s=600))
    assert [relay.targets for relay in status.relays] == [[application.address]] * 2
    assert all(relay.lease_remaining_s > 500 for relay in status.relays)  # type: ignore[operator]
    assert service.request(prod(num_conn=2, gateways=2, targets=[])).addresses == offer.addresses
    service.release(of())


def test_a_spread_stream_needs_as_many_gateways(
    site: Site, facility: Facility, nothing_left: Callable[[], None]
) -> None:
    site("aps", {}, {"port_range": "5101"})
    service = facility()
    with pytest.raises(CapacityExhausted, match="3 gateways were asked for, facility aps has 2 to use"):
        service.request(prod(num_conn=3, gateways=3))
    with pytest.raises(
        PortsExhausted, match=r"fewer than 2 gateways .* have 2 ports free.* num_conn=2 at most"
    ):
        service.request(prod(num_conn=4, gateways=2))
    nothing_left()


def test_when_one_relay_of_a_spread_stream_cannot_start_none_is_left(
    site: Site, facility: Facility, nothing_left: Callable[[], None]
) -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        site("aps", {}, {"port_range": str(taken.getsockname()[1])})
        with pytest.raises(PortsExhausted):
            facility().request(prod(num_conn=2, gateways=2))
        nothing_left()


def test_a_gateway_whose_ports_others_have_taken_gives_its_place_to_another(
    site: Site, facility: Facility, nothing_left: Callable[[], None]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        site("aps", {"port_range": port, "capacity_mbits_per_s": 900}, {"capacity_mbits_per_s": 100})
        service = facility()
        assert placed(service.request(prod())) == ["gw2"]
        (skipped,) = audit(service, "skip")
        assert (skipped["gateway"], "no port free on gateway gw1" in skipped["message"]) == ("gw1", True)
        with pytest.raises(CapacityExhausted, match="not asked: gateway gw1, no port free on gateway gw1"):
            service.request(prod("other", rate_mbits_per_s=500))
        service.release(of())
    nothing_left()


# --- gateways that do not answer


def test_a_gateway_that_does_not_answer_is_skipped_said_and_tried_again(
    site: Site,
    facility: Facility,
    nowhere: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nothing_left: Callable[[], None],
) -> None:
    site("aps", {"capacity_mbits_per_s": 100}, {"capacity_mbits_per_s": 900, **nowhere})
    service = facility()
    assert placed(service.request(prod("a"))) == ["gw1"]
    (skipped,) = audit(service, "skip")
    assert (skipped["gateway"], skipped["uid"]) == ("gw2", "a")
    assert "gateway gw2 is skipped" in caplog.text
    service.request(prod("b"))
    assert len(audit(service, "skip")) == 1  # it is left alone for a while
    monkeypatch.setattr(s2cs, "GATEWAY_RETRY_S", 0)
    service.request(prod("c"))
    assert len(audit(service, "skip")) == 2
    site("aps", {"capacity_mbits_per_s": 100}, {"capacity_mbits_per_s": 900})
    service = facility()
    assert placed(service.request(prod("d"))) == ["gw2"]  # it is back
    service.evict()
    nothing_left()


def test_a_spread_stream_goes_round_a_gateway_that_does_not_answer(
    site: Site, facility: Facility, nowhere: dict[str, Any], nothing_left: Callable[[], None]
) -> None:
    site("aps", {}, nowhere, {})
    service = facility()
    assert sorted(placed(service.request(prod(num_conn=4, gateways=2)))) == ["gw1", "gw3"]
    with pytest.raises(
        GatewayUnreachable, match=r"3 gateways were asked for, only 2 gateway.* can be used"
    ) as caught:
        service.request(prod("other", num_conn=3, gateways=3))
    assert list(caught.value.details["gateways"]) == ["gw2"]
    assert [one.uid for one in service.list(ListQuery()).streams] == ["s"]
    service.release(of())
    nothing_left()


def test_what_is_full_says_which_gateway_was_not_asked(
    site: Site, facility: Facility, nowhere: dict[str, Any]
) -> None:
    site("aps", {"capacity_mbits_per_s": 100}, {"capacity_mbits_per_s": 900, **nowhere})
    with pytest.raises(CapacityExhausted, match=r"100 Mbit/s are free.*; not asked: gateway gw2, "):
        facility().request(prod(rate_mbits_per_s=500))


def test_a_list_names_what_is_known_of_streams_on_a_gateway_that_does_not_answer(
    site: Site, facility: Facility, nowhere: dict[str, Any]
) -> None:
    site("aps", {}, {})
    first = facility()
    offers = [first.request(prod(uid)) for uid in ("a", "b")]
    spread = first.request(prod("c", num_conn=2, gateways=2))
    lost = next(offer for offer in offers if placed(offer) == ["gw2"])
    site("aps", {}, nowhere)
    service = facility()
    listing = service.list(ListQuery())
    assert listing == Listing.model_validate(listing.model_dump())
    states = {one.uid: one.state for one in listing.streams}
    assert states == {
        lost.uid: "REQUESTED",
        next(iter({"a", "b"} - {lost.uid})): "LISTENING",
        "c": "LISTENING",
    }
    for status in listing.streams:
        if status.uid == lost.uid:
            assert status.listeners == lost.addresses
            assert "gw2" in str(status.message)
        if status.uid == "c":
            assert (status.listeners, [one.state for one in status.relays].count("REQUESTED")) == (
                spread.addresses,
                1,
            )
            assert "gw2" in str(status.message)
    assert [one.answers for one in service.gateways()] == [True, False]
    with pytest.raises(GatewayUnreachable):
        service.status(of(lost.uid))
    with pytest.raises(GatewayUnreachable) as caught:
        service.evict()
    assert {one["uid"] for one in caught.value.details["left"]} == {lost.uid, "c"}
    site("aps", {}, {})
    assert [one.uid for one in facility().evict()] == [lost.uid]
    assert (
        facility().status(of("c")).reason == "admin"
    )  # one relay had been stopped, so the other one has been now


def test_a_release_stops_what_can_be_reached_of_a_spread_stream(
    site: Site, facility: Facility, nowhere: dict[str, Any], state_base: Path, relays_below: Relays
) -> None:
    site("aps", {}, {})
    facility().request(prod(num_conn=2, gateways=2))
    site("aps", {}, nowhere)
    service = facility()
    with pytest.raises(GatewayUnreachable, match="gateway gw2"):
        service.release(of())
    assert len(relays_below(state_base)) == 1
    site("aps", {}, {})
    service = facility()
    end = service.release(of()).end
    assert end is not None
    assert (end.state, end.reason) == ("ENDED", "released")
    assert relays_below(state_base) == []


def test_a_stream_that_was_released_in_part_is_still_listed(
    site: Site, facility: Facility, nowhere: dict[str, Any]
) -> None:
    site("aps", {}, {})
    facility().request(prod(num_conn=2, gateways=2))
    site("aps", {}, nowhere)
    service = facility()
    with pytest.raises(GatewayUnreachable):
        service.release(of())
    (listed,) = service.survey().streams
    assert [one.reason for one in listed.relays if one.gateway == "gw1"] == ["released"]
    assert "gateway gw2" in str(listed.message)
    site("aps", {}, {})
    facility().evict()


def test_a_binary_that_cannot_be_used_on_one_gateway_does_not_keep_the_other_relay_running(
    site: Site, facility: Facility, state_base: Path, relays_below: Relays, tmp_path: Path
) -> None:
    site("aps", {}, {})
    service = facility()
    service.request(prod(num_conn=2, gateways=2))
    here = service.config.state_dir / "relays"
    whole = {one.name: LocalGateway(one, runtime_dir=here) for one in service.config.gateways}
    spoiled = LocalGateway(whole["gw2"].config, runtime_dir=tmp_path / "no" / "such")
    (tmp_path / "no").write_text("")  # where its relays should be is a file: not unreachable, but of no use
    half = S2CS(service.config, gateways={**whole, "gw2": spoiled})
    with pytest.raises(RelayError):
        half.release(of())
    assert len(relays_below(state_base)) == 1
    half.close()
    assert service.release(of()).end is not None
    assert relays_below(state_base) == []


def test_a_gateway_that_is_gone_for_good_holds_a_stream_no_longer_than_its_lifetime(
    site: Site, facility: Facility, monkeypatch: pytest.MonkeyPatch
) -> None:
    site("aps", {"capacity_mbits_per_s": 100}, {"capacity_mbits_per_s": 100})
    offer = facility().request(prod(num_conn=2, gateways=2, rate_mbits_per_s=100, lifetime_s=600))
    site(
        "aps", {"name": "gw2", "wan_bind": "127.0.0.2", "lan_bind": "127.0.0.2", "capacity_mbits_per_s": 100}
    )
    service = facility()
    with pytest.raises(GatewayUnreachable, match=r"no gateway 'gw1' any more"):
        service.release(of())
    (report,) = service.gateways()
    assert report.reserved_mbits_per_s == 50
    later = time.time() + 600 + OUTLIVED_S + 1
    monkeypatch.setattr(time, "time", lambda: later)
    (report,) = service.gateways()
    assert (report.streams, report.reserved_mbits_per_s) == (0, 0)
    assert service.status(of()).reason == "relay_lost"
    assert service.request(prod()).relays != offer.relays
    service.release(of())
    site("aps", {}, {})
    facility().list({"protocol": 1})  # gw1 is back, and what runs there belongs to nobody


# --- draining


def test_a_draining_gateway_takes_no_new_stream_and_running_ones_go_on(
    site: Site, application: Any, talk: Talk, facility: Facility
) -> None:
    site("aps", {}, {})
    service = facility()
    with open_stream("local:aps", "local:alcf", targets=[application.address]) as stream:
        gateway = placed(stream.offers["PROD"])[0]
        other = next(iter({"gw1", "gw2"} - {gateway}))
        service.drain(gateway)
        service.drain(gateway)
        assert [placed(service.request(prod(f"s{number}"))) for number in range(3)] == [[other]] * 3
        assert talk(stream.listeners[0], PAYLOAD) == sha(application.payload)
        assert service.request(prod("s0")).relays[0].gateway == other
        service.drain(other)
        with pytest.raises(
            CapacityExhausted, match="every gateway of facility aps is draining for maintenance"
        ):
            service.request(prod("more"))
        assert placed(service.request(prod("s0"))) == [other]  # that one is there already
        service.undrain(gateway)
        assert placed(service.request(prod("more"))) == [gateway]
    assert [(line["event"], line["gateway"]) for line in audit(service, "drain", "undrain")] == [
        ("drain", gateway),
        ("drain", other),
        ("undrain", gateway),
    ]
    assert all(line["at"] and line["owner"] == s2cs.unix_owner() for line in audit(service))
    service.evict()


def test_a_drain_is_seen_by_another_process(site: Site, facility: Facility) -> None:
    site("aps", {}, {})
    drain = """
from scistream_flows.config import load_facility
from scistream_flows.s2cs import S2CS
with S2CS(load_facility("aps")) as service:
    service.drain("gw1")
"""
    service = facility()
    assert [one.draining for one in service.gateways()] == [False, False]
    subprocess.run([sys.executable, "-W", "error", "-c", drain], timeout=60, check=True)
    assert [one.draining for one in service.gateways()] == [True, False]
    assert [placed(service.request(prod(f"s{number}"))) for number in range(3)] == [["gw2"]] * 3
    service.evict()


def test_a_gateway_that_is_not_configured_cannot_drain(site: Site, facility: Facility) -> None:
    site("aps", {}, {})
    with pytest.raises(NotFound, match=r"no gateway 'gw7'.* Its gateways: gw1, gw2"):
        facility().drain("gw7")


def test_a_gateway_that_drains_while_the_others_are_silent_leaves_these(
    site: Site, facility: Facility, nowhere: dict[str, Any]
) -> None:
    site("aps", {}, nowhere)
    service = facility()
    service.drain("gw1")
    with pytest.raises(ScistreamError) as caught:
        service.request(prod())
    assert caught.value.code in ("capacity", "gateway-unreachable")
    assert "gw1" in str(caught.value) or "gw2" in str(caught.value)
    service.undrain("gw1")
    assert placed(service.request(prod())) == ["gw1"]
    service.release(of())


def test_the_report_of_a_gateway_says_what_is_booked(site: Site, facility: Facility, within: Within) -> None:
    site(
        "aps",
        {"capacity_mbits_per_s": 100, "connection_budget": 1000, "port_range": "20100-20199"},
        {"wan_bind": "127.0.0.1"},
    )
    service = facility()
    service.drain("gw2")
    service.request(prod(num_conn=3, max_connections=10, rate_mbits_per_s=40))
    one, two = service.gateways()
    assert (one.name, one.kind, one.draining, one.answers, one.message) == ("gw1", "local", False, True, None)
    assert (one.streams, one.listeners, one.ports) == (1, 3, 100)
    assert (one.connections, one.connection_budget) == (30, 1000)
    assert (one.reserved_mbits_per_s, one.capacity_mbits_per_s) == (40, 100)
    assert (two.draining, two.streams, two.ports) == (True, 0, 0)
    service.release(of())
    service.request(prod(lease_s=1))
    within(lambda: service.gateways()[0].streams == 0, timeout_s=6)  # it ended without a word to the service


# --- two IP versions

BOTH = {"wan_bind": ["127.0.0.1", "::1"], "lan_bind": ["127.0.0.1", "::1"]}
ONLY_4 = {"wan_bind": "127.0.0.1", "lan_bind": "127.0.0.1"}
ONLY_6 = {"wan_bind": "::1", "lan_bind": "::1"}


@pytest.mark.parametrize("mode", ["tls", "none"])
@pytest.mark.parametrize(
    ("producer", "consumer", "dialled", "seen"),
    [
        (BOTH, BOTH, "127.0.0.1", ["127.0.0.1/32"]),
        (BOTH, ONLY_6, "::1", ["::1/128"]),
        (BOTH, ONLY_4, "127.0.0.1", ["127.0.0.1/32"]),
        (ONLY_6, BOTH, "::1", ["::1/128"]),
    ],
    ids=["both", "to IPv6", "to IPv4", "from IPv6"],
)
def test_a_facility_of_both_ip_versions_serves_others_of_either(
    producer: dict[str, Any],
    consumer: dict[str, Any],
    dialled: str,
    seen: list[str],
    mode: Any,
    site: Site,
    talk: Talk,
    application: Any,
    nothing_left: Callable[[], None],
) -> None:
    site("aps", producer)
    site("alcf", consumer)
    with open_stream(
        "local:aps", "local:alcf", targets=[application.address], num_conn=2, mode=mode, linger_s=1
    ) as stream:
        listeners = stream.offers["PROD"].relays[0].listeners
        assert [one.index for one in listeners] == [0, 1]
        assert all(len(one.also) == (1 if producer is BOTH else 0) for one in listeners)
        assert stream.offers["CONS"].relays[0].dial_addresses == seen
        probe = stream.status().cons.last_probe
        assert probe is not None
        assert split_address(str(probe.address))[0] == dialled
        for one in stream.offers["CONS"].relays[0].listeners:
            for address in (one.address, *one.also):
                assert talk(address, b"x") == sha(application.payload)
        assert stream.wait(20).check().in_order
    nothing_left()


def test_the_policy_is_asked_about_the_address_that_is_dialled(site: Site, facility: Facility) -> None:
    site("aps", BOTH)
    site("alcf", ONLY_6, peers=["127.0.0.0/8"])
    site("anl", ONLY_4, peers=["127.0.0.0/8"])
    offer = facility("aps").request(prod())
    with pytest.raises(PolicyDenied, match=r"does not allow \[::1\]:\d+ in peers"):
        facility("alcf").request(cons(offer))
    facility("anl").request(cons(offer))
    facility("anl").evict()
    facility("aps").evict()


def test_a_gateway_that_cannot_dial_the_other_facility_is_left_out_if_another_can(
    site: Site, facility: Facility, nothing_left: Callable[[], None]
) -> None:
    site("aps", ONLY_6)
    site("alcf", {"capacity_mbits_per_s": 0}, BOTH | {"capacity_mbits_per_s": 1})
    producer, consumer = facility("aps"), facility("alcf")
    offer = producer.request(prod(num_conn=2))
    assert placed(consumer.request(cons(offer))) == ["gw2"]
    with pytest.raises(CapacityExhausted, match=r"has 1 to use.* not asked: gateway gw1, it cannot dial"):
        consumer.request(cons(offer, num_conn=2, gateways=2) | {"uid": "s"}, owner="urn:test:alice")
    consumer.evict()
    producer.evict()
    nothing_left()


# --- at the same time


def test_two_requests_for_spread_streams_share_what_there_is(site: Site, facility: Facility) -> None:
    site("aps", *({"capacity_mbits_per_s": 100} for _ in range(4)))
    service = facility()
    refused: list[ScistreamError] = []

    def ask(number: int) -> None:
        try:
            service.request(prod(f"s{number}", num_conn=2, gateways=2, rate_mbits_per_s=200))
        except CapacityExhausted as full:
            refused.append(full)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [one.reserved_mbits_per_s for one in service.gateways()] == [100] * 4
    assert len(refused) == 3
    service.evict()
