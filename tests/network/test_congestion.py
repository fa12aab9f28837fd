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


def of_a_connection(facilities: Facilities, server: socket.socket, pair: Pair) -> set[tuple[str, str]]:
    """What the sockets on the LAN and on the WAN have, of either relay, for one more connection."""
    facilities.established(server, pair)
    legs = [relay.status()["streams"][-1]["legs"] for relay in pair]
    return {(one["lan"]["congestion_control"], one["wan"]["congestion_control"]) for one in legs}


def test_across_a_site_nothing_is_paced_and_over_a_long_way_the_gateways_own_congestion_control_is_used(
    facilities: Facilities, mode: str
) -> None:
    facilities.network.wan.delay(0.01)
    server, pair = pair_where_new_sockets_have("bbr", facilities, mode)
    # A busy machine may take a millisecond to answer on its own LAN: that connection keeps the system's.
    eventually(lambda: of_a_connection(facilities, server, pair) == {("cubic", "bbr")})


def test_a_congestion_control_that_does_not_pace_is_left_as_it_is(facilities: Facilities) -> None:
    server, pair = pair_where_new_sockets_have("reno", facilities, "none")
    assert of_a_connection(facilities, server, pair) == {("reno", "reno")}
