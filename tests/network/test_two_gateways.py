"""Two gateways at each facility: a stream over both, one that is away, one that is drained, one that dies."""

import os
import signal

import pytest
from relay.apps import Payload, receive_until_broken
from relay.gateway import eventually, is_running

from scistream_flows.errors import CapacityExhausted, GatewayUnreachable

from .services import Services

pytestmark = pytest.mark.net

EVERYWHERE = {"gateway-a": 1, "gateway-b": 1, "gateway-a2": 1, "gateway-b2": 1}
THERE, BACK = Payload(1, 1_000_000), Payload(2, 3_000_000)


@pytest.fixture
def gateways_each() -> int:
    return 2


@pytest.fixture(autouse=True)
def impatient(services: Services) -> None:
    """A gateway that is away is given up soon."""
    for side in ("a", "b"):
        names = (f"gateway_{side}", f"gateway_{side}2")
        services.configure(side, **{name: {"connect_timeout_s": 1} for name in names})


def test_a_stream_goes_over_both_gateways_and_each_relay_has_its_own_key(
    services: Services, mode: str
) -> None:
    server = services.listen()
    with services.open(server, mode=mode, num_conn=2, gateways=2, until="released") as stream:
        assert services.relays() == EVERYWHERE
        relays = [relay for offer in stream.offers.values() for relay in offer.relays]
        assert len({relay.public_key for relay in relays}) == 4
        assert [[one.index for one in relay.listeners] for relay in relays] == [[0], [1], [0], [1]]
        for address in stream.listeners:
            services.apps.exchange(*services.established(server, address), THERE, BACK)
        status = stream.status()
        for relay in (*status.prod.relays, *status.cons.relays):
            assert (relay.bytes.to_producer, relay.bytes.to_consumer) == (THERE.size + 1, BACK.size + 1)
        assert status.bytes.to_consumer == 2 * BACK.size + 2
    services.wait_bare()


def test_a_gateway_that_is_away_is_skipped_and_said(
    services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    services.network.cut_off(services.a.host)
    server = services.listen()
    with services.open(server, uid="s") as stream:
        assert services.relays() == {"gateway-a2": 1, "gateway-b": 1}
        services.apps.exchange(*services.established(server, stream.listeners[0]), THERE, BACK)
    assert "gateway gateway-a is skipped: gateway gateway-a cannot be reached by SSH" in caplog.text
    (skipped,) = services.audit("a", "skip")
    assert (skipped["gateway"], skipped["uid"]) == ("gateway-a", "s")


def test_a_stream_over_more_gateways_than_are_there_is_refused_and_says_which_is_away(
    services: Services,
) -> None:
    services.network.cut_off(services.b.host)
    with pytest.raises(GatewayUnreachable, match="2 gateways were asked for, only 1 gateway") as caught:
        services.open(services.listen(), num_conn=2, gateways=2)
    assert caught.value.details["gateways"].keys() == {"gateway-b"}
    assert services.relays() == {}
    services.network.restore()
    services.wait_bare()


def test_a_drained_gateway_takes_no_new_stream_and_lets_the_running_one_go_on(services: Services) -> None:
    server = services.listen()
    with services.open(server, num_conn=2, gateways=2, until="released") as running:
        services.service("a").drain("gateway-a")
        with services.open(server) as stream:
            assert [relay.gateway for relay in stream.offers["PROD"].relays] == ["gateway-a2"]
        with pytest.raises(CapacityExhausted, match="draining for maintenance: gateway-a"):
            services.open(server, num_conn=2, gateways=2)
        for address in running.listeners:
            services.apps.exchange(*services.established(server, address), THERE, BACK)
    services.service("a").undrain("gateway-a")
    with services.open(server, num_conn=2, gateways=2):
        assert services.relays() == EVERYWHERE


def test_a_relay_that_is_killed_ends_the_stream_on_both_sides_and_on_every_gateway(
    services: Services,
) -> None:
    server = services.listen()
    stream = services.open(server, num_conn=2, gateways=2, linger_s=0)
    connections = [services.established(server, address) for address in stream.listeners]
    (relay,) = services.nodes["gateway-a2"].relays()
    os.kill(relay, signal.SIGKILL)
    assert [receive_until_broken(one) for one in connections[1]] == [(b"", "ConnectionResetError")] * 2
    end = stream.wait(20)
    assert (end.prod.state, end.prod.reason) == ("FAILED", "relay_lost")
    assert "gateway-a2" in (end.prod.message or "")
    assert (end.cons.state, end.cons.reason) == ("FAILED", "aborted_by_producer")
    # half a stream is none: what went over the other gateways is broken off as well
    assert [receive_until_broken(one) for one in connections[0]] == [(b"", "ConnectionResetError")] * 2
    services.wait_bare()


def test_a_gateway_that_dies_ends_the_stream_and_leaves_nothing_on_the_others(services: Services) -> None:
    server = services.listen()
    stream = services.open(server, num_conn=2, gateways=2, linger_s=0)
    connections = [services.established(server, address) for address in stream.listeners]
    dead = services.nodes["gateway-a2"]
    (relay,) = dead.relays()
    os.kill(relay, signal.SIGKILL)
    dead.server.kill()
    eventually(lambda: not is_running(relay))
    assert [receive_until_broken(one) for one in connections[1]] == [(b"", "ConnectionResetError")] * 2
    with pytest.raises(GatewayUnreachable, match="gateway gateway-a2 cannot be reached by SSH"):
        stream.status()
    with pytest.raises(GatewayUnreachable, match="gateway gateway-a2 cannot be reached by SSH"):
        stream.release()
    assert services.relays() == {}
    for pair in connections:
        for one in pair:
            one.close()
    eventually(lambda: not services.nodes["gateway-b"].left() and not services.nodes["gateway-b2"].left())
    assert services.facility("b").list().streams == []
    # once it is there again, one call puts the rest in order
    dead.server.start()
    assert services.facility("a").list().streams == []
    services.wait_bare()
    (closed,) = services.audit("a", "close")
    assert closed["state"] == "FAILED"
