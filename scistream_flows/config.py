"""What a facility is: its gateways, its policy, the place of its state.

`facility.toml` < `SCISTREAM_*` environment < argument. Without a file, any name is a development facility: one
gateway, loopback only, ports chosen by the kernel, with a state directory of its own.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from scistream_flows.errors import ConfigError
from scistream_flows.models import (
    DAY_S,
    UID_PATTERN,
    URN_PATTERN,
    DataServer,
    IPAddress,
    Mode,
    Network,
    RateMbits,
    Role,
    complaints,
    ip_of,
    plain_urn,
)

# by name: the one for Python 3.10 is not there for a type checker that runs on a later one
tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

SYSTEM_STATE = Path("/var/lib/scistream")
SYSTEM_CONFIG = Path("/etc/scistream")
EVERYBODY: Final = "all_authenticated_users"


def _port_range(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError('give a text such as "5100-5200", or "0" to let the kernel choose')
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", value)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not (first == last == 0 or 1 <= first <= last <= 65_535):
        raise ValueError(f'{value!r} is not a range such as "5100-5200" within 1 to 65535, nor "0"')
    return PortRange(first, last)


def _ips(value: object) -> object:
    """One address, or a list of at most one of each IP version: IPv4 first."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise ValueError('give an IP address, or a list of two such as ["192.0.2.10", "2001:db8::10"]')
    addresses = [ip_of(one) for one in value]
    for text, address in zip(value, addresses, strict=True):
        if address is None:
            raise ValueError(f"{text!r} is not a numeric IP address")
    found = sorted((one for one in addresses if one is not None), key=lambda one: one.version)
    if not found or len({one.version for one in found}) < len(found):
        raise ValueError(
            f"{len(found)} addresses are given: one, or one IPv4 and one IPv6 address are allowed"
        )
    return tuple(str(one) for one in found)


def _own_path(value: str) -> str:
    if not value.startswith(("/", "~/")) or not value.isprintable():
        raise ValueError(f'{value!r} is neither an absolute path nor one that begins with "~/"')
    return value


def _absolute_path(value: str) -> str:
    if not value.startswith("/") or not value.isprintable():
        raise ValueError(f"{value!r} is not an absolute path")
    return value


def _uuid(value: str) -> str:
    try:
        return str(UUID(value))
    except ValueError:
        raise ValueError(f"{value!r} is not a UUID") from None


def _principal(value: str) -> str:
    kind, _, name = plain_urn(value).rpartition(":")
    if kind in ("urn:globus:auth:identity", "urn:globus:groups:id"):
        return f"{kind}:{_uuid(name)}"
    if value not in ("public", "all_authenticated_users"):
        raise ValueError(
            f'{value!r} is neither "all_authenticated_users" nor urn:globus:auth:identity:UUID or '
            "urn:globus:groups:id:UUID"
        )
    return value


def _identity(value: str) -> str:
    if not plain_urn(value).startswith("urn:globus:auth:identity:"):
        raise ValueError(f"{value!r} is not urn:globus:auth:identity:UUID")
    return _principal(value)


def _service_url(value: str) -> str:
    if not re.fullmatch(
        r"https?://[A-Za-z0-9_.-]+(:[0-9]{1,5})?|https?://\[[0-9a-fA-F:.]+\](:[0-9]{1,5})?", value
    ):
        raise ValueError(f"{value!r} is not an address such as https://gateway.example.org:5000")
    return value


def _urn(value: str, *, also: str = "") -> str:
    if not re.fullmatch(URN_PATTERN, value):
        raise ValueError(
            f"{value!r} is not a URN, such as urn:globus:auth:identity:UUID, urn:globus:groups:id:UUID or"
            f" urn:scistream:unix:UID@HOST{also}"
        )
    return plain_urn(value)


def _user(value: str) -> str:
    return value if value == EVERYBODY else _urn(value, also=f', nor "{EVERYBODY}"')


class PortRange(NamedTuple):
    """Ports, both ends included; 0 to 0 lets the kernel choose."""

    first: int
    last: int

    @property
    def size(self) -> int:
        """How many ports there are to take."""
        return 65_535 if self.first == 0 else self.last - self.first + 1


