"""The control logic of one facility: request, hello, update, status, renew, release, list.

Each verb takes a document and answers one. The registry is brought into line with the relays that really run at
every call, so that a crash anywhere leaves at most what the next call, or the lease, clears away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias

from pydantic import BaseModel

from scistream_flows import policy
from scistream_flows.config import FacilityConfig, GatewayConfig
from scistream_flows.errors import (
    PROTOCOL,
    BadRequest,
    CapacityExhausted,
    Conflict,
    GatewayUnreachable,
    NotFound,
    PolicyDenied,
    ProtocolMismatch,
    RelayError,
    RelayLost,
    ScistreamError,
)
from scistream_flows.gateway import Gateway, connect_gateway
from scistream_flows.models import (
    URN_PATTERN,
    Connections,
    Counts,
    Hello,
    Limiting,
    Listener,
    Listing,
    ListQuery,
    Offer,
    OfferedRelay,
    Rates,
    RelayListener,
    RelayStatus,
    Release,
    Released,
    Renewal,
    Request,
    Role,
    State,
    Status,
    StatusQuery,
    Update,
    ip_of,
    join_address,
    read,
    split_address,
)
from scistream_flows.policy import Right, Usage
from scistream_flows.registry import Key, Registry, RelayRow, StreamRow, not_found
from scistream_flows.relay import Relays

log = logging.getLogger(__name__)

Caller: TypeAlias = str | Sequence[str]

LOCK_TIMEOUT_S: Final = 30.0
SWEEP_INTERVAL_S: Final = 1.0
GATEWAY_RETRY_S: Final = 30.0  # so long a gateway that did not answer is not asked, unless it is needed

VERBS: Final = ("request", "hello", "update", "status", "renew", "release", "list")

# How far a side has come; of several relays the least advanced one counts.
_PROGRESS: Final[tuple[State, ...]] = (
    "REQUESTED",
    "WAITING_HELLO",
    "LISTENING",
    "READY",
    "STREAMING",
    "DRAINING",
)


def unix_owner() -> str:
    """The owner of calls from this process: `urn:scistream:unix:UID@HOST`."""
    return f"urn:scistream:unix:{os.geteuid()}@{socket.gethostname()}"


class S2CS:
    """The service of one facility, in this process. Several processes may serve the same facility.

    Every verb takes a model, a mapping or JSON text. `owner` is the URN of the caller, by default the Unix user. It may
    be several: the first owns what is opened, all of them (linked identities, groups) count for rights.

    Args:
        config: What the facility is.
        gateways: By name; by default those of the configuration.

    Raises:
        ConfigError: When the state directory cannot be trusted.
        RegistryError: When it cannot be used.
    """

    def __init__(self, config: FacilityConfig, *, gateways: Mapping[str, Gateway] | None = None) -> None:
        self.config = config
        self._registry = Registry(config.state_dir)
        self._gateways: Mapping[str, Gateway] = gateways or {
            one.name: connect_gateway(one, state_dir=config.state_dir) for one in config.gateways
        }
        self._swept_at = -SWEEP_INTERVAL_S
        self._sweeping = threading.Lock()
        self._silent: dict[
            str, tuple[float, ScistreamError]
        ] = {}  # gateways that did not answer: when, and why

    def __enter__(self) -> S2CS:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the registry and the gateways. Streams live on."""
        self._registry.close()
        for gateway in self._gateways.values():
            gateway.close()

    # --- verbs

    def request(self, document: Request | Mapping[str, Any] | str, *, owner: Caller | None = None) -> Offer:
        """Open one side. The same request again answers the same offer, and renews the lease.

        Raises:
            BadRequest, NotSupported, PolicyDenied: Nothing was opened.
            Conflict: The owner has a different stream of this name; the message says what differs.
            CapacityExhausted, PortsExhausted: Nothing free.
            RelayError: The relay did not start; nothing is left.
        """
        request = read(Request, document)
        key = Key(_caller(owner)[0], request.uid, request.role)
        began = time.monotonic()
        self._sweep()
        with self._registry.lock(key, timeout_s=LOCK_TIMEOUT_S), self._denials_audited(key):
            existing = self._registry.find(key)
            if existing is not None and existing.phase != "ended":
                offer = self._again(existing, request)
                if offer is not None:
                    return offer
            return self._open(key, request, began)

    def hello(
        self,
        document: Hello | Mapping[str, Any] | str,
        *,
        owner: Caller | None = None,
        caller_address: str | None = None,
    ) -> Offer:
        """The application says where it is; answers the offer with the listeners.

        Args:
            document: PROD: its targets. CONS: the consumers to allow in addition.
            owner: The caller.
            caller_address: CONS: the IP the call came from, allowed in addition.

        Raises:
            NotFound: No such stream of this caller, or it has ended.
            PolicyDenied: The allow-lists do not have it.
        """
        hello = read(Hello, document)
        with self._managed(hello.uid, hello.role, hello.owner, owner) as stream:
            living = self._living(stream)
            if stream.key.role == "PROD":
                changes: dict[str, Any] = {"targets": self._targets(hello.targets)}
            else:
                asked = list(hello.consumers) + ([caller_address] if caller_address else [])
                policy.admit_consumers(asked, self.config)
                known = [source for relay in living for source in relay.sources]
                changes = {"sources": list(dict.fromkeys([*known, *asked]))}
            reports = self._change(stream, changes)
            self._registry.audit("hello", stream.key, **changes)
            return self._offer(stream, reports)

    def update(self, document: Update | Mapping[str, Any] | str, *, owner: Caller | None = None) -> Status:
        """Change peers, targets, consumers or the rate of a running side.

        Raises:
            NotFound: No such stream of this caller, or it has ended.
            PolicyDenied: The allow-lists do not have it.
        """
        update = read(Update, document)
        with self._managed(update.uid, update.role, update.owner, owner) as stream:
            self._living(stream)
            changes: dict[str, Any] = {}
            if update.peers is not None:
                policy.admit_peers(update.peers, stream.request.mode, self.config)
                changes["peers"] = [one.model_dump(exclude={"protocol"}) for one in update.peers]
            if update.targets is not None:
                changes["targets"] = self._targets(update.targets)
            if update.consumers is not None:
                policy.admit_consumers(update.consumers, self.config)
                changes["sources"] = update.consumers
            if update.rate_mbits_per_s is not None:
                reserved = _reserved(stream.request)
                if reserved and not 0 < update.rate_mbits_per_s <= reserved:
                    raise BadRequest(
                        f"rate_mbits_per_s: {reserved} Mbit/s are reserved, no more can be had",
                        which=update.uid,
                        hint="Release the stream and request the higher rate",
                    )
                changes["rate_mbits_per_s"] = update.rate_mbits_per_s
            reports = self._change(stream, changes)
            self._registry.audit("update", stream.key, **changes)
            return _status(stream, self._named(stream, reports))

    def status(
        self,
        document: StatusQuery | Mapping[str, Any] | str,
        *,
        owner: Caller | None = None,
    ) -> Status:
        """The state of one side, also for a day after its end. Reading does not renew the lease.

        Raises:
            NotFound: No such stream of this caller.
        """
        query = read(StatusQuery, document)
        self._sweep(at_most_every_s=SWEEP_INTERVAL_S)
        return self._report(self._find(query.uid, query.role, query.owner, owner, right="monitor"))

    def renew(self, document: Renewal | Mapping[str, Any] | str, *, owner: Caller | None = None) -> Status:
        """Renew the lease; on a side that has ended, answer how it ended.

        Raises:
            NotFound: No such stream of this caller.
            PolicyDenied: `lease_s` is above the facility's limit.
        """
        renewal = read(Renewal, document)
        self._sweep(at_most_every_s=SWEEP_INTERVAL_S)
        stream = self._find(renewal.uid, renewal.role, renewal.owner, owner, right="manage")
        lease_s = renewal.lease_s or stream.request.lease_s
        policy.admit_at_most("lease_s", lease_s, self.config.policy.longest_lease_s, self.config)
        return self._report(
            stream, lambda row: self._relays(row.gateway).renew(row.relay_id, lease_s=lease_s)
        )

    def release(
        self, document: Release | Mapping[str, Any] | str, *, owner: Caller | None = None
    ) -> Released:
        """End one side and remove every trace but the end. Repeating it, or releasing what never was, is no error.

        Raises:
            PolicyDenied: The caller may monitor the stream but not manage it.
            GatewayUnreachable: The relay could not be told; it ends by its lease.
        """
        release = read(Release, document)
        self._sweep(at_most_every_s=SWEEP_INTERVAL_S)
        try:
            with self._managed(release.uid, release.role, release.owner, owner) as found:
                stream = found
                if stream.phase != "ended":
                    stream = self._close(
                        stream, [self._stop(stream, row, "released") for row in stream.relays]
                    )
                end = _status(stream, stream.ended)
        except NotFound:
            return Released(uid=release.uid, role=release.role)
        return Released(uid=release.uid, role=release.role, end=end)

    def list(
        self,
        document: ListQuery | Mapping[str, Any] | str,
        *,
        owner: Caller | None = None,
    ) -> Listing:
        """The streams that the caller owns, manages or monitors."""
        query = read(ListQuery, document)
        self._sweep()
        caller = _caller(owner)
        streams = self._registry.streams("opening", "open", *(("ended",) if query.include_ended else ()))
        visible = [stream for stream in streams if _may("monitor", stream, caller)]
        reports = [self._report(stream) for stream in visible]
        return Listing(
            facility=self.config.name,
            streams=[report for report in reports if query.include_ended or not report.ended],
        )

    def answer(
        self, verb: str, document: Mapping[str, Any] | str, *, owner: Caller | None = None
    ) -> dict[str, Any]:
        """Any verb by its name, JSON types in and out, for every way a call can come in.

        Returns:
            `{"protocol", "ok": true, "value": …}` or `{"protocol", "ok": false, "error": …}`, the error in its
            document form.
        """
        try:
            if verb not in VERBS:
                raise BadRequest(
                    f"there is no verb {verb!r}", which=verb, hint=f"Use one of {', '.join(VERBS)}"
                )
            value: BaseModel = getattr(self, verb)(document, owner=owner)
        except ScistreamError as error:
            return {"protocol": PROTOCOL, "ok": False, "error": error.to_document()}
        return {"protocol": PROTOCOL, "ok": True, "value": value.model_dump(mode="json")}

    # --- opening

    def _again(self, stream: StreamRow, request: Request) -> Offer | None:
        """The offer of a stream that is there; None when it has ended meanwhile. The caller holds its lock."""
        stream = self._settled(stream)
        if stream.phase == "ended":
            return None
        differing = stream.request.differences(request)
        if differing:
            raise Conflict(
                f"stream {request.uid!r} ({request.role}) exists with different {', '.join(differing)}",
                which=request.uid,
                hint="Release it first, or choose another uid",
                fields=differing,
            )
        reports = self._renewed(stream, request.lease_s)
        if any(report.ended for report in reports):
            self._close(stream, self._stop_the_living(stream, reports))
            return None
        return self._offer(stream, reports)

    def _renewed(self, stream: StreamRow, lease_s: int) -> Sequence[RelayStatus]:
        return [
            self._ask(stream, row, lambda row: self._relays(row.gateway).renew(row.relay_id, lease_s=lease_s))
            for row in stream.relays
        ]

    def _open(self, key: Key, request: Request, began: float) -> Offer:
        policy.admit(request, self.config)
        onwards = self._onwards(request)
        if request.consumers:
            policy.admit_consumers(request.consumers, self.config)
        skipped = {name: wrong for name, (at, wrong) in self._silent.items() if at >= began}
        for name, wrong in skipped.items():
            self._skip(key, name, wrong)
        while gateways := self._worth_asking(skipped):
            facility = self.config.model_copy(update={"gateways": gateways})
            try:
                return self._open_on(facility, key, request, onwards)
            except GatewayUnreachable as wrong:
                if wrong.which not in [one.name for one in gateways]:
                    raise
                self._silent[wrong.which] = (time.monotonic(), wrong)
                skipped[wrong.which] = wrong
                self._skip(key, wrong.which, wrong)
        if len(skipped) == 1:
            raise next(iter(skipped.values()))
        raise GatewayUnreachable(
            f"no gateway of facility {self.config.name} can be used: "
            + "; ".join(wrong.message for wrong in skipped.values()),
            which=self.config.name,
            hint=next(iter(skipped.values())).hint,
            gateways={name: wrong.message for name, wrong in skipped.items()},
        )

    def _skip(self, key: Key, gateway: str, wrong: ScistreamError) -> None:
        log.warning("stream %s (%s): gateway %s is skipped: %s", key.uid, key.role, gateway, wrong.message)
        self._registry.audit("skip", key, gateway=gateway, message=wrong.message)

    def _worth_asking(self, skipped: Mapping[str, object]) -> Sequence[GatewayConfig]:
        """The gateways not skipped; of these only such that did not fail lately, as long as there are any."""
        left = tuple(one for one in self.config.gateways if one.name not in skipped)
        return tuple(one for one in left if not self._silent_lately(one.name)) or left

    def _silent_lately(self, gateway: str) -> bool:
        at, _ = self._silent.get(gateway, (None, None))
        return at is not None and time.monotonic() - at < GATEWAY_RETRY_S

    def _open_on(
        self, facility: FacilityConfig, key: Key, request: Request, onwards: Mapping[str, Any]
    ) -> Offer:
        def place(usage: Usage) -> Sequence[RelayRow]:
            gateway = policy.place(request, facility, usage)
            return [
                RelayRow(
                    relay_id=secrets.token_hex(16),
                    gateway=gateway.name,
                    listeners=request.num_conn,
                    reserved_mbits_per_s=_reserved(request),
                )
            ]

        _step("opening", key)
        stream = self._registry.claim(key, request, place)
        try:
            _step("claimed", key)
            reports = [self._start(row, stream, onwards) for row in stream.relays]
            _step("started", key)
            offer = self._offer(stream, reports)
            self._registry.audit(
                "open",
                key,
                mode=request.mode,
                relays=[row.relay_id for row in stream.relays],
                listeners=offer.addresses,
                **onwards,
            )
            self._registry.opened(stream, offer)
        except BaseException as wrong:
            self._take_back(stream, wrong)
            raise
        _step("opened", key)
        return offer

    def _start(self, row: RelayRow, stream: StreamRow, onwards: Mapping[str, Any]) -> RelayStatus:
        request = stream.request
        gateway = self._gateway(row.gateway)
        sources: Sequence[str] = ()
        if request.role == "CONS":
            sources = request.consumers or policy.default_consumers(self.config)
        ready = gateway.relays.start(
            {
                "protocol": PROTOCOL,
                "relay_id": row.relay_id,
                "role": request.role,
                "mode": request.mode,
                "listen": {
                    "address": gateway.config.listen_address(request.role),
                    "first_port": gateway.config.port_range.first,
                    "last_port": gateway.config.port_range.last,
                    "indices": list(range(row.listeners)),
                },
                "sources": list(sources),
                "onward_source": _source_for(gateway.config.onward_source(request.role), onwards),
                "probe": request.probe,
                "until": request.until,
                "max_connections": request.max_connections,
                "rate_mbits_per_s": request.rate_mbits_per_s,
                "lease_s": request.lease_s,
                "lifetime_s": request.lifetime_s,
                "hello_timeout_s": request.hello_timeout_s,
                "linger_s": request.linger_s,
                **onwards,
            }
        )
        return RelayStatus(
            relay_id=row.relay_id,
            role=request.role,
            state="LISTENING",
            public_key=ready.public_key,
            listeners=[RelayListener(index=one.index, address=one.address) for one in ready.listeners],
            lease_remaining_s=request.lease_s,
        )

    def _take_back(self, stream: StreamRow, wrong: BaseException) -> None:
        """Nothing stays of a stream that did not open, whatever went wrong."""
        for row in stream.relays:
            # a gateway that does not answer keeps the relay at most until its lease ends; a later sweep stops it
            with contextlib.suppress(ScistreamError):
                self._stop(stream, row, "admin")
                self._forget(row)
        self._registry.discard(stream)
        message = wrong.message if isinstance(wrong, ScistreamError) else type(wrong).__name__
        with contextlib.suppress(ScistreamError):
            self._registry.audit("fail", stream.key, message=message)

    def _onwards(self, request: Request) -> dict[str, Any]:
        """Where the relay connects to, resolved and admitted: the relay gets numbers."""
        if request.role == "PROD":
            return {"targets": self._targets(request.targets), "peers": []}
        offer = request.offer
        if offer is None:
            raise BadRequest("offer: a CONS request needs the offer of PROD", which=request.uid)
        for address in offer.addresses:
            policy.admit_address(address, kind="peers", facility=self.config)
        peers = [
            {
                "relay_id": relay.relay_id,
                "public_key": relay.public_key,
                "listeners": [one.model_dump() for one in relay.listeners],
            }
            for relay in offer.relays
        ]
        return {"targets": [], "peers": peers}

    def _targets(self, targets: Sequence[str]) -> Sequence[str]:
        return [self._target(one) for one in targets]

    def _target(self, target: str) -> str:
        host, port = split_address(target)
        if ip_of(host) is not None:
            policy.admit_address(target, kind="targets", facility=self.config)
            return target
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as wrong:
            raise BadRequest(
                f"targets: the name {host!r} is not known at facility {self.config.name}: {wrong.strerror}",
                which=target,
                hint="Give a name that the facility's gateway can resolve, or an IP address",
            ) from None
        # IPv4 first: `localhost` means 127.0.0.1 to most servers
        addresses = sorted({str(one[4][0]) for one in found}, key=lambda ip: (":" in ip, ip))
        for address in addresses:
            with contextlib.suppress(PolicyDenied):
                resolved = join_address(address, port)
                policy.admit_address(resolved, kind="targets", facility=self.config)
                return resolved
        raise PolicyDenied(
            f"facility {self.config.name} does not allow {target} in targets: it is {', '.join(addresses)} here",
            which=target,
            hint=f"Allowed targets: {', '.join(map(str, self.config.policy.targets)) or 'none'}",
        )

    def _offer(self, stream: StreamRow, reports: Sequence[RelayStatus]) -> Offer:
        request = stream.request
        relays = []
        for row, report in zip(stream.relays, reports, strict=True):
            config = self._gateway(row.gateway).config
            advertised = config.advertised_address(request.role)
            relays.append(
                OfferedRelay(
                    relay_id=row.relay_id,
                    gateway=row.gateway,
                    public_key=report.public_key or "",
                    dial_addresses=list(_dial_addresses(config, request)),
                    listeners=[
                        Listener(
                            index=one.index, address=join_address(advertised, split_address(one.address)[1])
                        )
                        for one in report.listeners
                    ],
                )
            )
        return Offer(
            uid=request.uid,
            role=request.role,
            mode=request.mode,
            dial=request.dial,
            lease_remaining_s=min(report.lease_remaining_s or 0 for report in reports),
            relays=relays,
        )

    def _change(self, stream: StreamRow, changes: Mapping[str, Any]) -> Sequence[RelayStatus]:
        return [
            self._ask(stream, row, lambda row: self._relays(row.gateway).update(row.relay_id, changes))
            for row in stream.relays
        ]

    # --- finding

    def _find(
        self, uid: str, role: Role, stream_owner: str | None, owner: Caller | None, right: Right
    ) -> StreamRow:
        caller = _caller(owner)
        named = [one for one in self._registry.named(uid, role) if stream_owner in (None, one.key.owner)]
        visible = [one for one in named if _may("monitor", one, caller)]
        mine = [one for one in visible if one.key.owner in caller] or visible
        if not mine:
            raise not_found(uid, role)
        if len(mine) > 1:
            raise Conflict(
                f"{len(mine)} owners share a stream {uid!r} ({role}) with this caller",
                which=uid,
                hint="Name one in the field owner",
                owners=sorted(one.key.owner for one in mine),
            )
        if not _may(right, mine[0], caller):
            self._registry.audit("deny", mine[0].key, caller=_caller(owner)[0], right=right)
            raise PolicyDenied(
                f"this caller may monitor stream {uid!r} ({role}), not manage it",
                which=uid,
                hint="Ask its owner to name you in managers",
            )
        return mine[0]

    @contextlib.contextmanager
    def _managed(
        self, uid: str, role: Role, stream_owner: str | None, owner: Caller | None
    ) -> Iterator[StreamRow]:
        """A stream the caller may manage, locked, as it is now."""
        key = self._find(uid, role, stream_owner, owner, right="manage").key
        with self._registry.lock(key, timeout_s=LOCK_TIMEOUT_S):
            stream = self._registry.find(key)
            if stream is None:
                raise not_found(uid, role)
            with self._denials_audited(key):
                yield self._settled(stream)

    @contextlib.contextmanager
    def _denials_audited(self, key: Key) -> Iterator[None]:
        try:
            yield
        except (PolicyDenied, CapacityExhausted) as denied:
            self._registry.audit("deny", key, message=denied.message, which=denied.which)
            raise

    def _living(self, stream: StreamRow) -> Sequence[RelayStatus]:
        """The reports of the relays of a stream that has not ended. The caller holds its lock."""
        reports = [self._ask(stream, row) for row in stream.relays] if stream.phase == "open" else []
        if any(report.ended for report in reports):
            stream = self._close(stream, self._stop_the_living(stream, reports))
        if stream.phase == "ended":
            end = _status(stream, stream.ended)
            raise NotFound(
                f"stream {stream.key.uid!r} ({stream.key.role}) has ended: {end.reason}",
                which=stream.key.uid,
                hint="Request it again",
                reason=end.reason,
            )
        return reports

    # --- keeping the registry in line

    def _sweep(self, *, at_most_every_s: float = 0) -> None:
        """Compare what runs with what is written down: end what is gone, stop what nobody asked for."""
        if time.monotonic() - self._swept_at < at_most_every_s or not self._sweeping.acquire(blocking=False):
            return
        try:
            self._swept_at = time.monotonic()
            # First what runs, then what is written: each relay was written down before it started, so one that runs
            # and is not written down, or not any more, is nobody's.
            running = self._running_everywhere()
            written = self._registry.relays()
            for name, relays in running.items():
                for relay_id, alive in (relays or {}).items():
                    if relay_id not in written or written[relay_id][1] == "ended":
                        self._clear_away(name, relay_id, alive=alive)
            for stream in self._registry.streams("opening", "open"):
                lists = [(running.get(row.gateway), row.relay_id) for row in stream.relays]
                if stream.phase == "opening" or any(
                    ids is not None and not ids.get(one) for ids, one in lists
                ):
                    self._settle_if_free(stream)
        finally:
            self._sweeping.release()

    def _settle_if_free(self, stream: StreamRow) -> None:
        with self._registry.lock_if_free(stream.key) as held:
            now = self._registry.find(stream.key) if held else None
            if now is None or now.id != stream.id:
                return
            try:
                self._settled(now)
            except RelayError as wrong:
                log.warning("stream %s (%s) left as it is: %s", stream.key.uid, stream.key.role, wrong)

    def _running_everywhere(self) -> Mapping[str, dict[str, bool] | None]:
        names = list(self._gateways)
        if len(names) == 1:
            return {names[0]: self._running(names[0])}
        with ThreadPoolExecutor(len(names)) as pool:  # one that does not answer keeps the others waiting once
            return dict(zip(names, pool.map(self._running, names), strict=True))

    def _running(self, gateway: str) -> dict[str, bool] | None:
        if self._silent_lately(gateway):
            return None
        try:
            running = {one.relay_id: one.alive for one in self._relays(gateway).list()}
        except (RelayError, ProtocolMismatch) as wrong:
            log.warning("gateway %s left out of the comparison: %s", gateway, wrong)
            self._silent[gateway] = (time.monotonic(), wrong)
            return None
        self._silent.pop(gateway, None)
        return running

    def _clear_away(self, gateway: str, relay_id: str, *, alive: bool) -> None:
        try:
            relays = self._relays(gateway)
            if alive:
                relays.stop(relay_id, reason="admin")
                log.warning("stopped relay %s on gateway %s: no stream has it", relay_id, gateway)
            relays.forget(relay_id)
        except (RelayError, NotFound, ProtocolMismatch) as wrong:
            log.debug("relay %s on gateway %s: %s", relay_id, gateway, wrong)

    def _settled(self, stream: StreamRow) -> StreamRow:
        """The stream brought into line with its relays. The caller holds its lock."""
        if stream.phase == "ended":
            return stream
        reports = [self._ask(stream, row) for row in stream.relays]
        if any(report.ended for report in reports):
            return self._close(stream, self._stop_the_living(stream, reports))
        if stream.phase == "opening":
            self._registry.opened(stream, self._offer(stream, reports))
            self._registry.audit(
                "open", stream.key, adopted=True, relays=[row.relay_id for row in stream.relays]
            )
            return self._registry.find(stream.key) or stream
        return stream

    def _report(self, stream: StreamRow, ask: Callable[[RelayRow], RelayStatus] | None = None) -> Status:
        """The status of a stream; one whose relays are found ended is closed."""
        if stream.phase == "open":
            reports = [self._ask(stream, row, ask) for row in stream.relays]
            if not any(report.ended for report in reports):
                return _status(stream, self._named(stream, reports))
        if stream.phase != "ended":
            with self._registry.lock_if_free(stream.key) as held:
                now = self._registry.find(stream.key)
                if now is None:
                    raise not_found(stream.key.uid, stream.key.role)
                stream = self._settled(now) if held else now
        if stream.phase == "ended":
            return _status(stream, stream.ended)
        if stream.phase == "opening":
            return _status(stream, ())
        return _status(stream, self._named(stream, [self._ask(stream, row) for row in stream.relays]))

    def _ask(
        self, stream: StreamRow, row: RelayRow, ask: Callable[[RelayRow], RelayStatus] | None = None
    ) -> RelayStatus:
        """What a relay says; one that is gone without a word has FAILED, relay_lost."""
        if ask is not None:
            try:
                return ask(row)
            except GatewayUnreachable:
                raise
            except (RelayError, NotFound) as refused:
                # one that has ended takes no changes: its status says how it ended
                report = self._ask(stream, row)
                if not report.ended:
                    raise refused
                return report
        try:
            return self._relays(row.gateway).status(row.relay_id)
        except (RelayLost, NotFound) as gone:
            return _lost(stream, row, gone)

    def _stop(self, stream: StreamRow, row: RelayRow, reason: Literal["released", "admin"]) -> RelayStatus:
        try:
            return self._relays(row.gateway).stop(row.relay_id, reason=reason)
        except (RelayLost, NotFound) as gone:
            return _lost(stream, row, gone)

    def _stop_the_living(self, stream: StreamRow, reports: Sequence[RelayStatus]) -> Sequence[RelayStatus]:
        pairs = zip(stream.relays, reports, strict=True)
        return [report if report.ended else self._stop(stream, row, "admin") for row, report in pairs]

    def _close(self, stream: StreamRow, ends: Sequence[RelayStatus]) -> StreamRow:
        """Write the end, then let the relays' logs go: never the other way round."""
        _step("stopped", stream.key)
        self._registry.ended(stream, self._named(stream, ends))
        _step("ended", stream.key)
        for row in stream.relays:
            self._forget(row)
        _step("forgotten", stream.key)
        closed = self._registry.find(stream.key) or stream
        end = _status(closed, closed.ended)
        with contextlib.suppress(ScistreamError):
            self._registry.audit(
                "close", stream.key, state=end.state, reason=end.reason, bytes=end.bytes.model_dump()
            )
        return closed

    def _forget(self, row: RelayRow) -> None:
        # what stays on a gateway that does not answer, a later sweep removes
        with contextlib.suppress(RelayError, NotFound):
            self._relays(row.gateway).forget(row.relay_id)

    def _named(self, stream: StreamRow, reports: Sequence[RelayStatus]) -> Sequence[RelayStatus]:
        pairs = zip(stream.relays, reports, strict=True)
        return [report.model_copy(update={"gateway": row.gateway}) for row, report in pairs]

    def _gateway(self, name: str) -> Gateway:
        gateway = self._gateways.get(name)
        if gateway is None:
            raise GatewayUnreachable(
                f"facility {self.config.name} has no gateway {name!r} any more",
                which=name,
                hint="Put it back into the configuration until its streams have ended",
            )
        return gateway

    def _relays(self, gateway: str) -> Relays:
        return self._gateway(gateway).relays


