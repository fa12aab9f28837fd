"""What a facility admits: pure functions over a request, the configuration and a snapshot of what is in use."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from scistream_flows.config import LOOPBACK, AllowRule, FacilityConfig, GatewayConfig
from scistream_flows.errors import BadRequest, CapacityExhausted, NotSupported, PolicyDenied, PortsExhausted
from scistream_flows.models import IPAddress, IPNetwork, Mode, Peer, Request, ip_of, split_address

# Addresses that mean something to the machine that connects: a rule covers one of them only if it lies within the
# special network itself. So 0.0.0.0/0 opens the world, but neither loopback nor a cloud's metadata service.
SPECIAL: tuple[IPNetwork, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/3",
        "::/128",
        "::1/128",
        "fe80::/10",
        "fd00:ec2::254/128",
        "ff00::/8",
    )
)
_LOOPBACK_NETWORKS: tuple[IPNetwork, ...] = tuple(ipaddress.ip_network(text) for text in LOOPBACK)

Right = Literal["manage", "monitor"]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What is in use at one moment.

    Attributes:
        streams_of_owner: Open sides of the owner who asks.
        reserved_mbits_per_s: Reserved rate per gateway name, Mbit/s per direction.
        listeners: Listeners in use per gateway name.
    """

    streams_of_owner: int = 0
    reserved_mbits_per_s: Mapping[str, int] = field(default_factory=dict)
    listeners: Mapping[str, int] = field(default_factory=dict)


def allows(
    right: Right, *, owner: str, managers: Collection[str], monitors: Collection[str], caller: Collection[str]
) -> bool:
    """Whether one of the caller's identities has the right on a stream."""
    if owner in caller or any(one in caller for one in managers):
        return True
    return right == "monitor" and any(one in caller for one in monitors)


def admit(request: Request, facility: FacilityConfig) -> None:
    """Check what does not depend on usage.

    Raises:
        NotSupported: For `dial="prod"`.
        PolicyDenied: Naming the limit and its value.
    """
    if request.dial == "prod":
        raise NotSupported(
            'dial="prod" is not supported yet',
            which=request.uid,
            hint='Use dial="cons": CONS dials on the WAN',
        )
    policy = facility.policy
    if request.mode not in policy.modes:
        raise PolicyDenied(
            f"facility {facility.name} does not allow mode {request.mode!r}",
            which=request.uid,
            hint=f"Allowed: {', '.join(policy.modes)}",
        )
    for name, limit in (
        ("lease_s", policy.longest_lease_s),
        ("lifetime_s", policy.longest_lifetime_s),
        ("hello_timeout_s", policy.longest_hello_timeout_s),
        ("num_conn", policy.max_num_conn),
        ("max_connections", policy.max_connections),
    ):
        admit_at_most(name, getattr(request, name), limit, facility)


def admit_at_most(name: str, asked: int, limit: int, facility: FacilityConfig) -> None:
    """Raise PolicyDenied when `asked` is above the limit."""
    if asked > limit:
        raise PolicyDenied(
            f"{name} {asked} is above the limit of facility {facility.name}",
            which=name,
            hint=f"Ask for {limit} at most",
            limit=limit,
        )


def place(request: Request, facility: FacilityConfig, usage: Usage) -> GatewayConfig:
    """The gateway to use: of those with room, the one with the largest share of capacity free.

    Raises:
        PolicyDenied: When the owner has the allowed number of streams.
        PortsExhausted: When no gateway has ports enough.
        CapacityExhausted: When no gateway can carry the reserved rate; the message says what is free.
    """
    limit = facility.policy.max_streams_per_owner
    if usage.streams_of_owner >= limit:
        raise PolicyDenied(
            f"the owner has {usage.streams_of_owner} streams open at facility {facility.name}, the limit is {limit}",
            which=request.uid,
            hint="Release one first",
            limit=limit,
        )
    roomy = [one for one in facility.gateways if _free_ports(one, usage) >= request.num_conn]
    if not roomy:
        free = max(_free_ports(one, usage) for one in facility.gateways)
        raise PortsExhausted(
            f"no gateway of facility {facility.name} has {request.num_conn} ports free",
            which=facility.name,
            hint=f"Ask for num_conn={free} at most, or later" if free else "Release a stream, or ask later",
            free=free,
        )
    needed = request.rate_mbits_per_s if request.reserve_rate else 0
    able = [one for one in roomy if needed == 0 or _free_mbits_per_s(one, usage) >= needed]
    if not able:
        free = max(_free_mbits_per_s(one, usage) for one in roomy)
        raise CapacityExhausted(
            f"no gateway of facility {facility.name} can carry {needed} Mbit/s more",
            which=facility.name,
            hint=f"{free} Mbit/s are free: ask for less, or with rate_mbits_per_s=0 for best effort",
            free_mbits_per_s=free,
        )
    return max(able, key=lambda one: (_free_mbits_per_s(one, usage), _free_ports(one, usage)))


