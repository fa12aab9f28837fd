"""What a facility admits: pure functions over a request, the configuration and a snapshot of what is in use."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from scistream_flows.config import EVERYBODY, LOOPBACK, AllowRule, FacilityConfig, GatewayConfig
from scistream_flows.errors import BadRequest, CapacityExhausted, NotSupported, PolicyDenied, PortsExhausted
from scistream_flows.models import IPAddress, IPNetwork, Mode, Peer, Request, Role, ip_of, split_address

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

PIPE_MIB_PER_LISTENER: Final = 2  # one pipe of 1 MiB for each direction
_UNCOUNTED: Final = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What is in use at one moment.

    Attributes:
        streams_of_owner: Open sides of the owner who asks.
        reserved_of_owner_mbits_per_s: What these have reserved, Mbit/s per direction.
        streams: Open sides with a relay on it, per gateway name.
        reserved_mbits_per_s: Reserved rate per gateway name, Mbit/s per direction.
        listeners: Listeners in use per gateway name.
        connections: Concurrent connections booked per gateway name.
        draining: The names of the gateways that take no new stream.
    """

    streams_of_owner: int = 0
    reserved_of_owner_mbits_per_s: int = 0
    streams: Mapping[str, int] = field(default_factory=dict)
    reserved_mbits_per_s: Mapping[str, int] = field(default_factory=dict)
    listeners: Mapping[str, int] = field(default_factory=dict)
    connections: Mapping[str, int] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()


class Share(NamedTuple):
    """The part of a stream that one gateway carries: its listeners, and what is booked for them."""

    gateway: str
    indices: tuple[int, ...]
    connections: int
    reserved_mbits_per_s: int


def allows(
    right: Right, *, owner: str, managers: Collection[str], monitors: Collection[str], caller: Collection[str]
) -> bool:
    """Whether one of the caller's identities has the right on a stream."""
    if owner in caller or any(one in caller for one in managers):
        return True
    return right == "monitor" and any(one in caller for one in monitors)


def admit_user(caller: Sequence[str], facility: FacilityConfig, *, service: str) -> None:
    """Check whether a caller may open streams.

    Args:
        caller: The caller's URNs; any of them counts.
        facility: Its configuration.
        service: The URN of the Unix user that runs the service.

    Raises:
        PolicyDenied: Naming the caller, and the key of the configuration that would allow it.
    """
    users = [service] if facility.policy.users is None else facility.policy.users
    if EVERYBODY not in users and not any(one in users for one in caller):
        raise PolicyDenied(
            f"{caller[0]} may not open streams at facility {facility.name}",
            which=caller[0],
            hint=f"Its administrator allows it with policy.users in {facility.file or 'its configuration'}",
            key="policy.users",
        )


def paced(busy_until_s: float, now_s: float, *, per_min: float, burst: int) -> tuple[float, float]:
    """Whether something may happen now that may happen so often per minute, `burst` times at once.

    Args:
        busy_until_s: What this answered the last time; 0 at first. A clock that was set back costs one burst at most.
        now_s: The time.
        per_min: How often per minute.
        burst: How often at once.

    Returns:
        The next `busy_until_s`, and how long to wait, seconds: 0 if it may happen, which has then been counted.
    """
    each_s = 60 / per_min
    full_s = burst * each_s
    busy_s = min(max(busy_until_s - now_s, 0.0), full_s)
    wait_s = busy_s + each_s - full_s
    # less than a microsecond is the rounding of these numbers
    return (now_s + busy_s, wait_s) if wait_s > 1e-6 else (now_s + busy_s + each_s, 0.0)


def administers(caller: Collection[str], facility: FacilityConfig) -> bool:
    """Whether one of the caller's identities is an administrator of the facility."""
    return any(one in caller for one in facility.policy.administrators)


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
    _admit_data_server(request, facility)
    for name, limit in (
        ("lease_s", policy.longest_lease_s),
        ("lifetime_s", policy.longest_lifetime_s),
        ("hello_timeout_s", policy.longest_hello_timeout_s),
        ("num_conn", policy.max_num_conn),
        ("max_connections", policy.max_connections),
    ):
        admit_at_most(name, getattr(request, name), limit, facility)


def _admit_data_server(request: Request, facility: FacilityConfig) -> None:
    """Raise when what carries the data here cannot do what is asked, or does not understand the other side."""
    ours = facility.data_server
    if ours == "haproxy" and request.mode != "none":
        raise PolicyDenied(
            f"facility {facility.name} runs HAProxy, which protects nothing: mode {request.mode!r} cannot be had",
            which=request.uid,
            hint="Ask for mode 'none', in which everybody on the way can read and alter the stream",
        )
    if ours == "haproxy" and request.reserve_rate and request.rate_mbits_per_s:
        raise NotSupported(
            f"facility {facility.name} runs HAProxy, which keeps to no rate: none can be reserved",
            which=request.uid,
            hint="Leave the rate out",
        )
    relays = request.offer.relays if request.offer else ()
    theirs = next((one.data_server for one in relays if one.data_server not in (None, ours)), None)
    if theirs:
        raise NotSupported(
            f"facility {facility.name} runs {ours}, PROD's runs {theirs}: they do not understand each other",
            which=request.uid,
            hint="Run the same data server at both facilities: s2cs --type",
        )


