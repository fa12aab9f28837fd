"""Which addresses a stream uses: where a gateway dials, from where, and how others see what its relays have bound.

A gateway may have an address of each IP version. Of two ways the one over IPv4 is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scistream_flows.config import GatewayConfig
from scistream_flows.models import Listener, Offer, Request, Role, join_address, split_address


def peers(offer: Offer, gateway: GatewayConfig) -> Sequence[Mapping[str, Any]]:
    """PROD's relays as this gateway dials them: of each listener the first address of an IP version that it has."""
    versions = gateway.wan_versions()

    def chosen(listener: Listener) -> str:
        addresses = [listener.address, *listener.also]
        return next((one for one in addresses if _version(one) in versions), listener.address)

    return [
        {
            "relay_id": relay.relay_id,
            "public_key": relay.public_key,
            "listeners": [{"index": one.index, "address": chosen(one)} for one in relay.listeners],
        }
        for relay in offer.relays
    ]


def can_dial(gateway: GatewayConfig, offer: Offer) -> bool:
    """Whether a gateway has an address of an IP version of each of PROD's listeners."""
    versions = gateway.wan_versions()
    listeners = [one for relay in offer.relays for one in relay.listeners]
    return all(any(_version(it) in versions for it in (one.address, *one.also)) for one in listeners)


def dialled(peers: Iterable[Mapping[str, Any]]) -> Sequence[str]:
    """Every `ip:port` that is dialled."""
    return [one["address"] for peer in peers for one in peer["listeners"]]


def _version(address: str) -> int:
    return 6 if address.startswith("[") else 4


def source(sources: Sequence[str], onwards: Mapping[str, Any]) -> str | None:
    """The local address to connect from: the one of the IP version that all it connects to have."""
    versions = {_version(one) for one in (*onwards["targets"], *dialled(onwards["peers"]))}
    if not versions:
        return sources[0] if len(sources) == 1 else None
    return next((one for one in sources if versions == {6 if ":" in one else 4}), None)


def dial_addresses(gateway: GatewayConfig, request: Request) -> Sequence[str]:
    """Where PROD sees CONS come from; empty, so that the key alone proves it, if that is not known."""
    if request.offer is None:
        return []
    versions = {_version(one) for one in dialled(peers(request.offer, gateway))}
    known = [one for one in gateway.dial_addresses() if (6 if ":" in one else 4) in versions]
    return known if {6 if ":" in one else 4 for one in known} == versions else []


def advertised(gateway: GatewayConfig, role: Role, bound: Sequence[Listener]) -> list[Listener]:
    """The listeners of a relay as others reach them: one for each index, IPv4 before IPv6."""
    found: dict[int, list[str]] = {}
    for one in sorted(bound, key=lambda one: _version(one.address)):
        ip, port = split_address(one.address)
        seen_as = [join_address(seen, port) for seen in gateway.advertised_addresses(role, ip)]
        found.setdefault(one.index, []).extend(seen_as)
    return [
        Listener(index=index, address=addresses[0], also=addresses[1:]) for index, addresses in found.items()
    ]
