"""A stream between two facilities whose services have nothing but SSH to their gateways."""

import json
import socket

import pytest
from relay.apps import Payload
from relay.gateway import eventually, join, split

from scistream_flows.errors import GatewayUnreachable, StreamNotReady

from .narrow import LIMITS, assert_named
from .services import Services
from .topology import FAMILIES, NETWORKS, Family

pytestmark = pytest.mark.net

BOTH = {"gateway-a": 1, "gateway-b": 1}


@pytest.mark.usefixtures("family")
def test_a_stream_lives_its_whole_life_by_ssh(services: Services, mode: str) -> None:
    server = services.listen()
    with services.open(server, mode=mode, lease_s=3, linger_s=0) as stream:
        assert services.relays() == BOTH
        status = stream.status()
        assert (status.prod.state, status.cons.state) == ("READY", "READY")
        consumer, producer = services.established(server, stream.listeners[0])
        there, back = Payload(1, 3_000_001), Payload(2, 20_000_003)
        services.apps.exchange(consumer, producer, there, back)
        end = stream.wait(20)
    assert end.reasons == {"PROD": "finished", "CONS": "finished"}
    for side in (end.prod, end.cons):
        assert (side.bytes.to_producer, side.bytes.to_consumer) == (there.size + 1, back.size + 1)
    services.wait_bare()
    assert stream.release().reasons == end.reasons


@pytest.mark.parametrize("only", FAMILIES)
def test_a_gateway_of_both_families_serves_one_that_has_only_one(services: Services, only: Family) -> None:
    a, b = services.a.host, services.b.host
    peers = [NETWORKS["wan"]["IPv4"], f"[{NETWORKS['wan']['IPv6']}]"]
    both = {"wan_bind": [a.address(family, "wan") for family in FAMILIES]}
    services.configure("a", policy={"peers": peers}, gateway_a=both)
    services.configure("b", policy={"peers": peers}, gateway_b={"wan_bind": b.address(only, "wan")})
    server = services.listen()
    with services.open(server, until="released") as stream:
        (listener,) = stream.offers["PROD"].relays[0].listeners
        assert {split(str(one))[0] for one in (listener.address, *listener.also)} == set(both["wan_bind"])
        ends = services.established(server, stream.listeners[0])
        over = {split(one.split()[2])[0] for one in b.connections() if one.startswith("ESTAB")}
        assert over & set(both["wan_bind"]) == {a.address(only, "wan")}
        services.apps.exchange(*ends, Payload(1, 1_000_000), Payload(2, 1_000_000))


def test_no_byte_of_a_stream_takes_the_way_of_the_commands(services: Services) -> None:
    server = services.listen()
    with services.open(server, until="released") as stream:
        consumer, producer = services.established(server, stream.listeners[0])
        legs = {leg.name: leg.carried_bytes for leg in services.network.legs}
        services.apps.exchange(consumer, producer, Payload(1, 5_000_000), Payload(2, 5_000_000))
        stream.status()
        grown = {leg.name: leg.carried_bytes - legs[leg.name] for leg in services.network.legs}
    assert {leg for leg, count in grown.items() if count > 10_000_000} == {"lan-a", "wan", "lan-b"}
    assert grown["control-a"] + grown["control-b"] < 100_000


def test_a_lease_is_renewed_by_ssh_and_ends_both_relays_when_nobody_renews_it(services: Services) -> None:
    server = services.listen()
    stream = services.open(server, lease_s=2)

    def left_s() -> list[float]:
        status = stream.status()
        return [side.lease_remaining_s or 0 for side in (status.prod, status.cons)]

    eventually(lambda: max(left_s()) < 1.5)
    stream.renew()
    assert min(left_s()) > 1.5
    eventually(lambda: not services.relays(), within_s=6)
    end = stream.status()
    assert (end.prod.reason, end.cons.reason) == ("lease_expired", "lease_expired")
    services.wait_bare()