class AllowRule(NamedTuple):
    """One entry of an allow-list: `CIDR`, `CIDR:port` or `CIDR:first-last`, an IPv6 network in brackets."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    first_port: int
    last_port: int

    def __str__(self) -> str:
        network = f"[{self.network}]" if self.network.version == 6 else str(self.network)
        if (self.first_port, self.last_port) == (0, 65_535):
            return network
        ports = (
            f"{self.first_port}"
            if self.first_port == self.last_port
            else f"{self.first_port}-{self.last_port}"
        )
        return f"{network}:{ports}"


def _allow_rule(value: object) -> object:
    words = f'{value!r} is not NETWORK or NETWORK:PORTS, such as "192.0.2.0/24:5000-6000" or "[2001:db8::/32]:443"'
    if not isinstance(value, str):
        raise ValueError(words)
    match = re.fullmatch(r"(?:\[(.+)\]|([^:\[\]]+))(?::([0-9]{1,5})(?:-([0-9]{1,5}))?)?", value)
    network, first, last = (match[1] or match[2], match[3], match[4]) if match else (value, None, None)
    try:
        parsed = ipaddress.ip_network(network)
    except ValueError as wrong:
        raise ValueError(f"{words}: {wrong}") from None
    if first is None:
        return AllowRule(parsed, 0, 65_535)
    ports = int(first), int(last or first)
    if not 1 <= ports[0] <= ports[1] <= 65_535:
        raise ValueError(words)
    return AllowRule(parsed, *ports)


IPs: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_ips)]
Ports: TypeAlias = Annotated[PortRange, BeforeValidator(_port_range)]
Rules: TypeAlias = list[Annotated[AllowRule, BeforeValidator(_allow_rule)]]
OwnPath: TypeAlias = Annotated[str, AfterValidator(_own_path)]
AbsolutePath: TypeAlias = Annotated[str, AfterValidator(_absolute_path)]
Name: TypeAlias = Annotated[str, Field(pattern=UID_PATTERN)]
URN: TypeAlias = Annotated[str, AfterValidator(_urn)]
User: TypeAlias = Annotated[str, AfterValidator(_user)]
Principal: TypeAlias = Annotated[str, AfterValidator(_principal)]
IdentityURN: TypeAlias = Annotated[str, AfterValidator(_identity)]
Account: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@-]{0,127}\$?$")]


class _Table(BaseModel):
    # arbitrary: the rules and ranges above are plain tuples that their validators have made
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class GatewayConfig(_Table):
    """One gateway node. An address may be a list of one IPv4 and one IPv6 address; IPv4 comes first.

    Attributes:
        name: Its name in offers and messages.
        kind: How it is reached; `local` is this machine, `ssh` another one.
        wan_bind: Address at which PROD relays accept from the other facility.
        wan_advertise: The same as the other facility sees it; by default `wan_bind`.
        wan_source: Local address from which CONS relays dial; by default `wan_bind`, for each IP version.
        lan_bind: Address at which CONS relays accept applications.
        lan_advertise: The same as applications see it; by default `lan_bind`.
        lan_source: Local address from which PROD relays connect to targets; by default the kernel chooses.
        port_range: Ports for listeners.
        capacity_mbits_per_s: What reservations may add up to per direction; 0 is not counted.
        connection_budget: What the concurrent connections of its streams may add up to, each counted as num_conn times
            max_connections; 0 is not counted.
        pipe_budget_mib: Pipe memory of the user who runs the relays (fs.pipe-user-pages-soft): beyond it connections
            copy, so that other gateways are preferred. 0 is not counted.
        host: `ssh`: its host name, or its alias in `~/.ssh/config`.
        port: `ssh`: before `~/.ssh/config`; else 22.
        user: `ssh`: before `~/.ssh/config`; else that of this process.
        identity_file: `ssh`: a private key here. Without it those of `~/.ssh/config`, the agent, and `~/.ssh/id_*`.
        known_hosts: `ssh`: a file of host keys here, in addition to those of the user and the system.
        directory: `ssh`: the directory there for the relay's binary and its sockets and logs; by default
            `$XDG_CACHE_HOME/scistream`, else `~/.cache/scistream`.
        s2ds: `ssh`: a relay binary installed there; by default the one here is copied.
        connect_timeout_s: `ssh`: for connecting, attempts and jumps included.
    """

    name: Name
    kind: Literal["local", "ssh"] = "local"
    wan_bind: IPs
    wan_advertise: IPs = ()
    wan_source: IPs = ()
    lan_bind: IPs
    lan_advertise: IPs = ()
    lan_source: IPs = ()
    port_range: Ports = PortRange(0, 0)
    capacity_mbits_per_s: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    connection_budget: Annotated[int, Field(ge=0, le=100_000_000)] = 0
    pipe_budget_mib: Annotated[int, Field(ge=0, le=1_000_000)] = 64
    host: Annotated[str, Field(pattern=r"^[^\s@/-][^\s@/]*$")] | None = None
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    user: Annotated[str, Field(pattern=r"^[^\s@:/-][^\s@:/]*$")] | None = None
    identity_file: OwnPath | None = None
    known_hosts: OwnPath | None = None
    directory: OwnPath | None = None
    s2ds: AbsolutePath | None = None
    connect_timeout_s: Annotated[int, Field(ge=1, le=120)] | None = None

    @model_validator(mode="after")
    def _says_where_it_is(self) -> GatewayConfig:
        for leg in ("wan", "lan"):
            bound, advertised = getattr(self, f"{leg}_bind"), getattr(self, f"{leg}_advertise")
            unsaid = [one for one in _seen_from_outside(bound, advertised) if _anywhere(one)]
            if unsaid:
                raise ValueError(
                    f"{leg}_advertise: needed, because {leg}_bind takes every address ({unsaid[0]})"
                )
        return self

    @model_validator(mode="after")
    def _says_how_it_is_reached(self) -> GatewayConfig:
        if self.kind == "ssh" and self.host is None:
            raise ValueError('host: needed, because kind is "ssh"')
        given = next((key for key in _SSH_KEYS if getattr(self, key) is not None), None)
        if self.kind != "ssh" and given:
            raise ValueError(f'{given}: only for kind = "ssh", but kind is "{self.kind}"')
        return self

    def listen_addresses(self, role: Role) -> tuple[str, ...]:
        """The IPs that a relay of `role` binds: one, or IPv4 and IPv6."""
        return self.wan_bind if role == "PROD" else self.lan_bind

    def advertised_addresses(self, role: Role, bound: str) -> tuple[str, ...]:
        """The IPs at which what a relay of `role` has bound to `bound` is reached."""
        advertised = self.wan_advertise if role == "PROD" else self.lan_advertise
        if len(self.listen_addresses(role)) == 1:
            return advertised or (bound,)
        return tuple(_by_version([bound], [one for one in advertised if _version(one) == _version(bound)]))

    def onward_sources(self, role: Role) -> tuple[str, ...]:
        """The local IPs from which a relay of `role` connects onwards, at most one of each IP version.

        For a version that is not among them the kernel chooses.
        """
        if role == "PROD":
            return self.lan_source
        return tuple(_by_version([one for one in self.wan_bind if not _anywhere(one)], self.wan_source))

    def dial_addresses(self) -> list[str]:
        """The networks from which the other facility sees this gateway come, behind a translation or not."""
        addresses = [*self.wan_source, *_seen_from_outside(self.wan_bind, self.wan_advertise)]
        return list(dict.fromkeys(str(ipaddress.ip_network(one)) for one in addresses))

    def wan_versions(self) -> set[int]:
        """The IP versions, 4 and 6, in which this gateway can speak to the other facility."""
        return {_version(one) for one in (*self.wan_bind, *self.wan_source)}

    def own_addresses(self) -> set[IPAddress]:
        """Every address by which this gateway itself could be meant."""
        texts = (
            *self.wan_bind,
            *self.wan_advertise,
            *self.wan_source,
            *self.lan_bind,
            *self.lan_advertise,
            *self.lan_source,
        )
        return {ipaddress.ip_address(text) for text in texts if not _anywhere(text)}


_SSH_KEYS = (
    "host",
    "port",
    "user",
    "identity_file",
    "known_hosts",
    "directory",
    "s2ds",
    "connect_timeout_s",
)


def _anywhere(text: str) -> bool:
    return ipaddress.ip_address(text).is_unspecified


def _version(text: str) -> int:
    return ipaddress.ip_address(text).version


def _by_version(*preferred_last: Iterable[str]) -> list[str]:
    """One address of each IP version, IPv4 first; of two of a version the later."""
    found = {_version(one): one for addresses in preferred_last for one in addresses}
    return [found[version] for version in sorted(found)]


def _seen_from_outside(bound: Sequence[str], advertised: Sequence[str]) -> list[str]:
    return _by_version(bound, advertised) if len(bound) > 1 else list(advertised or bound)


class Quota(_Table):
    """Limits for some callers, in place of those of the policy. What is left out stays as it is there.

    Attributes:
        users: Whom it is for: a caller who has one of these URNs.
    """

    users: Annotated[list[URN], Field(min_length=1)]
    modes: Annotated[list[Mode], Field(min_length=1)] | None = None
    longest_lease_s: Annotated[int, Field(ge=1, le=30 * DAY_S)] | None = None
    longest_lifetime_s: Annotated[int, Field(ge=1, le=366 * DAY_S)] | None = None
    longest_hello_timeout_s: Annotated[int, Field(ge=1, le=30 * DAY_S)] | None = None
    max_streams_per_owner: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    max_reserved_mbits_per_s_per_owner: RateMbits | None = None
    max_num_conn: Annotated[int, Field(ge=1, le=256)] | None = None
    max_connections: Annotated[int, Field(ge=1, le=65_536)] | None = None
    max_requests_per_min_per_caller: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    request_burst_per_caller: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class Policy(_Table):
    """What the facility allows. A list left out allows nothing.

    Attributes:
        users: Who may open streams: URNs of identities, groups and Unix accounts, or "all_authenticated_users". Left
            out: the Unix user that runs the service, and nobody else.
        administrators: URNs that may see and end the streams of everybody.
        targets: Where PROD may connect.
        peers: Where CONS may dial; in mode `none` also where PROD's peers may come from.
        consumers: Which sources may be allowed at LAN listeners.
        modes: Allowed protection on the WAN.
        longest_lease_s: Seconds.
        longest_lifetime_s: Seconds.
        longest_hello_timeout_s: Seconds.
        max_streams_per_owner: Open sides per owner at this facility.
        max_reserved_mbits_per_s_per_owner: What the reservations of an owner may add up to, Mbit/s; 0 is no limit.
        max_num_conn: Listeners per stream.
        max_connections: Concurrent connections per listener.
        max_requests_per_min_per_caller: How often a caller may ask the service, linked identities together, per minute;
            0 is no limit.
        request_burst_per_caller: How many requests of a caller may come at once.
        quota: Limits of their own for some callers; the first that names one of a caller's URNs counts.
    """

    users: list[User] | None = None
    administrators: list[URN] = []
    targets: Rules = []
    peers: Rules = []
    consumers: Rules = []
    modes: Annotated[list[Mode], Field(min_length=1)] = ["tls", "auth"]
    longest_lease_s: Annotated[int, Field(ge=1, le=30 * DAY_S)] = 3600
    longest_lifetime_s: Annotated[int, Field(ge=1, le=366 * DAY_S)] = 7 * DAY_S
    longest_hello_timeout_s: Annotated[int, Field(ge=1, le=30 * DAY_S)] = DAY_S
    max_streams_per_owner: Annotated[int, Field(ge=0, le=1_000_000)] = 100
    max_reserved_mbits_per_s_per_owner: RateMbits = 0
    max_num_conn: Annotated[int, Field(ge=1, le=256)] = 64
    max_connections: Annotated[int, Field(ge=1, le=65_536)] = 256
    max_requests_per_min_per_caller: Annotated[int, Field(ge=0, le=1_000_000)] = 3000
    request_burst_per_caller: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    quota: list[Quota] = []

    @model_validator(mode="after")
    def _consumers_are_networks(self) -> Policy:
        if any((rule.first_port, rule.last_port) != (0, 65_535) for rule in self.consumers):
            raise ValueError("consumers: networks only, a source has no fixed port")
        return self

    def of(self, caller: Iterable[str]) -> Policy:
        """The policy for a caller with these URNs: with the limits of the first quota that names one of them."""
        urns = set(caller)
        quota = next((one for one in self.quota if not urns.isdisjoint(one.users)), None)
        if quota is None:
            return self
        return self.model_copy(
            update={name: value for name, value in quota if name != "users" and value is not None}
        )


class GlobusConfig(_Table):
    """The client of this facility at Globus Auth. Without this table, the facility is in development mode.

    Attributes:
        client_id: The client, a UUID.
        client_secret_file: A file with its secret that only its owner may read; not needed where the environment
            has SCISTREAM_GLOBUS_CLIENT_SECRET.
        scope: What a token must have; by default the scope `action_all` of the client.
        visible_to: Who may read the description of the actions.
        runnable_by: Who may run the actions; by default those who may open streams.
        administered_by: Who may see and end the actions of everybody; by default the policy's administrators.
    """

    client_id: Annotated[str, AfterValidator(_uuid)]
    client_secret_file: OwnPath | None = None
    scope: Annotated[str, Field(pattern=r"^[!#-\[\]-~]{1,512}$")] | None = None
    visible_to: Annotated[list[Principal], Field(min_length=1)] = ["public"]
    runnable_by: list[Principal] | None = None
    administered_by: list[Principal] | None = None

    @model_validator(mode="after")
    def _nobody_unknown_runs_actions(self) -> GlobusConfig:
        if "public" in (self.runnable_by or []):
            raise ValueError('runnable_by: "public" is not possible, give "all_authenticated_users" or URNs')
        if {"public", "all_authenticated_users"} & {*(self.administered_by or [])}:
            raise ValueError("administered_by: URNs only")
        return self


class ServiceConfig(_Table):
    """Where the service of this facility, `s2cs`, is reached.

    Attributes:
        url: The address at which clients and jobs reach it.
        socket: A Unix socket at which it serves the accounts of this machine; the functions of Globus Compute then
            ask there instead of acting by themselves. Nobody but the service may write in its directory.
        accounts: From the name of a Unix account to the Globus identity that owns what the account opens at the
            socket. Any other account owns it itself.
        metrics_token_file: A file that only its owner may read, with a bearer token that opens `/metrics` and nothing
            else. Without it, only administrators read these.
    """

    url: Annotated[str, AfterValidator(_service_url)] | None = None
    socket: AbsolutePath | None = None
    accounts: dict[Account, IdentityURN] = {}
    metrics_token_file: OwnPath | None = None

    @model_validator(mode="after")
    def _accounts_come_by_the_socket(self) -> ServiceConfig:
        if self.accounts and self.socket is None:
            raise ValueError("accounts: only with socket, where accounts are known")
        return self


class _FacilityTable(_Table):
    name: Name
    data_server: DataServer = "s2ds"


class _File(_Table):
    facility: _FacilityTable
    gateway: Annotated[list[GatewayConfig], Field(min_length=1)]
    policy: Policy = Policy()
    service: ServiceConfig = ServiceConfig()
    globus: GlobusConfig | None = None

    @model_validator(mode="after")
    def _names_are_distinct(self) -> _File:
        names = [gateway.name for gateway in self.gateway]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"gateway: two gateways have the name {twice!r}")
        return self

    @model_validator(mode="after")
    def _haproxy_can_do_it(self) -> _File:
        if self.facility.data_server == "haproxy" and (why := _why_not_haproxy(self.gateway, self.policy)):
            raise ValueError(f"facility.data_server: {why}")
        return self


def _why_not_haproxy(gateways: Iterable[GatewayConfig], policy: Policy) -> str:
    """Why HAProxy cannot, or may not, carry the data of a facility; empty when it can."""
    if "none" not in policy.modes:
        return 'HAProxy protects nothing: it takes "none" among policy.modes'
    elsewhere = next((one.name for one in gateways if one.kind != "local"), None)
    return f'HAProxy is run on this machine only, gateway {elsewhere!r} is kind "ssh"' if elsewhere else ""


class FacilityConfig(_Table):
    """One facility, as read; `file` is None for a development facility.

    `data_server` is what carries the data of all its streams.
    """

    name: Name
    gateways: tuple[GatewayConfig, ...]
    policy: Policy
    service: ServiceConfig = ServiceConfig()
    globus: GlobusConfig | None = None
    state_dir: Path
    file: Path | None = None
    data_server: DataServer = "s2ds"

    def carried_by(self, data_server: DataServer) -> FacilityConfig:
        """The same facility with another data server.

        Raises:
            ConfigError: It cannot, or may not, carry its data.
        """
        why = _why_not_haproxy(self.gateways, self.policy) if data_server == "haproxy" else ""
        if why:
            raise ConfigError(
                f"facility {self.name}: {why}",
                which=self.name,
                file=str(self.file or "the development facility"),
                key="facility.data_server",
            )
        return self.model_copy(update={"data_server": data_server})


LOOPBACK: tuple[Network, ...] = ("127.0.0.0/8", "::1/128")


def load_facility(
    name: str,
    *,
    file: str | Path | None = None,
    state_dir: str | Path | None = None,
    port_range: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> FacilityConfig:
    """The configuration of the facility `name`.

    Args:
        name: Its name.
        file: Its file. By default `NAME.toml`, or the `facility.toml` that names it, in `$SCISTREAM_CONFIG_DIR`, else
            in `$XDG_CONFIG_HOME/scistream` and `/etc/scistream`. Without any: a development facility.
        state_dir: Where it keeps its state. By default `$SCISTREAM_STATE_DIR/NAME`, else `/var/lib/scistream/NAME`
            where that can be written, else `$XDG_STATE_HOME/scistream/NAME`.
        port_range: For every gateway, before `$SCISTREAM_PORT_RANGE`.
        environment: By default that of the process. `SCISTREAM_POLICY_KEY` sets one key of the policy, as TOML.

    Raises:
        ConfigError: With file, key and what is allowed.
    """
    environment = os.environ if environment is None else environment
    if not re.fullmatch(UID_PATTERN, name) or name.endswith("\n"):
        raise ConfigError(
            f"{name!r} cannot be the name of a facility",
            which=name,
            key="facility.name",
            hint="Use letters, digits, '_', '-' and '.', 64 at most, the first a letter or digit",
        )
    path = Path(file) if file is not None else _find_file(name, environment)
    tables = read_toml(path) if path is not None else _development(name)
    where = str(path) if path is not None else "the development facility"
    sources = _override(tables, port_range, environment)
    parsed = _parse(tables, where, sources)
    if parsed.facility.name != name:
        raise ConfigError(
            f"{where}: facility.name is {parsed.facility.name!r}, not {name!r}",
            which=name,
            file=where,
            key="facility.name",
            hint="Name the facility as its file does, or give another file",
        )
    return FacilityConfig(
        name=name,
        gateways=tuple(parsed.gateway),
        policy=parsed.policy,
        service=parsed.service,
        globus=parsed.globus,
        state_dir=Path(state_dir) if state_dir is not None else _state_base(environment) / name,
        file=path,
        data_server=parsed.facility.data_server,
    )


def _development(name: str) -> dict[str, Any]:
    loopback = ["127.0.0.0/8", "[::1/128]"]
    return {
        "facility": {"name": name},
        "gateway": [{"name": "local", "wan_bind": "127.0.0.1", "lan_bind": "127.0.0.1"}],
        "policy": {
            "users": [EVERYBODY],
            "targets": loopback,
            "peers": list(loopback),
            "consumers": list(loopback),
            "modes": ["tls", "auth", "none"],
        },
    }


def config_folders(environment: Mapping[str, str]) -> list[Path]:
    """Where configuration files are looked for, the first that has one wins."""
    if environment.get("SCISTREAM_CONFIG_DIR"):
        return [Path(environment["SCISTREAM_CONFIG_DIR"])]
    return [_home(environment, "XDG_CONFIG_HOME", ".config") / "scistream", SYSTEM_CONFIG]


def _find_file(name: str, environment: Mapping[str, str]) -> Path | None:
    for folder in config_folders(environment):
        if _is_file(folder / f"{name}.toml"):
            return folder / f"{name}.toml"
        shared = folder / "facility.toml"
        if _is_file(shared):
            facility = read_toml(shared).get("facility")
            if isinstance(facility, dict) and facility.get("name") == name:
                return shared
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as wrong:
        raise ConfigError(
            f"{path}: {wrong.strerror}",
            which=str(path),
            file=str(path),
            hint="Let this user look into that folder, or name another with SCISTREAM_CONFIG_DIR",
        ) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file.

    Raises:
        ConfigError: It cannot be read, or is not TOML.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as wrong:
        raise ConfigError(f"{path}: {wrong.strerror}", which=str(path), file=str(path)) from None
    except (ValueError, RecursionError) as wrong:  # the second: brackets in brackets in brackets
        raise ConfigError(f"{path} is not TOML: {wrong}", which=str(path), file=str(path)) from None
    return tables


def _override(
    tables: dict[str, Any], port_range: str | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """Lay environment and arguments over the tables; answers which key came from where, for the messages."""
    sources: dict[str, str] = {}
    ports = port_range or environment.get("SCISTREAM_PORT_RANGE")
    if ports is not None and isinstance(tables.get("gateway"), list):
        for index, gateway in enumerate(tables["gateway"]):
            if isinstance(gateway, dict):
                gateway["port_range"] = ports
                sources[f"gateway.{index}.port_range"] = (
                    "argument port_range" if port_range else "SCISTREAM_PORT_RANGE"
                )
    for variable, text in sorted(environment.items()):
        if variable.startswith("SCISTREAM_POLICY_"):
            key = variable.removeprefix("SCISTREAM_POLICY_").lower()
            try:
                value: object = tomllib.loads(f"value = {text}")["value"]
            except (ValueError, RecursionError):
                value = text
            policy = tables.setdefault("policy", {})
            if isinstance(policy, dict):  # any other is complained of below
                policy[key] = value
            sources[f"policy.{key}"] = variable
    return sources


def _parse(tables: dict[str, Any], where: str, sources: Mapping[str, str]) -> _File:
    try:
        return _File.model_validate(tables)
    except ValidationError as wrong:
        mistakes = [_in_words(key, words, where, sources) for key, words in complaints(wrong)]
        key = next(iter(complaints(wrong)))[0]
        raise ConfigError(
            "; ".join(mistakes),
            which=where,
            file=next((variable for prefix, variable in sources.items() if key.startswith(prefix)), where),
            key=key,
        ) from None


def _in_words(key: str, words: str, where: str, sources: Mapping[str, str]) -> str:
    source = next((variable for prefix, variable in sources.items() if key.startswith(prefix)), where)
    if words == "Extra inputs are not permitted" and re.fullmatch(r"gateway\.\d+\.pass(word|phrase)", key):
        words = "passwords and passphrases are not supported; use a key, the agent or ~/.ssh/config"
    elif words == "Extra inputs are not permitted":
        words = f"there is no such key; {_allowed_beside(key)}"
    return f"{source}: {key}: {words}"


def _allowed_beside(key: str) -> str:
    tables: dict[str, type[BaseModel]] = {
        "gateway": GatewayConfig,
        "policy": Policy,
        "policy.quota": Quota,
        "facility": _FacilityTable,
        "service": ServiceConfig,
        "globus": GlobusConfig,
    }
    table = ".".join(part for part in key.split(".")[:-1] if not part.isdigit())
    return "allowed are " + ", ".join(tables.get(table, _File).model_fields)


def _state_base(environment: Mapping[str, str]) -> Path:
    if environment.get("SCISTREAM_STATE_DIR"):
        return Path(environment["SCISTREAM_STATE_DIR"])
    if os.geteuid() == 0 or os.access(SYSTEM_STATE, os.W_OK):
        return SYSTEM_STATE
    return _home(environment, "XDG_STATE_HOME", ".local/state") / "scistream"


def _home(environment: Mapping[str, str], variable: str, below_home: str) -> Path:
    folder = environment.get(variable, "")
    return (
        Path(folder) if folder.startswith("/") else Path(environment.get("HOME") or Path.home()) / below_home
    )
