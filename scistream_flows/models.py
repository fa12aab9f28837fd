"""The documents that cross a boundary: between client and facility, and between facility and relay.

Requests forbid unknown fields, so that a typing error is an error; readers of answers ignore them, so that a newer
facility can say more. Every document carries `protocol`. Leases travel as seconds remaining, never as clock time.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from scistream_flows.errors import PROTOCOL, BadRequest, ProtocolMismatch, ScistreamError

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

UID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
URN_PATTERN = r"^urn:[!-~]{1,250}$"
DAY_S = 86_400
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*\.?")

Role: TypeAlias = Literal["PROD", "CONS"]
Mode: TypeAlias = Literal["tls", "auth", "none"]
DataServer: TypeAlias = Literal["s2ds", "haproxy"]
State: TypeAlias = Literal[
    "REQUESTED", "WAITING_HELLO", "LISTENING", "READY", "STREAMING", "DRAINING", "ENDED", "FAILED"
]
Reason: TypeAlias = Literal[
    "finished",
    "released",
    "lease_expired",
    "lifetime_reached",
    "hello_timeout",
    "aborted_by_producer",
    "aborted_by_consumer",
    "target_unreachable",
    "peer_rejected",
    "relay_lost",
    "admin",
]


# --- addresses


def split_address(text: str) -> tuple[str, int]:
    """Split `host:port` or `[IPv6]:port` into host and port.

    Raises:
        ValueError: When it is neither, or the port is not within 1 to 65535.
    """
    host, separator, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif not separator or ":" in host or not host:
        raise ValueError(f"{text!r} is not HOST:PORT (an IPv6 address needs brackets: [2001:db8::1]:5000)")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65_535:
        raise ValueError(f"the port of {text!r} is not within 1 to 65535")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ip_of(host: str) -> IPAddress | None:
    """The address that `host` spells, with an IPv4 address mapped into IPv6 unwrapped; None for a name.

    One with a zone (`%eth0`) is none: it means something on one machine only, and is equal to no address without.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return None if address.scope_id else address.ipv4_mapped or address
    return address


def _target(text: str) -> str:
    host, port = split_address(text)
    address = ip_of(host)
    if address is None and (not _HOST.fullmatch(host) or re.fullmatch(r"[0-9.]+", host)):
        raise ValueError(f"{host!r} is neither an IP address nor a host name")
    return join_address(host.lower() if address is None else str(address), port)


def _socket_address(text: str) -> str:
    host, port = split_address(text)
    address = ip_of(host)
    if address is None:
        raise ValueError(f"{host!r} is not a numeric IP address")
    return join_address(str(address), port)


def _network(text: str) -> str:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        network = None
    if network is None or "%" in text:
        raise ValueError(f"{text!r} is not an IP address or a network such as 192.0.2.0/24")
    return str(network)


def plain_urn(urn: str) -> str:
    """A URN of Globus as Globus writes it: its UUIDs are lower-case, however a person spelt them."""
    return urn.lower() if urn.lower().startswith("urn:globus:") else urn


def _in_order(values: list[str]) -> list[str]:
    return sorted(set(values))


Uid: TypeAlias = Annotated[str, StringConstraints(pattern=UID_PATTERN)]
Urn: TypeAlias = Annotated[str, StringConstraints(pattern=URN_PATTERN), AfterValidator(plain_urn)]
RelayId: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
PublicKey: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{43}$")]
Target: TypeAlias = Annotated[str, AfterValidator(_target)]
SocketAddress: TypeAlias = Annotated[str, AfterValidator(_socket_address)]
Network: TypeAlias = Annotated[str, AfterValidator(_network)]
Urns: TypeAlias = Annotated[list[Urn], Field(max_length=256), AfterValidator(_in_order)]
Targets: TypeAlias = Annotated[list[Target], Field(max_length=256)]
Networks: TypeAlias = Annotated[list[Network], Field(max_length=1024)]
LeaseS: TypeAlias = Annotated[int, Field(ge=1, le=30 * DAY_S)]
TicketText: TypeAlias = Annotated[str, StringConstraints(pattern=r"^sst_[A-Za-z0-9_-]{43}$")]
RateMbits: TypeAlias = Annotated[int, Field(ge=0, le=10_000_000)]


