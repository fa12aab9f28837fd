"""Which congestion control the sockets of a relay have where the gateways' own is one that paces."""

import socket
from pathlib import Path

import pytest
from relay.gateway import Pair, eventually

from .sites import Facilities

pytestmark = pytest.mark.net

AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


def pair_where_new_sockets_have(own: str, facilities: Facilities, mode: str) -> tuple[socket.socket, Pair]:
    """A listening application, and a stream to it between gateways whose own congestion control is this."""
    if own not in AVAILABLE.read_text().split():
        pytest.skip(f"this kernel has no {own} loaded")
    for host in (facilities.network.gateway_a, facilities.network.gateway_b):
        host.set(net__ipv4__tcp_congestion_control=own)
    server = facilities.listen()
    return server, facilities.pair(mode, server.getsockname())


def of_one_more_and_all_before(
    facilities: Facilities, server: socket.socket, pair: Pair
) -> list[set[tuple[str, str]]]:
    """Makes a connection; what the sockets on the LAN and on the WAN have, of all connections of either relay."""
    facilities.established(server, pair)
    legs = [[stream["legs"] for stream in relay.status()["streams"]] for relay in pair]
    return [
        {(one["lan"]["congestion_control"], one["wan"]["congestion_control"]) for one in of_relay}
        for of_relay in legs
    ]


def test_across_a_site_nothing_is_paced_and_over_a_long_way_the_gateways_own_congestion_control_is_used(
    facilities: Facilities, mode: str
) -> None:
    facilities.network.wan.delay(0.01)
    server, pair = pair_where_new_sockets_have("bbr", facilities, mode)
    # Chosen at the first look by the shortest round trip so far: on a busy machine not each LAN is a short way.
    eventually(
        lambda: all(("cubic", "bbr") in seen for seen in of_one_more_and_all_before(facilities, server, pair))
    )


def test_a_congestion_control_that_does_not_pace_is_left_as_it_is(facilities: Facilities) -> None:
    server, pair = pair_where_new_sockets_have("reno", facilities, "none")
    assert of_one_more_and_all_before(facilities, server, pair) == [{("reno", "reno")}] * 2