def _free_ports(gateway: GatewayConfig, usage: Usage) -> int:
    return max(0, gateway.port_range.size - usage.listeners.get(gateway.name, 0))


def _free_mbits_per_s(gateway: GatewayConfig, usage: Usage) -> int:
    if gateway.capacity_mbits_per_s == 0:
        return 10_000_000
    return max(0, gateway.capacity_mbits_per_s - usage.reserved_mbits_per_s.get(gateway.name, 0))


def admit_address(address: str, *, kind: Literal["targets", "peers"], facility: FacilityConfig) -> None:
    """Check one numeric `ip:port` to which a relay would connect.

    Raises:
        PolicyDenied: When no entry of the allow-list covers it.
    """
    host, port = split_address(address)
    ip = ip_of(host)
    own = {one for gateway in facility.gateways for one in gateway.own_addresses()}
    rules: Sequence[AllowRule] = getattr(facility.policy, kind)
    if ip is None or not any(
        _covers(rule, ip, own) and rule.first_port <= port <= rule.last_port for rule in rules
    ):
        raise PolicyDenied(
            f"facility {facility.name} does not allow {address} in {kind}",
            which=address,
            hint=f"Allowed {kind}: {', '.join(map(str, rules)) or 'none'}"
            + (
                "; a special or own address must be listed itself"
                if ip and _special_networks(ip, own)
                else ""
            ),
        )


def admit_consumers(networks: Iterable[str], facility: FacilityConfig) -> None:
    """Check the sources that would be allowed at LAN listeners.

    Raises:
        PolicyDenied: When a network is not within one of the policy's.
    """
    for text in networks:
        if not any(_within(ipaddress.ip_network(text), rule.network) for rule in facility.policy.consumers):
            raise PolicyDenied(
                f"facility {facility.name} does not allow {text} in consumers",
                which=text,
                hint=f"Allowed consumers: {', '.join(map(str, facility.policy.consumers)) or 'none'}",
            )


def default_consumers(facility: FacilityConfig) -> list[str]:
    """The sources allowed when a request names none: loopback, where the policy has it."""
    allowed = [rule.network for rule in facility.policy.consumers]
    return [str(one) for one in _LOOPBACK_NETWORKS if any(_within(one, network) for network in allowed)]


def admit_peers(peers: Iterable[Peer], mode: Mode, facility: FacilityConfig) -> None:
    """Check the CONS relays that PROD is to admit.

    In mode `none` the source address is all that tells a peer from a stranger: it must be given and allowed.

    Raises:
        BadRequest: When a peer of mode `none` has no source address.
        PolicyDenied: When the policy does not have it.
    """
    if mode != "none":
        return
    for peer in peers:
        if not peer.source_addresses:
            raise BadRequest(
                "peers: in mode 'none' a peer needs source_addresses",
                which="peers",
                hint="Take dial_addresses from the offer of CONS, or use mode 'tls'",
            )
        for text in peer.source_addresses:
            if not any(_within(ipaddress.ip_network(text), rule.network) for rule in facility.policy.peers):
                raise PolicyDenied(
                    f"facility {facility.name} does not allow {text} in peers",
                    which=text,
                    hint=f"Allowed peers: {', '.join(map(str, facility.policy.peers)) or 'none'}",
                )


def _covers(rule: AllowRule, ip: IPAddress, own: Collection[IPAddress]) -> bool:
    if not _within(ipaddress.ip_network(ip), rule.network):
        return False
    special = _special_networks(ip, own)
    return not special or any(_within(rule.network, network) for network in special)


def _special_networks(ip: IPAddress, own: Collection[IPAddress]) -> list[IPNetwork]:
    networks = [network for network in SPECIAL if _within(ipaddress.ip_network(ip), network)]
    if ip in own:
        networks.append(ipaddress.ip_network(ip))
    return networks


def _within(inner: IPNetwork, outer: IPNetwork) -> bool:
    if isinstance(inner, ipaddress.IPv4Network) and isinstance(outer, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(inner, ipaddress.IPv6Network) and isinstance(outer, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False