class _Asked(BaseModel):
    """A document that asks for something: exact, and unchangeable once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    protocol: Literal[1] = PROTOCOL


class _Part(BaseModel):
    """A piece of an answer. No figure in it is infinite, or none at all: JSON has no word for these."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Answered(_Part):
    """An answer: what is not known is ignored."""

    protocol: Literal[1] = PROTOCOL


# --- what a facility answers


class Listener(_Part):
    """An address at which a relay accepts; `index` is the stream's listener number, 0 to 255.

    `also` has the same listener's address of the other IP version, where the gateway has both: `address` is IPv4 then.
    """

    index: Annotated[int, Field(ge=0, le=255)]
    address: SocketAddress
    also: Annotated[list[SocketAddress], Field(max_length=1)] = []


class OfferedRelay(_Part):
    """One relay of an offer: where it accepts, the key that proves it, and the addresses it dials from.

    `data_server` is what carries the bytes, None where that is not said. A HAProxy has no key: what stands for it
    proves nothing.
    """

    relay_id: RelayId
    gateway: str
    public_key: PublicKey
    dial_addresses: Networks = []
    listeners: Annotated[list[Listener], Field(min_length=1, max_length=256)]
    data_server: DataServer | None = None


class Offer(_Answered):
    """What `request` and `hello` answer. It holds no secret: keys in it are public."""

    uid: Uid
    role: Role
    mode: Mode
    dial: Literal["cons", "prod"] = "cons"
    lease_remaining_s: Annotated[float, Field(ge=0)]
    relays: Annotated[list[OfferedRelay], Field(min_length=1, max_length=256)]

    @property
    def addresses(self) -> list[str]:
        """The address of each listener of all relays, as IP and port, in the order of their index."""
        listeners = [listener for relay in self.relays for listener in relay.listeners]
        return [listener.address for listener in sorted(listeners, key=lambda one: one.index)]


class Ticket(_Answered):
    """A ticket, which is a secret: whoever has it may say hello, once, within its networks.

    `url` is where, None when the facility does not know under which address it is reached.
    """

    ticket: TicketText = Field(repr=False)
    facility: str
    uid: Uid
    role: Role
    networks: Networks
    expires_s: Annotated[int, Field(ge=1)]
    url: str | None = None


# --- what a client asks


class Peer(_Asked):
    """A CONS relay that PROD admits: its key, and the addresses it may come from (empty: any that proves the key)."""

    public_key: PublicKey
    source_addresses: Networks = []