def admit_at_most(name: str, asked: int, limit: int, facility: FacilityConfig) -> None:
    """Raise PolicyDenied when `asked` is above the limit."""
    if asked > limit:
        raise PolicyDenied(
            f"{name} {asked} is above the limit of facility {facility.name}",
            which=name,
            hint=f"Ask for {limit} at most",
            limit=limit,
        )


def place(request: Request, facility: FacilityConfig, usage: Usage) -> list[Share]:
    """The gateways to use, one for each share: of those with room, the ones with most free.

    Share k has the listeners i with i mod gateways == k. What a gateway's pipe budget does not hold is placed where it
    does, if that is possible.

    Raises:
        PolicyDenied: The owner has what is allowed to one owner.
        PortsExhausted: Too few gateways have ports enough.
        CapacityExhausted: Too few gateways are there, not draining, or have enough of the rate or the connections
            free; the message says what is free.
    """
    needed = request.rate_mbits_per_s if request.reserve_rate else 0
    _admit_owner(request, needed, facility, usage)
    shares = [_share(request, number, needed) for number in range(request.gateways)]
    left = _not_draining(request, facility, usage)
    left = _with_room(left, shares, facility, usage, "ports")
    left = _with_room(left, shares, facility, usage, "mbits_per_s")
    left = _with_room(left, shares, facility, usage, "connections")
    placed = []
    for share in shares:  # the larger ones first: where these fit, the smaller ones do
        able = [
            one for one in left if all(_free(one, usage, what) >= _of(share, what) for what in _RESOURCES)
        ]
        if not able:
            raise CapacityExhausted(
                f"no {request.gateways} gateways of facility {facility.name} have ports, rate and connections free at"
                f" once for {request.num_conn} listeners",
                which=facility.name,
                hint="Ask for fewer listeners, connections or Mbit/s, or later",
            )
        best = max(able, key=lambda one: _preference(one, len(share.indices), usage))
        left.remove(best)
        placed.append(share._replace(gateway=best.name))
    return placed


def _admit_owner(request: Request, needed: int, facility: FacilityConfig, usage: Usage) -> None:
    limit = facility.policy.max_streams_per_owner
    if usage.streams_of_owner >= limit:
        raise PolicyDenied(
            f"the owner has {usage.streams_of_owner} streams open at facility {facility.name}, the limit is {limit}",
            which=request.uid,
            hint="Release one first",
            limit=limit,
        )
    limit = facility.policy.max_reserved_mbits_per_s_per_owner
    if limit and needed and usage.reserved_of_owner_mbits_per_s + needed > limit:
        raise PolicyDenied(
            f"the owner has {usage.reserved_of_owner_mbits_per_s} Mbit/s reserved at facility {facility.name}, with"
            f" {needed} more the limit of {limit} is passed",
            which=request.uid,
            hint="Ask for less, for a cap with reserve_rate=false, or release a stream first",
            limit=limit,
        )


Resource = Literal["ports", "mbits_per_s", "connections"]
_RESOURCES: Final[tuple[Resource, ...]] = ("ports", "mbits_per_s", "connections")