def test_a_stream_outlives_session_and_service_and_is_found_again(services: Services) -> None:
    server = services.listen()
    with services.opening(server, uid="s", until="released") as process:
        assert process.stdout
        listeners = json.loads(process.stdout.readline())
        consumer, producer = services.established(server, listeners[0])
        process.kill()
    eventually(lambda: not services.a.server.sessions() and not services.b.server.sessions())
    assert services.relays() == BOTH
    services.apps.exchange(consumer, producer, Payload(1, 3_000_000), Payload(2, 3_000_000))
    again = services.open(server, uid="s", until="released")
    assert again.listeners == listeners
    assert again.status().prod.bytes.to_producer == 3_000_001
    assert services.relays() == BOTH
    end = again.release()
    assert end.reasons == {"PROD": "released", "CONS": "released"}
    services.wait_bare()


def test_a_stream_goes_on_while_its_gateways_cannot_be_reached_by_ssh(services: Services) -> None:
    for side in ("a", "b"):
        services.configure(side, **{f"gateway_{side}": {"connect_timeout_s": 1}})
    server = services.listen()
    stream = services.open(server, uid="s", until="released")
    consumer, producer = services.established(server, stream.listeners[0])
    services.a.control.cut()
    with pytest.raises(GatewayUnreachable, match="gateway gateway-a cannot be reached by SSH"):
        stream.status()
    services.apps.exchange(consumer, producer, Payload(1, 3_000_000), Payload(2, 3_000_000))
    services.network.restore()
    assert eventually(stream.status, within_s=5).cons.bytes.to_consumer == 3_000_001
    stream.release()


@pytest.mark.parametrize("what", LIMITS)
def test_the_status_names_the_narrow_place_by_ssh(services: Services, what: str) -> None:
    server = services.listen()
    with services.open(server, mode="auth", until="released") as stream:  # the kernel carries
        consumer, producer = services.established(server, stream.listeners[0])
        assert_named(
            lambda: stream.status().limiting,
            what,
            "to_consumer",
            network=services.network,
            apps=services.apps,
            consumer=consumer,
            producer=producer,
        )


@pytest.mark.parametrize(
    ("obstacle", "reason", "errno"),
    [
        ("a filter that swallows", "no-answer", None),
        ("a filter that turns away", "no-route", "EHOSTUNREACH"),
        ("an address where nobody listens", "refused", "ECONNREFUSED"),
    ],
)
def test_a_wan_port_that_cannot_be_reached_is_named_with_the_reason_and_nothing_is_left(
    services: Services, obstacle: str, reason: str, errno: str | None
) -> None:
    gateway = services.a.host
    if obstacle == "an address where nobody listens":
        gateway.call("ip", "address", "add", "192.0.2.99/24", "dev", "wan")
        services.configure("a", gateway_a={"wan_advertise": "192.0.2.99"})
    else:
        gateway.block("5100-5199", "wan", "blackhole" if "swallows" in obstacle else "prohibit")
    with pytest.raises(StreamNotReady) as caught:
        services.open(services.listen(), ready_timeout_s=1.5)
    assert (caught.value.leg, caught.value.reason) == ("wan", reason)
    assert caught.value.details["errno"] == errno
    assert "the consumer's relay cannot reach the producer's" in caught.value.message
    services.wait_bare()


def test_a_wan_that_is_blocked_until_the_relays_give_up_is_still_the_wan(services: Services) -> None:
    services.a.host.block("5100-5199", "wan", "prohibit")
    with pytest.raises(StreamNotReady) as caught:
        services.open(services.listen(), hello_timeout_s=1)
    assert (caught.value.leg, caught.value.reason) == ("wan", "no-route")
    services.wait_bare()


def test_an_application_that_does_not_listen_is_the_producers_lan(services: Services) -> None:
    server = services.listen()
    target = join(server.getsockname())
    server.shutdown(socket.SHUT_RDWR)
    with pytest.raises(StreamNotReady, match=f"cannot connect to its target {target}") as caught:
        services.open(server, ready_timeout_s=1.5)
    assert (caught.value.leg, caught.value.reason) == ("producer-lan", "unreachable")
    services.wait_bare()