class Request(_Asked):
    """Open one side of a stream.

    Attributes:
        uid: The stream's name, the same on both sides.
        role: `PROD` beside the application that listens, `CONS` beside the one that connects.
        num_conn: Listeners on this side, 1 to 256.
        gateways: How many gateways carry them, 1 to 16: listener i is on the (i mod gateways)-th, each with a relay of
            its own.
        rate_mbits_per_s: Payload Mbit/s per direction; 0 is best effort.
        reserve_rate: Whether the gateway's capacity is reserved for the rate, or the rate is a cap only.
        mode: Protection on the WAN: `tls`, `auth` (proven peers, clear text) or `none`.
        dial: Which side dials on the WAN; `cons` today.
        lease_s: The relay ends when nothing renewed it for so many seconds.
        lifetime_s: The hard end, seconds.
        hello_timeout_s: Seconds until the stream must be ready.
        targets: PROD: where listener i leads, target i mod m. Empty: `hello` says it later.
        consumers: CONS: networks allowed at the LAN listeners. Empty: loopback only, until `hello` adds some.
        offer: CONS: what PROD's facility answered.
        until: `closed` ends after the last connection, `released` by release or lease only.
        linger_s: With `closed`: seconds without a connection after which the stream has finished.
        probe: Whether READY is proven to the `target` or on the `path` only.
        max_connections: Concurrent connections per listener.
        managers: URNs that have the owner's rights on this stream.
        monitors: URNs that may see its status.
    """

    uid: Uid
    role: Role
    num_conn: Annotated[int, Field(ge=1, le=256)] = 1
    gateways: Annotated[int, Field(ge=1, le=16)] = 1
    rate_mbits_per_s: RateMbits = 0
    reserve_rate: bool = True
    mode: Mode = "tls"
    dial: Literal["cons", "prod"] = "cons"
    lease_s: LeaseS = 60
    lifetime_s: Annotated[int, Field(ge=1, le=366 * DAY_S)] = DAY_S
    hello_timeout_s: Annotated[int, Field(ge=1, le=30 * DAY_S)] = 180
    targets: Targets = []
    consumers: Networks = []
    offer: Offer | None = None
    until: Literal["closed", "released"] = "closed"
    linger_s: Annotated[int, Field(ge=0, le=3600)] = 5
    probe: Literal["target", "path"] = "target"
    max_connections: Annotated[int, Field(ge=1, le=65_536)] = 64
    managers: Urns = []
    monitors: Urns = []

    @model_validator(mode="after")
    def _fits_its_role(self) -> Request:
        if self.gateways > self.num_conn:
            raise ValueError(f"gateways: {self.gateways} need as many listeners, num_conn is {self.num_conn}")
        if self.role == "PROD":
            _only("consumers", self.consumers, "CONS")
            _only("offer", self.offer, "CONS")
            return self
        _only("targets", self.targets, "PROD")
        if self.offer is None:
            raise ValueError("offer: a CONS request needs the offer that PROD's facility answered")
        for name, ours, theirs in (
            ("role", "PROD", self.offer.role),
            ("uid", self.uid, self.offer.uid),
            ("mode", self.mode, self.offer.mode),
            ("dial", self.dial, self.offer.dial),
        ):
            if ours != theirs:
                raise ValueError(f"offer.{name}: {theirs!r} does not fit, {ours!r} is needed")
        return self

    def differences(self, other: Request) -> list[str]:
        """The names of the fields in which two requests ask for different things."""
        return [name for name in type(self).model_fields if self._asks(name) != other._asks(name)]

    def _asks(self, name: str) -> Any:
        value = getattr(self, name)
        # the seconds remaining differ from one answer of PROD to the next: they are not part of what is asked
        return value.model_dump(exclude={"lease_remaining_s"}) if isinstance(value, Offer) else value


class _OfStream(_Asked):
    """A document about a stream that exists. `owner` tells apart streams of one name that several owners share."""

    uid: Uid
    role: Role
    owner: Urn | None = None


class Hello(_OfStream):
    """The application says where it is: PROD its `targets`, CONS the `consumers` that may connect."""

    targets: Targets = []
    consumers: Networks = []

    @model_validator(mode="after")
    def _fits_its_role(self) -> Hello:
        if self.role == "PROD":
            _only("consumers", self.consumers, "CONS")
            if not self.targets:
                raise ValueError("targets: hello at PROD names at least one target")
        else:
            _only("targets", self.targets, "PROD")
        return self


class TicketRequest(_OfStream):
    """Ask for a ticket: the right to say hello once, for an application that has no other proof of who it is.

    Attributes:
        networks: Where it may be used, and where what it names may be. Empty: the networks that the facility's policy
            has for consumers, or for targets.
        expires_s: Seconds for which it counts; by default an hour, or what the policy allows of it.
    """

    networks: Networks = []
    expires_s: Annotated[int, Field(ge=1, le=30 * DAY_S)] | None = None


class TicketHello(_Asked):
    """A hello by a ticket: at PROD with `targets`, at CONS from where the application will connect."""

    ticket: TicketText
    targets: Targets = []