def _share(request: Request, number: int, reserved: int) -> Share:
    indices = tuple(range(number, request.num_conn, request.gateways))
    return Share(
        gateway="",
        indices=indices,
        connections=len(indices) * request.max_connections,
        reserved_mbits_per_s=-(-reserved * len(indices) // request.num_conn),
    )


def share_of_rate(rate_mbits_per_s: int, indices: Sequence[int], *, num_conn: int, gateways: int) -> int:
    """What the relay with these listeners enforces of a stream's rate, Mbit/s: all shares add up to the rate.

    A rate has whole Mbit/s, and 0 is no limit: of fewer Mbit/s than relays each has 1.
    """
    if rate_mbits_per_s == 0:
        return 0
    before = sum(len(range(number, num_conn, gateways)) for number in range(indices[0] % gateways))
    upper = rate_mbits_per_s * (before + len(indices)) // num_conn
    return max(1, upper - rate_mbits_per_s * before // num_conn)


def _not_draining(request: Request, facility: FacilityConfig, usage: Usage) -> list[GatewayConfig]:
    left = [one for one in facility.gateways if one.name not in usage.draining]
    if len(left) >= request.gateways:
        return left
    draining = [one.name for one in facility.gateways if one.name in usage.draining]
    if draining and not left:
        words = (
            f"every gateway of facility {facility.name} is draining for maintenance: {', '.join(draining)}"
        )
    else:
        words = (
            f"{request.gateways} gateways were asked for, facility {facility.name} has {len(left)} to use"
            + (f"; draining for maintenance: {', '.join(draining)}" if draining else "")
        )
    raise CapacityExhausted(
        words,
        which=facility.name,
        hint=f"Ask for gateways={len(left)} at most" + (", or later" if draining else "")
        if left
        else "Ask later",
        free=len(left),
        draining=draining,
    )


def _with_room(
    gateways: list[GatewayConfig],
    shares: Sequence[Share],
    facility: FacilityConfig,
    usage: Usage,
    what: Resource,
) -> list[GatewayConfig]:
    """Those of the gateways that have room for the smallest share, if the shares find room on them."""
    needs = [_of(share, what) for share in shares]
    room = sorted((_free(one, usage, what) for one in gateways), reverse=True)
    if all(free >= need for free, need in zip(room, needs, strict=False)):  # both begin with the largest
        return [one for one in gateways if _free(one, usage, what) >= needs[-1]]
    raise _exhausted(what, shares, room, facility)


def _exhausted(
    what: Resource, shares: Sequence[Share], room: Sequence[int], facility: FacilityConfig
) -> CapacityExhausted:
    many = len(shares) > 1
    need = _of(shares[0], what)
    free = room[len(shares) - 1] if many else room[0]
    subject = f"fewer than {len(shares)} gateways" if many else "no gateway"
    on_each = " on each of them" if many else ""
    if what == "ports":
        least = f"Ask for num_conn={free * len(shares)} at most, or later"
        return PortsExhausted(
            f"{subject} of facility {facility.name} {'have' if many else 'has'} {need} ports free",
            which=facility.name,
            hint=least if free else "Release a stream, or ask later",
            free=free,
        )
    if what == "connections":
        return CapacityExhausted(
            f"{subject} of facility {facility.name} can take {need} connections more",
            which=facility.name,
            hint=f"{free} are free{on_each}: ask for less with num_conn or max_connections, or later",
            free_connections=free,
        )
    return CapacityExhausted(
        f"{subject} of facility {facility.name} can carry {need} Mbit/s more",
        which=facility.name,
        hint=f"{free} Mbit/s are free{on_each}: ask for less, or with rate_mbits_per_s=0 for best effort",
        free_mbits_per_s=free,
    )


def _of(share: Share, what: Resource) -> int:
    if what == "ports":
        return len(share.indices)
    return share.connections if what == "connections" else share.reserved_mbits_per_s


def _free(gateway: GatewayConfig, usage: Usage, what: Resource) -> int:
    if what == "ports":
        return max(0, gateway.port_range.size - usage.listeners.get(gateway.name, 0))
    if what == "connections":
        budget, used = gateway.connection_budget, usage.connections.get(gateway.name, 0)
    else:
        budget, used = gateway.capacity_mbits_per_s, usage.reserved_mbits_per_s.get(gateway.name, 0)
    return max(0, budget - used) if budget else _UNCOUNTED


def _preference(gateway: GatewayConfig, listeners: int, usage: Usage) -> tuple[bool, int, int, int]:
    pipes_mib = PIPE_MIB_PER_LISTENER * (usage.listeners.get(gateway.name, 0) + listeners)
    within_pipes = gateway.pipe_budget_mib == 0 or pipes_mib <= gateway.pipe_budget_mib
    return (
        within_pipes,
        _free(gateway, usage, "mbits_per_s"),
        _free(gateway, usage, "connections"),
        _free(gateway, usage, "ports"),
    )


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


def ticket_networks(asked: Sequence[str], role: Role, facility: FacilityConfig) -> list[str]:
    """The networks in which a ticket may be used: those asked for, by default all that the policy has.

    Raises:
        PolicyDenied: One that is asked for is not within the policy's.
    """
    kind: Literal["targets", "consumers"] = "targets" if role == "PROD" else "consumers"
    allowed = [rule.network for rule in getattr(facility.policy, kind)]
    for text in asked:
        if not any(_within(ipaddress.ip_network(text), one) for one in allowed):
            raise PolicyDenied(
                f"facility {facility.name} does not allow {text} in {kind}",
                which=text,
                hint=f"Allowed {kind}: {', '.join(map(str, allowed)) or 'none'}",
            )
    return list(asked) or list(dict.fromkeys(map(str, allowed)))


def admit_with_ticket(address: str, networks: Sequence[str]) -> str:
    """Check an IP address against the networks of a ticket; answers it, plainly written.

    Raises:
        PolicyDenied: It is in none of them.
    """
    ip = ip_of(address)
    if ip is None or not any(
        _within(ipaddress.ip_network(ip), ipaddress.ip_network(one)) for one in networks
    ):
        raise PolicyDenied(
            f"this ticket is not for {address}",
            which=address,
            hint=f"It is for {', '.join(networks)}; ask for one with networks=[…]",
        )
    return str(ip)


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