def _caller(owner: Caller | None) -> tuple[str, ...]:
    """The caller's URNs, the owner of what is opened first."""
    urns = (unix_owner(),) if owner is None else (owner,) if isinstance(owner, str) else tuple(owner)
    if not urns or not all(re.fullmatch(URN_PATTERN, urn) for urn in urns):
        raise BadRequest(
            f"owner: {owner!r} is not a URN", which="owner", hint="Such as urn:scistream:unix:1000@host"
        )
    return urns


def _may(right: Right, stream: StreamRow, caller: Sequence[str]) -> bool:
    request = stream.request
    return policy.allows(
        right, owner=stream.key.owner, managers=request.managers, monitors=request.monitors, caller=caller
    )


def _reserved(request: Request) -> int:
    return request.rate_mbits_per_s if request.reserve_rate else 0


def _source_for(source: str | None, onwards: Mapping[str, Any]) -> str | None:
    """The local address to connect from, unless what is connected to is of the other IP version."""
    addresses = [
        *onwards["targets"],
        *(one["address"] for peer in onwards["peers"] for one in peer["listeners"]),
    ]
    if source is None or any((":" in source) != (":" in split_address(one)[0]) for one in addresses):
        return None
    return source


def _dial_addresses(gateway: GatewayConfig, request: Request) -> Sequence[str]:
    """Where PROD sees CONS come from; empty, so that the key alone proves it, if that is not known."""
    dialled = {":" in split_address(one)[0] for one in request.offer.addresses} if request.offer else set()
    known = [one for one in gateway.dial_addresses() if (":" in one) in dialled]
    return known if {":" in one for one in known} == dialled else []