class Update(_OfStream):
    """Change a running side. Each field given replaces the whole value; one left out stays."""

    peers: Annotated[list[Peer], Field(max_length=256)] | None = None
    targets: Annotated[list[Target], Field(min_length=1, max_length=256)] | None = None
    consumers: Networks | None = None
    rate_mbits_per_s: RateMbits | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Update:
        if self.role == "PROD":
            _only("consumers", self.consumers, "CONS")
        else:
            _only("peers", self.peers, "PROD")
            _only("targets", self.targets, "PROD")
        return self


class StatusQuery(_OfStream):
    """Ask for the status of one side. Reading does not renew the lease."""


class Renewal(_OfStream):
    """Renew the lease, by the seconds of the request or by `lease_s`."""

    lease_s: LeaseS | None = None


class Release(_OfStream):
    """End one side. Repeating it, or releasing what never was, is no error."""


class ListQuery(_Asked):
    """List the streams a caller may see; `all_owners` lists everybody's, for an administrator of the facility."""

    include_ended: bool = False
    all_owners: bool = False


def _only(name: str, value: object, role: str) -> None:
    if value:
        raise ValueError(f"{name}: only {role} has it")


# --- status


class Counts(_Part):
    """Bytes per direction, seen from the application's side of the stream."""

    to_consumer: int = 0
    to_producer: int = 0


class Rates(_Part):
    """Bit/s per direction."""

    to_consumer: float = 0.0
    to_producer: float = 0.0


class Connections(_Part):
    """Numbers of connections; `kept` are held open by the probe for the first data."""

    active: int = 0
    total: int = 0
    refused: int = 0
    aborted: int = 0
    kept: int = 0


class Limiting(_Part):
    """The leg with the largest share (0 to 1) of limited time.

    `producer`, `wan`, `consumer`, `consumer_lan`, `consumer_application`, `producer_lan`, `producer_application`, or
    `relay` when a relay's own processor is the limit; of a single relay also `upstream`.
    """

    direction: str | None = None
    leg: str | None = None
    share: float | None = None
    shares: dict[str, float] = {}


class Probe(_Part):
    """The outcome of the last probe."""

    result: str | None = None
    errno: str | None = None
    address: str | None = None
    age_s: float | None = None


class TcpLeg(_Part):
    """The kernel's TCP_INFO of one socket; times in seconds, sizes in bytes, rates in bit/s."""

    rtt_s: float | None = None
    rtt_var_s: float | None = None
    min_rtt_s: float | None = None
    retransmits: int | None = None
    lost: int | None = None
    cwnd_bytes: int | None = None
    mss_bytes: int | None = None
    delivery_bits_per_s: float | None = None
    pacing_bits_per_s: float | None = None
    busy_s: float | None = None
    limited_by_receiver_s: float | None = None
    limited_by_send_buffer_s: float | None = None
    limited_by_application_s: float | None = None
    notsent_bytes: int | None = None
    congestion_control: str | None = None


class Connection(_Part):
    """One connection through a relay.

    `path` says per direction how bytes move: splice, copy, ktls-splice, ktls-copy or tls-copy. `path_reason` is why,
    in mode tls.
    """

    connection: int
    listener: int
    source: str | None = None
    onward: str | None = None
    age_s: float | None = None
    first_byte_s: float | None = None
    path: dict[str, str | None] = {}
    path_reason: str | None = None
    pipe_bytes: int | None = None
    bytes: Counts = Counts()
    bits_per_s: Rates = Rates()
    legs: dict[str, TcpLeg | None] = {}


class RelayListener(Listener):
    """A listener with its counters."""

    active: int = 0
    accepted: int = 0
    refused: int = 0


class Resources(_Part):
    """What a relay uses."""

    descriptors: int | None = None
    pipes: int | None = None
    rss_bytes: int | None = None
    cpu_s: float | None = None


