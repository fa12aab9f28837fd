"""What a facility is: its gateways, its policy, the place of its state.

`facility.toml` < `SCISTREAM_*` environment < argument. Without a file, any name is a development facility: one
gateway, loopback only, ports chosen by the kernel, with a state directory of its own.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

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
from scistream_flows.models import DAY_S, UID_PATTERN, IPAddress, Mode, Network, Role, complaints, ip_of

# by name: the one for Python 3.10 is not there for a type checker that runs on a later one
tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

SYSTEM_STATE = Path("/var/lib/scistream")
SYSTEM_CONFIG = Path("/etc/scistream")


def _port_range(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError('give a text such as "5100-5200", or "0" to let the kernel choose')
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", value)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not (first == last == 0 or 1 <= first <= last <= 65_535):
        raise ValueError(f'{value!r} is not a range such as "5100-5200" within 1 to 65535, nor "0"')
    return PortRange(first, last)


def _ip(value: str) -> str:
    address = ip_of(value)
    if address is None:
        raise ValueError(f"{value!r} is not a numeric IP address")
    return str(address)


def _own_path(value: str) -> str:
    if not value.startswith(("/", "~/")) or not value.isprintable():
        raise ValueError(f'{value!r} is neither an absolute path nor one that begins with "~/"')
    return value


def _absolute_path(value: str) -> str:
    if not value.startswith("/") or not value.isprintable():
        raise ValueError(f"{value!r} is not an absolute path")
    return value


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


IP: TypeAlias = Annotated[str, AfterValidator(_ip)]
Ports: TypeAlias = Annotated[PortRange, BeforeValidator(_port_range)]
Rules: TypeAlias = list[Annotated[AllowRule, BeforeValidator(_allow_rule)]]
OwnPath: TypeAlias = Annotated[str, AfterValidator(_own_path)]
AbsolutePath: TypeAlias = Annotated[str, AfterValidator(_absolute_path)]
Name: TypeAlias = Annotated[str, Field(pattern=UID_PATTERN)]


class _Table(BaseModel):
    # arbitrary: the rules and ranges above are plain tuples that their validators have made
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class GatewayConfig(_Table):
    """One gateway node.

    Attributes:
        name: Its name in offers and messages.
        kind: How it is reached; `local` is this machine, `ssh` another one.
        wan_bind: Address at which PROD relays accept from the other facility.
        wan_advertise: The same as the other facility sees it; by default `wan_bind`.
        wan_source: Local address from which CONS relays dial; by default `wan_bind`.
        lan_bind: Address at which CONS relays accept applications.
        lan_advertise: The same as applications see it; by default `lan_bind`.
        lan_source: Local address from which PROD relays connect to targets; by default the kernel chooses.
        port_range: Ports for listeners.
        capacity_mbits_per_s: What reservations may add up to per direction; 0 is not counted.
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
    wan_bind: IP
    wan_advertise: IP | None = None
    wan_source: IP | None = None
    lan_bind: IP
    lan_advertise: IP | None = None
    lan_source: IP | None = None
    port_range: Ports = PortRange(0, 0)
    capacity_mbits_per_s: Annotated[int, Field(ge=0, le=10_000_000)] = 0
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
            if _anywhere(getattr(self, f"{leg}_bind")) and getattr(self, f"{leg}_advertise") is None:
                raise ValueError(f"{leg}_advertise: needed, because {leg}_bind takes every address")
        return self

    @model_validator(mode="after")
    def _says_how_it_is_reached(self) -> GatewayConfig:
        if self.kind == "ssh" and self.host is None:
            raise ValueError('host: needed, because kind is "ssh"')
        given = next((key for key in _SSH_KEYS if getattr(self, key) is not None), None)
        if self.kind != "ssh" and given:
            raise ValueError(f'{given}: only for kind = "ssh", but kind is "{self.kind}"')
        return self

    def listen_address(self, role: Role) -> str:
        """The IP that a relay of `role` binds."""
        return self.wan_bind if role == "PROD" else self.lan_bind

    def advertised_address(self, role: Role) -> str:
        """The IP at which a relay of `role` is reached."""
        if role == "PROD":
            return self.wan_advertise or self.wan_bind
        return self.lan_advertise or self.lan_bind

    def onward_source(self, role: Role) -> str | None:
        """The local IP from which a relay of `role` connects onwards; None leaves it to the kernel."""
        if role == "PROD":
            return self.lan_source
        return self.wan_source or (None if _anywhere(self.wan_bind) else self.wan_bind)

    def dial_addresses(self) -> list[str]:
        """The networks from which the other facility sees this gateway come, behind a translation or not."""
        addresses = [self.wan_source, self.wan_advertise or self.wan_bind]
        return list(dict.fromkeys(str(ipaddress.ip_network(one)) for one in addresses if one))

    def own_addresses(self) -> set[IPAddress]:
        """Every address by which this gateway itself could be meant."""
        texts = [
            self.wan_bind,
            self.wan_advertise,
            self.wan_source,
            self.lan_bind,
            self.lan_advertise,
            self.lan_source,
        ]
        return {ipaddress.ip_address(text) for text in texts if text and not _anywhere(text)}


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