def _lost(stream: StreamRow, row: RelayRow, gone: ScistreamError) -> RelayStatus:
    return RelayStatus(
        relay_id=row.relay_id, role=stream.key.role, state="FAILED", reason="relay_lost", message=gone.message
    )


def _status(stream: StreamRow, reports: Sequence[RelayStatus]) -> Status:
    """One side: the sum over its relays. No report yet means that it is being opened."""
    request = stream.request
    leading = _leading(reports)
    return Status(
        uid=request.uid,
        role=request.role,
        owner=stream.key.owner,
        mode=request.mode,
        state=leading.state if leading else "REQUESTED",
        reason=leading.reason if leading else None,
        message=leading.message if leading else None,
        proof=leading.proof if leading else None,
        last_probe=leading.last_probe if leading else None,
        lease_remaining_s=_least(report.lease_remaining_s for report in reports),
        lifetime_remaining_s=_least(report.lifetime_remaining_s for report in reports),
        hello_remaining_s=_least(report.hello_remaining_s for report in reports),
        connections=Connections(
            **{
                name: sum(getattr(one.connections, name) for one in reports)
                for name in Connections.model_fields
            }
        ),
        bytes=Counts(
            **{name: sum(getattr(one.bytes, name) for one in reports) for name in Counts.model_fields}
        ),
        bits_per_s=Rates(
            **{name: sum(getattr(one.bits_per_s, name) for one in reports) for name in Rates.model_fields}
        ),
        limiting=_limiting(reports),
        listeners=stream.offer.addresses if stream.offer else [],
        relays=list(reports),
    )


def _leading(reports: Sequence[RelayStatus]) -> RelayStatus | None:
    """The relay whose state is that of the side: one that failed, else the least advanced one that lives."""
    failed = [report for report in reports if report.state == "FAILED"]
    living = [report for report in reports if not report.ended]
    if failed or not living:
        return next(iter(failed or reports), None)
    slowest = min(living, key=lambda report: _PROGRESS.index(report.state))
    streaming = [report for report in living if report.state == "STREAMING"]
    return streaming[0] if streaming and slowest.state == "READY" else slowest


def _limiting(reports: Sequence[RelayStatus]) -> Limiting | None:
    """The verdict of the relay that moves most."""
    known = [report for report in reports if report.limiting is not None]
    busiest = max(
        known, key=lambda one: one.bits_per_s.to_consumer + one.bits_per_s.to_producer, default=None
    )
    return busiest.limiting if busiest else None


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _step(name: str, key: Key) -> None:
    log.debug("%s %s (%s)", name, key.uid, key.role)