class Confinement(_Part):
    """What a relay has given up: `applied`, for Landlock also `partly`, or why it could not be."""

    seccomp: str | None = None
    landlock: str | None = None
    memory: str | None = None


class RelayStatus(_Answered):
    """What `s2ds status` says; after the end of the relay, its end record."""

    relay_id: RelayId
    role: Role
    mode: Mode | None = None
    gateway: str | None = None
    pid: int | None = None
    version: str | None = None
    state: State
    reason: Reason | None = None
    message: str | None = None
    public_key: PublicKey | None = None
    listeners: list[RelayListener] = []
    targets: list[str] = []
    sources: list[str] = []
    proof: Literal["target", "path"] | None = None
    last_probe: Probe | None = None
    uptime_s: float | None = None
    lease_remaining_s: float | None = None
    lifetime_remaining_s: float | None = None
    hello_remaining_s: float | None = None
    connections: Connections = Connections()
    bytes: Counts = Counts()
    bits_per_s: Rates = Rates()
    limiting: Limiting | None = None
    streams: list[Connection] = []
    confinement: Confinement | None = None
    resources: Resources | None = None
    duration_s: float | None = None
    cut: bool | None = None
    cpu_s: float | None = None

    @property
    def ended(self) -> bool:
        """Whether the relay is gone."""
        return self.state in ("ENDED", "FAILED")


class Status(_Answered):
    """One side of a stream: the sum over its relays, and each relay in `relays`."""

    uid: Uid
    role: Role
    owner: Urn
    mode: Mode
    state: State
    reason: Reason | None = None
    message: str | None = None
    proof: Literal["target", "path"] | None = None
    last_probe: Probe | None = None
    lease_remaining_s: float | None = None
    lifetime_remaining_s: float | None = None
    hello_remaining_s: float | None = None
    connections: Connections = Connections()
    bytes: Counts = Counts()
    bits_per_s: Rates = Rates()
    limiting: Limiting | None = None
    listeners: list[str] = []
    relays: list[RelayStatus] = []

    @property
    def ready(self) -> bool:
        """Whether a probe has passed, or data; without a `proof`, whether all is there that a probe would use."""
        return self.state in ("READY", "STREAMING", "DRAINING") or self.reason == "finished"

    @property
    def ended(self) -> bool:
        """Whether this side is over; `reason` says how."""
        return self.state in ("ENDED", "FAILED")


class Released(_Answered):
    """The answer to `release`; `end` is the last status, None when there was no such stream."""

    uid: Uid
    role: Role
    released: Literal[True] = True
    end: Status | None = None


class Listing(_Answered):
    """The streams of one facility that the caller may see."""

    facility: str
    streams: list[Status] = []


class GatewayReport(_Answered):
    """One gateway of a facility: whether it can be used, and what of it is booked.

    Attributes:
        name: Its name.
        kind: How it is reached.
        draining: It takes no new stream.
        answers: It ran a command just now.
        message: Why it does not answer.
        streams: Sides with a relay on it.
        listeners: Listeners booked on it.
        ports: Size of its port range; 0 lets the kernel choose.
        connections: Concurrent connections booked.
        connection_budget: What these may add up to; 0 is not counted.
        reserved_mbits_per_s: Rate booked, Mbit/s per direction.
        capacity_mbits_per_s: What this may add up to; 0 is not counted.
    """

    name: str
    kind: Literal["local", "ssh"]
    draining: bool
    answers: bool
    message: str | None = None
    streams: int = 0
    listeners: int = 0
    ports: int = 0
    connections: int = 0
    connection_budget: int = 0
    reserved_mbits_per_s: int = 0
    capacity_mbits_per_s: int = 0