class Policy(_Table):
    """What the facility allows. A list left out allows nothing.

    Attributes:
        targets: Where PROD may connect.
        peers: Where CONS may dial; in mode `none` also where PROD's peers may come from.
        consumers: Which sources may be allowed at LAN listeners.
        modes: Allowed protection on the WAN.
        longest_lease_s: Seconds.
        longest_lifetime_s: Seconds.
        longest_hello_timeout_s: Seconds.
        max_streams_per_owner: Open sides per owner at this facility.
        max_num_conn: Listeners per stream.
        max_connections: Concurrent connections per listener.
    """

    targets: Rules = []
    peers: Rules = []
    consumers: Rules = []
    modes: Annotated[list[Mode], Field(min_length=1)] = ["tls", "auth"]
    longest_lease_s: Annotated[int, Field(ge=1, le=30 * DAY_S)] = 3600
    longest_lifetime_s: Annotated[int, Field(ge=1, le=366 * DAY_S)] = 7 * DAY_S
    longest_hello_timeout_s: Annotated[int, Field(ge=1, le=30 * DAY_S)] = DAY_S
    max_streams_per_owner: Annotated[int, Field(ge=0, le=1_000_000)] = 100
    max_num_conn: Annotated[int, Field(ge=1, le=256)] = 64
    max_connections: Annotated[int, Field(ge=1, le=65_536)] = 256

    @model_validator(mode="after")
    def _consumers_are_networks(self) -> Policy:
        if any((rule.first_port, rule.last_port) != (0, 65_535) for rule in self.consumers):
            raise ValueError("consumers: networks only, a source has no fixed port")
        return self


class _FacilityTable(_Table):
    name: Name


class _File(_Table):
    facility: _FacilityTable
    gateway: Annotated[list[GatewayConfig], Field(min_length=1)]
    policy: Policy = Policy()

    @model_validator(mode="after")
    def _names_are_distinct(self) -> _File:
        names = [gateway.name for gateway in self.gateway]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"gateway: two gateways have the name {twice!r}")
        return self


class FacilityConfig(_Table):
    """One facility, as read; `file` is None for a development facility."""

    name: Name
    gateways: tuple[GatewayConfig, ...]
    policy: Policy
    state_dir: Path
    file: Path | None = None


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
    tables = _read_toml(path) if path is not None else _development(name)
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
        state_dir=Path(state_dir) if state_dir is not None else _state_base(environment) / name,
        file=path,
    )


def _development(name: str) -> dict[str, Any]:
    loopback = ["127.0.0.0/8", "[::1/128]"]
    return {
        "facility": {"name": name},
        "gateway": [{"name": "local", "wan_bind": "127.0.0.1", "lan_bind": "127.0.0.1"}],
        "policy": {
            "targets": loopback,
            "peers": list(loopback),
            "consumers": list(loopback),
            "modes": ["tls", "auth", "none"],
        },
    }


def _find_file(name: str, environment: Mapping[str, str]) -> Path | None:
    if environment.get("SCISTREAM_CONFIG_DIR"):
        folders = [Path(environment["SCISTREAM_CONFIG_DIR"])]
    else:
        folders = [_home(environment, "XDG_CONFIG_HOME", ".config") / "scistream", SYSTEM_CONFIG]
    for folder in folders:
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
        shared = folder / "facility.toml"
        if shared.is_file():
            facility = _read_toml(shared).get("facility")
            if isinstance(facility, dict) and facility.get("name") == name:
                return shared
    return None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as wrong:
        raise ConfigError(f"{path}: {wrong.strerror}", which=str(path), file=str(path)) from None
    except ValueError as wrong:
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
            except ValueError:
                value = text
            tables.setdefault("policy", {})[key] = value
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
        "facility": _FacilityTable,
    }
    table, separator, _ = key.partition(".")
    model = tables.get(table, _File) if separator else _File
    return "allowed are " + ", ".join(model.model_fields)


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