class GatewayListing(_Answered):
    """The gateways of one facility, as far as they are the caller's concern.

    An administrator sees all of them, with everything booked. Anybody else sees the gateways that carry streams which
    the caller may see: what these have booked, and no limits (0), so that nothing is told of others.

    Attributes:
        facility: Its name.
        caller: The URN that owns what the caller opens.
        administrator: Whether the caller sees everybody's.
        gateways: In the order of the configuration.
    """

    facility: str
    caller: Urn
    administrator: bool
    gateways: list[GatewayReport] = []


# --- what the relay says besides


class RelayReady(_Answered):
    """The `ready` event: every socket listens. It is not the READY of the stream."""

    event: Literal["ready"]
    relay_id: RelayId
    pid: int
    public_key: PublicKey
    listeners: Annotated[list[Listener], Field(min_length=1)]


class RelayFailed(_Answered):
    """The `failed` event: the relay did not start."""

    event: Literal["failed"]
    code: str
    errno: str | None = None
    message: str = ""


class ListedRelay(_Part):
    """One relay in the runtime directory of a gateway."""

    relay_id: RelayId
    alive: bool
    pid: int | None = None


class RelayList(_Answered):
    """What `s2ds list` says."""

    relays: list[ListedRelay] = []


# --- reading

M = TypeVar("M", bound=BaseModel)


def read(
    model: type[M],
    document: M | Mapping[str, Any] | str | bytes,
    *,
    what: str = "",
    error: type[ScistreamError] = BadRequest,
) -> M:
    """Read a document, as JSON text or as a mapping, into `model`.

    Args:
        model: The model expected.
        document: The document; one that is a `model` already is answered as it is.
        what: Its name in messages; by default the model's.
        error: The class to raise when it does not fit.

    Raises:
        ProtocolMismatch: When it carries another protocol number, or none.
        BadRequest: (or `error`) when it is no JSON object, or a field is wrong; the message names each field.
    """
    if isinstance(document, model):
        return document
    what = what or model.__name__
    if isinstance(document, BaseModel):
        raise error(f"the document is not a {what} but a {type(document).__name__}", which=what)
    if isinstance(document, str | bytes):
        try:
            document = json.loads(document)
        except (ValueError, RecursionError):
            raise error(f"the {what} document is not JSON", which=what) from None
    if not isinstance(document, Mapping):
        raise error(f"the {what} document is not a JSON object", which=what)
    check_protocol(document, what)
    offer = document.get("offer")  # a document within the document: what PROD's facility answered
    if isinstance(offer, Mapping):
        check_protocol(offer, "Offer")
    try:
        return model.model_validate_json(json.dumps(document))
    except ValidationError as wrong:
        fields = dict(complaints(wrong))
        words = "; ".join(f"{name}: {said}" if name else said for name, said in fields.items())
        raise error(f"the {what} document is wrong: {words}", which=what, fields=fields) from None
    except (TypeError, ValueError) as wrong:
        raise error(f"the {what} document is not JSON: {wrong}", which=what) from None


def check_protocol(document: Mapping[str, Any], what: str) -> None:
    """Raise ProtocolMismatch, with both numbers, unless `document` carries our protocol."""
    theirs = document.get("protocol")
    if isinstance(theirs, bool) or theirs != PROTOCOL:
        raise ProtocolMismatch(
            f"{what} carries protocol {'none' if theirs is None else repr(theirs)}, this side speaks {PROTOCOL}",
            which=what,
            hint="Run versions of the same protocol on both sides",
            theirs=theirs if isinstance(theirs, int) else None,
            ours=PROTOCOL,
        )


def complaints(wrong: ValidationError) -> Iterable[tuple[str, str]]:
    """Field and words of each mistake; the values stay out, they may be long or private."""
    for mistake in wrong.errors(include_url=False, include_input=False, include_context=False):
        place = [str(part) for part in mistake["loc"]]
        words = mistake["msg"].removeprefix("Value error, ")
        # a check over a whole table names the field itself
        named = re.match(r"([a-z_.]+): ", words) if mistake["type"] == "value_error" else None
        if named:
            place.append(named[1])
            words = words[named.end() :]
        yield ".".join(place), words
