"""The control logic of one facility: request, hello, update, status, renew, release, list; and its administration.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias, TypeVar

from pydantic import BaseModel

from scistream_flows import policy, route, side
from scistream_flows.allowance import Allowance
from scistream_flows.config import FacilityConfig, GatewayConfig
from scistream_flows.errors import (
    PROTOCOL,
    BadRequest,
    CapacityExhausted,
    Conflict,
    GatewayUnreachable,
    NotFound,
    PolicyDenied,
    PortsExhausted,
    ProtocolMismatch,
    RateLimited,
    RelayError,
    RelayLost,
    ScistreamError,
    Unauthenticated,
)
from scistream_flows.gateway import Gateway, connect_gateway
from scistream_flows.models import (
    URN_PATTERN,
    GatewayListing,
    GatewayReport,
    Hello,
    Listing,
    ListQuery,
    Offer,
    OfferedRelay,
    RelayListener,
    RelayStatus,
    Release,
    Released,
    Renewal,
    Request,
    Role,
    Status,
    StatusQuery,
    Ticket,
    TicketHello,
    TicketRequest,
    Update,
    ip_of,
    join_address,
    read,
    split_address,
)
from scistream_flows.policy import Right, Usage
from scistream_flows.registry import Key, Registry, RelayRow, StreamRow, not_found, said_at
from scistream_flows.relay import Relays

log = logging.getLogger(__name__)

Caller: TypeAlias = str | Sequence[str]
A = TypeVar("A")
T = TypeVar("T")

LOCK_TIMEOUT_S: Final = 30.0
SWEEP_INTERVAL_S: Final = 1.0
GATEWAY_RETRY_S: Final = 30.0  # so long a gateway that did not answer is not asked, unless it is needed

AT_ONCE: Final = 16  # relays that are asked at the same time: one for each gateway of a stream

GROUP_URN: Final = "urn:globus:groups:id:"

VERBS: Final = ("request", "hello", "update", "status", "renew", "release", "list", "ticket")

TICKET_S: Final = 3600

REFUSALS_PER_MIN: Final = (
    10  # lines of the audit log for the refusals of one caller, or of all strangers together
)
REFUSALS_AT_ONCE: Final = 60


def unix_owner(uid: int | None = None) -> str:
    """The owner `urn:scistream:unix:UID@HOST` of calls from an account; by default, from this process."""
    return f"urn:scistream:unix:{os.geteuid() if uid is None else uid}@{socket.gethostname()}"


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
            one.name: connect_gateway(one, state_dir=config.state_dir, data_server=config.data_server)
            for one in config.gateways
        }
        self._swept_at = -SWEEP_INTERVAL_S
        self._sweeping = threading.Lock()
        self._silent: dict[
            str, tuple[float, ScistreamError]
        ] = {}  # gateways that did not answer: when, and why
        self._refusals = Allowance(per_min=REFUSALS_PER_MIN, burst=REFUSALS_AT_ONCE)
        self._unwritten = 0

    def __enter__(self) -> S2CS:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the registry and the gateways. Streams live on."""
        if self._unwritten:
            with contextlib.suppress(ScistreamError):
                self._registry.audit(
                    "deny", None, message="refusals too many to write", unwritten=self._unwritten
                )
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
        caller = _caller(owner)
        key = Key(caller[0], request.uid, request.role)
        began = time.monotonic()
        swept = self._sweep(at_most_every_s=SWEEP_INTERVAL_S)
        with self._registry.lock(key, timeout_s=LOCK_TIMEOUT_S), self._denials_audited(key, caller):
            existing = self._registry.find(key)
            if existing is not None and existing.phase != "ended":
                offer = self._again(existing, request)
                if offer is not None:
                    return offer
            facility, onwards = self._admitted(request, caller)
            opened = partial(self._open, key, request, caller, began, facility=facility, onwards=onwards)
            try:
                return opened()
            except (PolicyDenied, CapacityExhausted, PortsExhausted):
                if swept or not self._sweep(since=began):
                    raise
            # what has ended since the last comparison is free now
            return opened()

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
                return self._arrived(stream, {"targets": self._targets(hello.targets)})
            asked = [*hello.consumers, *([caller_address] if caller_address else [])]
            return self._arrived(stream, self._with_consumers(living, asked))

    def ticket(
        self, document: TicketRequest | Mapping[str, Any] | str, *, owner: Caller | None = None
    ) -> Ticket:
        """A ticket for one hello, for an application whose node is not known before, and has no token.

        Only its hash is kept. It counts once, from one address within its networks, until it expires or the stream
        ends; it opens nothing else.

        Raises:
            NotFound: No such stream of this caller, or it has ended.
            PolicyDenied: A network is not within the policy's, or `expires_s` above the longest wait.
            CapacityExhausted: The stream has as many tickets as it may.
        """
        wish = read(TicketRequest, document)
        caller = _caller(owner)
        with self._managed(wish.uid, wish.role, wish.owner, owner) as stream:
            self._living(stream)
            limit_s = self.config.policy.of(caller).longest_hello_timeout_s
            expires_s = wish.expires_s or min(TICKET_S, limit_s)
            policy.admit_at_most("expires_s", expires_s, limit_s, self.config)
            networks = policy.ticket_networks(wish.networks, wish.role, self.config)
            secret = f"sst_{secrets.token_urlsafe(32)}"
            self._registry.keep_ticket(secret, stream, networks=networks, expires_s=expires_s)
            self._registry.audit(
                "ticket", stream.key, caller=caller[0], networks=networks, expires_s=expires_s
            )
            return Ticket(
                ticket=secret,
                facility=self.config.name,
                uid=wish.uid,
                role=wish.role,
                networks=networks,
                expires_s=expires_s,
                url=self.config.service.url,
            )

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
            reports = self._change(stream, lambda row: _with_share(changes, row, stream.request))
            self._registry.audit("update", stream.key, **changes)
            return side.status(stream, self._named(stream, reports))

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
        stream = self._find(query.uid, query.role, query.owner, owner, right="monitor", administrators=True)
        return self._report(stream, self._asked(stream))

    def renew(self, document: Renewal | Mapping[str, Any] | str, *, owner: Caller | None = None) -> Status:
        """Renew the lease; on a side that has ended, answer how it ended.

        Raises:
            NotFound: No such stream of this caller.
            PolicyDenied: `lease_s` is above the facility's limit.
        """
        renewal = read(Renewal, document)
        self._sweep(at_most_every_s=SWEEP_INTERVAL_S)
        stream = self._find(
            renewal.uid, renewal.role, renewal.owner, owner, right="manage", administrators=True
        )
        lease_s = renewal.lease_s or stream.request.lease_s
        # what was admitted with the request stays so, whoever renews it
        limit = max(self.config.policy.of(_caller(owner)).longest_lease_s, stream.request.lease_s)
        with self._denials_audited(stream.key, owner):
            policy.admit_at_most("lease_s", lease_s, limit, self.config)
        return self._report(stream, self._renewed(stream, lease_s))

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
            with self._managed(
                release.uid, release.role, release.owner, owner, administrators=True, settle=False
            ) as stream:
                caller = _caller(owner)
                reason: Literal["released", "admin"] = (
                    "released" if _may("manage", stream, caller) else "admin"
                )
                end = self._end(stream, reason, caller=caller[0])
        except NotFound:
            return Released(uid=release.uid, role=release.role)
        return Released(uid=release.uid, role=release.role, end=end)

    def list(
        self,
        document: ListQuery | Mapping[str, Any] | str,
        *,
        owner: Caller | None = None,
    ) -> Listing:
        """The streams that the caller owns, manages or monitors; for an administrator, on request, everybody's.

        A stream on a gateway that does not answer is listed with what is known, and `message` says why it is no more.

        Raises:
            PolicyDenied: `all_owners` of a caller who is no administrator.
        """
        query = read(ListQuery, document)
        caller = _caller(owner)
        if query.all_owners and not self.administers(caller):
            denied = PolicyDenied(
                f"{caller[0]} may not list the streams of everybody at facility {self.config.name}",
                which=caller[0],
                hint=f"Administrators may: policy.administrators in {self.config.file or 'its configuration'}",
                key="policy.administrators",
            )
            self.refused(caller, denied)
            raise denied
        return self._listing(
            lambda stream: query.all_owners or _may("monitor", stream, caller),
            include_ended=query.include_ended,
        )

    def load(self, *, owner: Caller | None = None) -> GatewayListing:
        """The gateways: to an administrator all, with what is booked; to others their own share of those they use.

        No verb of `answer`. One that did not answer lately is not asked again for this.
        """
        caller = _caller(owner)
        administrator = self.administers(caller)
        self._sweep(at_most_every_s=SWEEP_INTERVAL_S)
        if administrator:
            reports = self._reports(lambda _: True)
        else:
            mine = self._reports(lambda stream: _may("monitor", stream, caller))
            # why it does not answer may name hosts and accounts, and its size is not a user's concern
            hidden = {"message": None, "ports": 0, "connection_budget": 0, "capacity_mbits_per_s": 0}
            reports = [one.model_copy(update=hidden) for one in mine if one.streams]
        return GatewayListing(
            facility=self.config.name,
            caller=caller[0],
            administrator=administrator,
            gateways=list(reports),
        )

    def administers(self, caller: Sequence[str]) -> bool:
        """Whether one of these URNs is an administrator; a development facility is its own account's."""
        own = self.config.file is None and unix_owner() in caller
        return own or policy.administers(caller, self.config)

    def answer(
        self, verb: str, document: Mapping[str, Any] | str, *, owner: Caller | None = None
    ) -> dict[str, Any]:
        """Any verb by its name, JSON types in and out, for every way a call can come in.

        Returns:
            A document with `protocol` and `ok`, and `value` or else `error`, which is the error in its document form.
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

    def names_groups(self, uid: str | None = None) -> bool:
        """Whether a Globus group has rights here, or on a stream: then the caller's groups have to be among its URNs.

        Args:
            uid: The name of the streams that count; by default all.
        """
        policy_names = self.config.policy.model_dump_json(include={"users", "administrators", "quota"})
        return GROUP_URN in policy_names or self._registry.mentions(GROUP_URN, uid=uid)

    def hello_by_ticket(
        self, document: TicketHello | Mapping[str, Any] | str, *, caller_address: str
    ) -> Offer:
        """A hello of somebody who has a ticket only, and no verb of `answer`. Said again, it is answered again.

        Args:
            document: The ticket; at PROD the targets, which have to be within the ticket's networks.
            caller_address: The IP that the call came from; at CONS it is what is allowed in addition.

        Raises:
            Unauthenticated: The ticket never was, has expired, or was used for something else.
            PolicyDenied: The caller, or a target, is not within its networks, or not in the allow-lists.
            BadRequest: No targets at PROD, or some at CONS.
            NotFound: The stream has ended.
        """
        asked = read(TicketHello, document)
        known = self._registry.ticket(asked.ticket)
        if known is None:
            unknown = _no_ticket()
            self.refused(None, unknown)
            raise unknown
        key = known.stream.key
        with self._registry.lock(key, timeout_s=LOCK_TIMEOUT_S), self._denials_audited(key, key.owner):
            stream = self._registry.find(key)
            if stream is None or stream.id != known.stream.id:
                raise _no_ticket()
            caller = policy.admit_with_ticket(caller_address, known.networks)
            if (key.role == "PROD") != bool(asked.targets):
                raise BadRequest(
                    "targets: a hello at PROD names them"
                    if key.role == "PROD"
                    else "targets: only PROD has it, this ticket is for CONS",
                    which="targets",
                )
            living = self._living(self._settled(stream))
            if key.role == "PROD":
                targets = self._targets(asked.targets)
                for one in targets:
                    policy.admit_with_ticket(split_address(one)[0], known.networks)
                changes: dict[str, Any] = {"targets": targets}
            else:
                changes = self._with_consumers(living, [caller])
            if not self._registry.use_ticket(asked.ticket, used_for=" ".join([caller, *asked.targets])):
                raise _no_ticket()
            return self._arrived(stream, changes, by_ticket=caller)

    # --- for the doors through which others call

    def pace(self, owner: Caller) -> None:
        """Count a request of this caller, in all processes of the facility together.

        The doors for other accounts and machines do this once for each request. A call in this process is not counted:
        whoever can make one holds the state directory.

        Raises:
            RateLimited: The caller has asked as often as policy allows.
        """
        caller = _caller(owner)
        limits = self.config.policy.of(caller)
        per_min = limits.max_requests_per_min_per_caller
        if not per_min:
            return
        # linked identities are one caller, whichever of them calls; a group is many
        name = min((one for one in caller if not one.startswith(GROUP_URN)), default=caller[0])
        wait_s = self._registry.pace(name, per_min=per_min, burst=limits.request_burst_per_caller)
        if wait_s:
            limited = RateLimited(
                f"{caller[0]} asks facility {self.config.name} more than {per_min} times a minute",
                which=caller[0],
                hint=f"Ask again in {ceil(wait_s)} s, and less often",
                limit=per_min,
                retry_after_s=ceil(wait_s),
            )
            self.refused(caller, limited)
            raise limited

    def refused(self, owner: Caller | None, wrong: ScistreamError, *, key: Key | None = None) -> None:
        """Write down that somebody was refused: a caller, or None, a stranger.

        Many of one caller, or of all strangers, are not all written: the next line says how many were not. So nobody
        fills the disk, or pushes the lines of others out of the log.
        """
        caller = () if owner is None else _caller(owner)
        if self._refusals.take(caller[0] if caller else ""):
            self._unwritten += 1
            return
        unwritten, self._unwritten = self._unwritten, 0
        about: dict[str, Any] = {"code": wrong.code, "message": wrong.message, "which": wrong.which}
        if caller and key is None:
            about["owner"] = caller[0]
        elif caller and key is not None and key.owner != caller[0]:
            about["caller"] = caller[0]
        if unwritten:
            about["unwritten"] = unwritten
        try:
            self._registry.audit("deny", key, **about)
        except ScistreamError as full:  # refused it is all the same, in the same words
            log.error("a refusal (%s) is not in the audit log: %s", wrong.code, full)

    # --- administration: for who holds the state directory, not reached by `answer`

    def survey(self, *, owner: str | None = None, include_ended: bool = False) -> Listing:
        """The streams of everybody, or of one owner. A gateway that does not answer is no error, as in `list`."""
        return self._listing(
            lambda stream: owner in (None, stream.key.owner),
            include_ended=include_ended,
        )

    def evict(
        self, *, owner: str | None = None, uid: str | None = None, role: Role | None = None
    ) -> Sequence[Released]:
        """End the streams of this owner, name and role, each where given, for the reason `admin`.

        Raises:
            ScistreamError: Why the first one could not be ended; all others are. `details["left"]` names those left.
        """
        self._sweep()
        released: list[Released] = []
        failures: dict[Key, ScistreamError] = {}
        for one in self._registry.streams("opening", "open"):
            key = one.key
            if owner not in (None, key.owner) or uid not in (None, key.uid) or role not in (None, key.role):
                continue
            try:
                with self._registry.lock(key, timeout_s=LOCK_TIMEOUT_S):
                    stream = self._registry.find(key)
                    if stream is not None and stream.phase != "ended":
                        end = self._end(stream, "admin", caller=unix_owner())
                        released.append(Released(uid=key.uid, role=key.role, end=end))
            except ScistreamError as wrong:
                failures[key] = wrong
        if failures:
            first = next(iter(failures.values()))
            first.details["left"] = [key._asdict() for key in failures]
            raise first
        return released

    def drain(self, gateway: str) -> None:
        """Let a gateway take no new stream, in every process of this facility. Running ones go on.

        Raises:
            NotFound: The configuration has no such gateway.
        """
        self._set_draining(gateway, draining=True)

    def undrain(self, gateway: str) -> None:
        """Let a gateway take new streams again.

        Raises:
            NotFound: The configuration has no such gateway.
        """
        self._set_draining(gateway, draining=False)

    def _set_draining(self, gateway: str, *, draining: bool) -> None:
        names = [one.name for one in self.config.gateways]
        if gateway not in names:
            raise NotFound(
                f"facility {self.config.name} has no gateway {gateway!r}",
                which=gateway,
                hint=f"Its gateways: {', '.join(names)}",
            )
        if self._registry.drain(gateway, draining=draining):
            self._registry.audit(
                "drain" if draining else "undrain", None, owner=unix_owner(), gateway=gateway
            )

    def gateways(self, *, ask: bool = True) -> Sequence[GatewayReport]:
        """Every gateway: whether it answers, asked just now or as last heard of, and what of it is booked."""
        if ask:
            _each(partial(self._running, ask_anyway=True), [one.name for one in self.config.gateways])
            self._sweep()
        return self._reports(lambda _: True)

    def _reports(self, wanted: Callable[[StreamRow], bool]) -> Sequence[GatewayReport]:
        """Every gateway, as last heard of, with what the streams that are `wanted` have booked of it."""
        booked: dict[str, list[RelayRow]] = {}
        for stream in self._registry.streams("opening", "open"):
            for row in stream.relays if wanted(stream) else ():
                booked.setdefault(row.gateway, []).append(row)
        draining = self._registry.usage("").draining
        silent = set(self._silent)
        return [
            GatewayReport(
                name=one.name,
                kind=one.kind,
                draining=one.name in draining,
                answers=one.name not in silent,
                message=self._why_silent(one.name) if one.name in silent else None,
                streams=len(booked.get(one.name, ())),
                listeners=sum(len(row.indices) for row in booked.get(one.name, ())),
                ports=one.port_range.size if one.port_range.first else 0,
                connections=sum(row.connections for row in booked.get(one.name, ())),
                connection_budget=one.connection_budget,
                reserved_mbits_per_s=sum(row.reserved_mbits_per_s for row in booked.get(one.name, ())),
                capacity_mbits_per_s=one.capacity_mbits_per_s,
            )
            for one in self.config.gateways
        ]

    def audit(
        self, *, owner: str | None = None, uid: str | None = None, since_s: float | None = None
    ) -> Iterator[Mapping[str, Any]]:
        """The lines of the audit log, oldest first.

        Args:
            owner: Only what concerns this owner.
            uid: Only what concerns streams of this name.
            since_s: Only what happened in the last so many seconds.
        """
        earliest = _earliest(since_s)
        for line in self._registry.audit_lines():
            if _concerns(line, owner=owner, uid=uid, earliest=earliest):
                yield line

    def audit_followed(
        self,
        *,
        owner: str | None = None,
        uid: str | None = None,
        since_s: float | None = None,
        poll_s: float = 0.25,
    ) -> Iterator[Mapping[str, Any]]:
        """The lines of the audit log, and each that comes, for ever; looked for every `poll_s` seconds."""
        earliest = _earliest(since_s)
        for line in self._registry.audit_followed():
            if line is None:
                time.sleep(poll_s)
            elif _concerns(line, owner=owner, uid=uid, earliest=earliest):
                yield line

    def audit_from(self, position: int, *, most_bytes: int) -> tuple[Sequence[Mapping[str, Any]], int]:
        """The lines of the audit log from a position on, the first 0, and the position after them.

        Where the log is shorter than that, it is another one, and is read from its beginning.
        """
        return self._registry.audit_from(position, most_bytes=most_bytes)

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
        if side.is_over(reports):
            self._finish(stream, reports)
            return None
        return self._offer(stream, reports)

    def _renewed(self, stream: StreamRow, lease_s: int) -> Sequence[RelayStatus]:
        return self._asked(stream, lambda row: self._relays(row.gateway).renew(row.relay_id, lease_s=lease_s))

    def _admitted(
        self, request: Request, caller: Sequence[str]
    ) -> tuple[FacilityConfig, Mapping[str, Mapping[str, Any]]]:
        """The facility as it is for this caller, and where each gateway may lead; whatever else is in use."""
        facility = self.config.model_copy(update={"policy": self.config.policy.of(caller)})
        policy.admit_user(caller, facility, service=unix_owner())
        policy.admit(request, facility)
        onwards = self._onwards(request)
        if request.consumers:
            policy.admit_consumers(request.consumers, facility)
        return facility, onwards

    def _open(
        self,
        key: Key,
        request: Request,
        caller: Sequence[str],
        began: float,
        *,
        facility: FacilityConfig,
        onwards: Mapping[str, Mapping[str, Any]],
    ) -> Offer:
        usable = tuple(one for one in self.config.gateways if one.name in onwards)
        skipped = {name: wrong for name, (at, wrong) in self._silent.copy().items() if at >= began}
        for name, wrong in skipped.items():
            self._skip(key, name, wrong)
        while True:
            gateways = self._worth_asking(usable, request.gateways, skipped)
            if skipped and len(gateways) < request.gateways:
                raise self._too_few(request, len(gateways), skipped)
            try:
                return self._open_on(
                    facility.model_copy(update={"gateways": gateways}), key, request, onwards, caller
                )
            except (GatewayUnreachable, PortsExhausted) as wrong:
                # what the placement refuses is final; a gateway that refuses may have a port taken by others
                if wrong.which not in [one.name for one in gateways] or "free" in wrong.details:
                    raise self._with_the_rest(wrong, gateways, skipped) from None
                if isinstance(wrong, GatewayUnreachable):
                    self._silent[wrong.which] = (time.monotonic(), wrong)
                skipped[wrong.which] = wrong
                self._skip(key, wrong.which, wrong)
            except CapacityExhausted as full:
                raise self._with_the_rest(full, gateways, skipped) from None

    def _with_the_rest(
        self,
        wrong: ScistreamError,
        asked: Sequence[GatewayConfig],
        skipped: Mapping[str, ScistreamError],
    ) -> ScistreamError:
        """The same error, whose hint names the gateways that were not asked, and why."""
        names = [one.name for one in asked]
        for one in self.config.gateways:
            if one.name not in names:
                _, silent = self._silent.get(one.name, (0, None))
                why = skipped.get(one.name, silent)
                words = why.message if why else "it cannot dial the other facility, or may not"
                wrong.hint += f"; not asked: gateway {one.name}, {words}"
        return wrong

    def _too_few(self, request: Request, left: int, skipped: Mapping[str, ScistreamError]) -> ScistreamError:
        first = next(iter(skipped.values()))
        if request.gateways == len(skipped) == 1:
            return first
        of = f"gateway of facility {self.config.name} can be used"
        kind = (
            PortsExhausted
            if all(isinstance(one, PortsExhausted) for one in skipped.values())
            else GatewayUnreachable
        )
        return kind(
            (f"no {of}: " if not left else f"{request.gateways} gateways were asked for, only {left} {of}: ")
            + "; ".join(wrong.message for wrong in skipped.values()),
            which=self.config.name,
            hint=first.hint,
            gateways={name: wrong.message for name, wrong in skipped.items()},
        )

    def _skip(self, key: Key, gateway: str, wrong: ScistreamError) -> None:
        log.warning("stream %s (%s): gateway %s is skipped: %s", key.uid, key.role, gateway, wrong.message)
        self._registry.audit("skip", key, gateway=gateway, message=wrong.message)

    def _worth_asking(
        self, usable: Sequence[GatewayConfig], count: int, skipped: Mapping[str, object]
    ) -> Sequence[GatewayConfig]:
        """The gateways not skipped; of these only such that did not fail lately, as long as there are enough."""
        left = tuple(one for one in usable if one.name not in skipped)
        fresh = tuple(one for one in left if not self._silent_lately(one.name))
        if len(fresh) == len(left):
            return left
        draining = self._registry.usage("").draining
        return fresh if sum(one.name not in draining for one in fresh) >= count else left

    def _silent_lately(self, gateway: str) -> bool:
        at, _ = self._silent.get(gateway, (None, None))
        return at is not None and time.monotonic() - at < GATEWAY_RETRY_S

    def _why_silent(self, gateway: str) -> str:
        _, wrong = self._silent.get(gateway, (0, None))
        return "it does not answer" if wrong is None else wrong.message

    def _open_on(
        self,
        facility: FacilityConfig,
        key: Key,
        request: Request,
        onwards: Mapping[str, Mapping[str, Any]],
        caller: Sequence[str],
    ) -> Offer:
        def place(usage: Usage) -> Sequence[RelayRow]:
            return [
                RelayRow(
                    relay_id=secrets.token_hex(16),
                    gateway=share.gateway,
                    indices=share.indices,
                    connections=share.connections,
                    reserved_mbits_per_s=share.reserved_mbits_per_s,
                )
                for share in policy.place(request, facility, usage)
            ]

        _step("opening", key)
        stream = self._registry.claim(key, request, place, identities=caller)
        try:
            _step("claimed", key)
            reports = _each(lambda row: self._start(row, stream, onwards[row.gateway]), stream.relays)
            _step("started", key)
            offer = self._offer(stream, reports)
            self._registry.audit(
                "open",
                key,
                mode=request.mode,
                relays=[row.relay_id for row in stream.relays],
                gateways=[row.gateway for row in stream.relays],
                listeners=offer.addresses,
                sources=self._sources(request),
                **onwards[stream.relays[0].gateway],
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
        addresses = gateway.config.listen_addresses(request.role)
        ready = gateway.relays.start(
            {
                "protocol": PROTOCOL,
                "relay_id": row.relay_id,
                "role": request.role,
                "mode": request.mode,
                "listen": {
                    **({"address": addresses[0]} if len(addresses) == 1 else {"addresses": addresses}),
                    "first_port": gateway.config.port_range.first,
                    "last_port": gateway.config.port_range.last,
                    "indices": row.indices,
                },
                "sources": list(self._sources(request)),
                "onward_source": route.source(gateway.config.onward_sources(request.role), onwards),
                "probe": request.probe,
                "until": request.until,
                "max_connections": request.max_connections,
                "rate_mbits_per_s": _share_of_rate(request.rate_mbits_per_s, row, request),
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

    def _sources(self, request: Request) -> Sequence[str]:
        """Who may connect at the LAN listeners of CONS; PROD has none."""
        if request.role == "PROD":
            return ()
        return request.consumers or policy.default_consumers(self.config)

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

    def _onwards(self, request: Request) -> Mapping[str, Mapping[str, Any]]:
        """Where the relay of each gateway connects to, resolved and admitted: the relay gets numbers.

        A gateway is left out that has no address of an IP version in which PROD listens, as long as another one has, or
        that may not dial what it would.
        """
        gateways = self.config.gateways
        if request.role == "PROD":
            targets = self._targets(request.targets)
            return {one.name: {"targets": targets, "peers": []} for one in gateways}
        offer = request.offer
        if offer is None:
            raise BadRequest("offer: a CONS request needs the offer of PROD", which=request.uid)
        onwards, denied = {}, None
        for gateway in [one for one in gateways if route.can_dial(one, offer)] or gateways:
            peers = route.peers(offer, gateway)
            try:
                for address in route.dialled(peers):
                    policy.admit_address(address, kind="peers", facility=self.config)
                onwards[gateway.name] = {"targets": [], "peers": peers}
            except PolicyDenied as wrong:
                denied = denied or wrong
        if denied is not None and not onwards:
            raise denied
        return onwards

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
        lease_s = min(report.lease_remaining_s or 0 for report in reports if not report.ended)
        if (
            stream.offer is not None
        ):  # of several relays one may have ended, and say no more where it listened
            return stream.offer.model_copy(update={"lease_remaining_s": lease_s})
        relays = []
        for row, report in zip(stream.relays, reports, strict=True):
            config = self._gateway(row.gateway).config
            relays.append(
                OfferedRelay(
                    data_server=self.config.data_server,
                    relay_id=row.relay_id,
                    gateway=row.gateway,
                    public_key=report.public_key or "",
                    dial_addresses=list(route.dial_addresses(config, request)),
                    listeners=route.advertised(config, request.role, report.listeners),
                )
            )
        return Offer(
            uid=request.uid,
            role=request.role,
            mode=request.mode,
            dial=request.dial,
            lease_remaining_s=lease_s,
            relays=relays,
        )

    def _with_consumers(self, living: Sequence[RelayStatus], asked: Sequence[str]) -> dict[str, Any]:
        """The sources at the LAN listeners, with those that are asked for."""
        policy.admit_consumers(asked, self.config)
        known = [source for relay in living for source in relay.sources]
        return {"sources": list(dict.fromkeys([*known, *asked]))}

    def _arrived(self, stream: StreamRow, changes: Mapping[str, Any], **about: Any) -> Offer:
        reports = self._change(stream, lambda _: changes)
        self._registry.audit("hello", stream.key, **changes, **about)
        return self._offer(stream, reports)

    def _change(
        self, stream: StreamRow, changes: Callable[[RelayRow], Mapping[str, Any]]
    ) -> Sequence[RelayStatus]:
        return self._asked(stream, lambda row: self._relays(row.gateway).update(row.relay_id, changes(row)))

    # --- finding

    def _find(
        self,
        uid: str,
        role: Role,
        stream_owner: str | None,
        owner: Caller | None,
        right: Right,
        *,
        administrators: bool = False,
    ) -> StreamRow:
        """The stream of this name for this caller; where `administrators`, one of these may name any owner."""
        caller = _caller(owner)
        named = [one for one in self._registry.named(uid, role) if stream_owner in (None, one.key.owner)]
        if administrators and named and stream_owner and self.administers(caller):
            return named[0]
        visible = [one for one in named if _may("monitor", one, caller)]
        mine = [one for one in visible if one.key.owner in caller] or visible
        if not mine:
            unknown = not_found(uid, role)
            # the same for one that is not there and one that is somebody else's
            self.refused(caller, unknown, key=Key(caller[0], uid, role))
            raise unknown
        if len(mine) > 1:
            raise Conflict(
                f"{len(mine)} owners share a stream {uid!r} ({role}) with this caller",
                which=uid,
                hint="Name one in the field owner",
                owners=sorted(one.key.owner for one in mine),
            )
        if not _may(right, mine[0], caller):
            denied = PolicyDenied(
                f"this caller may monitor stream {uid!r} ({role}), not manage it",
                which=uid,
                hint="Ask its owner to name you in managers",
            )
            self.refused(caller, denied, key=mine[0].key)
            raise denied
        return mine[0]

    @contextlib.contextmanager
    def _managed(
        self,
        uid: str,
        role: Role,
        stream_owner: str | None,
        owner: Caller | None,
        *,
        administrators: bool = False,
        settle: bool = True,
    ) -> Iterator[StreamRow]:
        """A stream the caller may manage, locked; by default brought into line with its relays."""
        key = self._find(uid, role, stream_owner, owner, right="manage", administrators=administrators).key
        with self._registry.lock(key, timeout_s=LOCK_TIMEOUT_S):
            stream = self._registry.find(key)
            if stream is None:
                raise not_found(uid, role)
            with self._denials_audited(key, owner):
                yield self._settled(stream) if settle else stream

    @contextlib.contextmanager
    def _denials_audited(self, key: Key, owner: Caller | None) -> Iterator[None]:
        """A stranger with a ticket is nobody's: its refusals count as those of the stream's owner."""
        try:
            yield
        except (PolicyDenied, CapacityExhausted) as denied:
            self.refused(key.owner if owner is None else owner, denied, key=key)
            raise

    def _living(self, stream: StreamRow) -> Sequence[RelayStatus]:
        """The reports of the relays of a stream that has not ended. The caller holds its lock."""
        reports = self._asked(stream)
        if side.is_over(reports):
            stream = self._finish(stream, reports)
        if stream.phase == "ended":
            end = side.status(stream, stream.ended)
            raise NotFound(
                f"stream {stream.key.uid!r} ({stream.key.role}) has ended: {end.reason}",
                which=stream.key.uid,
                hint="Request it again",
                reason=end.reason,
            )
        return reports

    # --- listing

    def _listing(self, wanted: Callable[[StreamRow], bool], *, include_ended: bool) -> Listing:
        self._sweep()
        streams = self._registry.streams("opening", "open", *(("ended",) if include_ended else ()))
        reports = _each(self._surveyed, [stream for stream in streams if wanted(stream)])
        # a stream whose release did not reach a gateway is there still, as long as a relay may run
        living = [one for one in reports if not one.ended or any(map(side.is_unheard, one.relays))]
        return Listing(facility=self.config.name, streams=reports if include_ended else living)

    def _surveyed(self, stream: StreamRow) -> Status:
        """The status of a stream; of one that cannot be asked, what is known."""
        reports: Sequence[RelayStatus] = ()
        try:
            if stream.phase == "open":
                reports = _each(partial(self._ask_if_it_answers, stream), stream.relays)
                if any(map(side.is_unheard, reports)):
                    return side.status(stream, self._named(stream, reports))
            return self._report(stream, reports)
        except (RelayError, ProtocolMismatch) as wrong:
            return side.status(stream, reports).model_copy(update={"message": wrong.message})
        except NotFound as gone:  # released meanwhile, and its name used again
            return side.status(stream, ()).model_copy(update={"state": "ENDED", "message": gone.message})

    def _ask_if_it_answers(self, stream: StreamRow, row: RelayRow) -> RelayStatus:
        message = self._why_silent(row.gateway)
        if not self._silent_lately(row.gateway):
            try:
                return self._ask(stream, row)
            except (RelayError, ProtocolMismatch) as wrong:
                if isinstance(wrong, GatewayUnreachable):
                    self._silent[row.gateway] = (time.monotonic(), wrong)
                message = wrong.message
        return side.unheard(stream, row, message)

    # --- keeping the registry in line

    def _sweep(self, *, at_most_every_s: float = 0, since: float | None = None) -> bool:
        """Compare what runs with what is written down: end what is gone, stop what nobody asked for.

        Answers whether it was done: not again within `at_most_every_s`, nor while another thread is at it. With
        `since`, a moment of the monotonic clock, it waits for that thread; what began after that moment is enough.
        """
        if time.monotonic() - self._swept_at < at_most_every_s:
            return False
        if not self._sweeping.acquire(timeout=0 if since is None else LOCK_TIMEOUT_S):
            return False
        try:
            if since is not None and self._swept_at > since:
                return True
            self._swept_at = time.monotonic()
            # First what runs, then what is written: each relay was written down before it started, so one that runs
            # and is not written down, or not any more, is nobody's.
            running = self._running_everywhere()
            written = self._registry.relays()
            for name, relays in running.items():
                for relay_id, alive in (relays or {}).items():
                    if relay_id not in written:
                        self._clear_away(name, relay_id, alive=alive)
            due: dict[tuple[Key, int], None] = {}  # a stream may have many relays that are gone
            for relay_id, row in written.items():
                there = running.get(row.gateway)
                gone = there is not None and not there.get(relay_id)
                if row.phase == "opening" or row.outlived or gone:
                    due[row.key, row.stream] = None
            for key, number in due:
                # Who waits for room gives whoever is just ending a stream the time for it. Two that hold a stream
                # each and want the other's wait no longer than this.
                self._settle_if_free(key, number, patience_s=0 if since is None else 1)
        finally:
            self._sweeping.release()
        return True

    def _settle_if_free(self, key: Key, number: int, *, patience_s: float) -> None:
        with self._registry.lock_if_free(key, patience_s=patience_s) as held:
            now = self._registry.find(key) if held else None
            if now is None or now.id != number:
                return
            try:
                self._settled(now)
            except (RelayError, ProtocolMismatch) as wrong:
                log.warning("stream %s (%s) left as it is: %s", key.uid, key.role, wrong)

    def _running_everywhere(self) -> Mapping[str, dict[str, bool] | None]:
        names = list(self._gateways)  # one that does not answer keeps the others waiting once
        return dict(zip(names, _each(self._running, names), strict=True))

    def _running(self, gateway: str, *, ask_anyway: bool = False) -> dict[str, bool] | None:
        if not ask_anyway and self._silent_lately(gateway):
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
            # A relay that has ended meanwhile, because its stream was released, answers why it did.
            if alive and relays.stop(relay_id, reason="admin").reason == "admin":
                log.warning("stopped relay %s on gateway %s: no stream has it", relay_id, gateway)
            relays.forget(relay_id)
        except (RelayError, NotFound, ProtocolMismatch) as wrong:
            log.debug("relay %s on gateway %s: %s", relay_id, gateway, wrong)

    def _settled(self, stream: StreamRow) -> StreamRow:
        """The stream brought into line with its relays. The caller holds its lock."""
        if stream.phase == "ended":
            return stream
        reports = _each(partial(self._ask, stream), stream.relays)
        if side.is_over(reports):
            return self._finish(stream, reports)
        if stream.phase == "opening":
            self._registry.opened(stream, self._offer(stream, reports))
            self._registry.audit(
                "open", stream.key, adopted=True, relays=[row.relay_id for row in stream.relays]
            )
            return self._registry.find(stream.key) or stream
        return stream

    def _asked(
        self, stream: StreamRow, ask: Callable[[RelayRow], RelayStatus] | None = None
    ) -> Sequence[RelayStatus]:
        """What the relays of an open stream say, or answer to `ask`; of any other, nothing."""
        return _each(partial(self._ask, stream, ask=ask), stream.relays) if stream.phase == "open" else ()

    def _report(self, stream: StreamRow, reports: Sequence[RelayStatus]) -> Status:
        """The status of a stream whose relays have said this; one that is over is closed."""
        if reports and not side.is_over(reports):
            return side.status(stream, self._named(stream, reports))
        if stream.phase != "ended":
            with self._registry.lock_if_free(stream.key) as held:
                now = self._registry.find(stream.key)
                if now is None:
                    raise not_found(stream.key.uid, stream.key.role)
                stream = self._settled(now) if held else now
            if stream.phase != "ended":  # another one holds it: opens it, or is just closing it
                reports = self._asked(stream)
                now = self._registry.find(stream.key)
                stream = now if now is not None and now.id == stream.id else stream
        if stream.phase == "ended":
            return side.status(stream, stream.ended)
        return side.status(stream, self._named(stream, side.finished_together(reports, reports)))

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
            return _again_if_cut_off(lambda: self._relays(row.gateway).status(row.relay_id))
        except (RelayLost, NotFound) as gone:
            return side.lost(stream, row, gone)
        except GatewayUnreachable as silent:
            if not stream.outlived:
                raise
            return side.lost(stream, row, silent)

    def _stop(self, stream: StreamRow, row: RelayRow, reason: Literal["released", "admin"]) -> RelayStatus:
        try:
            return _again_if_cut_off(lambda: self._relays(row.gateway).stop(row.relay_id, reason=reason))
        except (RelayLost, NotFound) as gone:
            return side.lost(stream, row, gone)

    def _finish(self, stream: StreamRow, reports: Sequence[RelayStatus]) -> StreamRow:
        """Close a side that is over: of several relays, stop those that still run."""
        pairs = [*zip(stream.relays, reports, strict=True)]
        ends = _each(lambda pair: pair[1] if pair[1].ended else self._stop(stream, pair[0], "admin"), pairs)
        return self._close(stream, side.finished_together(reports, ends))

    def _end(self, stream: StreamRow, reason: Literal["released", "admin"], *, caller: str) -> Status:
        """Stop a stream's relays and close it, unless it is closed; answers the end. The caller holds its lock."""
        with contextlib.suppress(RelayError, ProtocolMismatch):  # what can be reached is stopped all the same
            stream = self._settled(stream)
        if stream.phase != "ended":
            ends = _each(lambda row: self._stop(stream, row, reason), stream.relays)
            stream = self._close(stream, ends, caller=caller)
        return side.status(stream, stream.ended)

    def _close(
        self, stream: StreamRow, ends: Sequence[RelayStatus], *, caller: str | None = None
    ) -> StreamRow:
        """Write the end, then let the relays' logs go: never the other way round."""
        _step("stopped", stream.key)
        self._registry.ended(stream, self._named(stream, ends))
        _step("ended", stream.key)
        _each(self._forget, stream.relays)
        _step("forgotten", stream.key)
        closed = self._registry.find(stream.key) or stream
        end = side.status(closed, closed.ended)
        with contextlib.suppress(ScistreamError):
            by = {} if caller in (None, stream.key.owner) else {"caller": caller}
            self._registry.audit(
                "close",
                stream.key,
                **by,
                relays=[row.relay_id for row in stream.relays],
                state=end.state,
                reason=end.reason,
                bytes=end.bytes.model_dump(),
                **_duration(closed),
                **_ends(closed),
            )
        return closed

    def _forget(self, row: RelayRow) -> None:
        # what stays on a gateway that does not answer, a later sweep removes
        with contextlib.suppress(RelayError, NotFound):
            self._relays(row.gateway).forget(row.relay_id)

    def _named(self, stream: StreamRow, reports: Sequence[RelayStatus]) -> Sequence[RelayStatus]:
        pairs = zip(stream.relays, reports, strict=bool(reports))  # none at all while it is being opened
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


def _earliest(since_s: float | None) -> str:
    return "" if since_s is None else said_at(max(0.0, time.time() - since_s))


def _concerns(line: Mapping[str, Any], *, owner: str | None, uid: str | None, earliest: str) -> bool:
    return (
        owner in (None, line.get("owner"))
        and uid in (None, line.get("uid"))
        and str(line.get("at", "")) >= earliest
    )


def _no_ticket() -> Unauthenticated:
    """The one answer for a ticket that never was, has expired, or was used."""
    return Unauthenticated(
        "this ticket is not known, has expired, or was used",
        which="ticket",
        hint="Each is for one hello; ask for another with the verb ticket",
    )


def _may(right: Right, stream: StreamRow, caller: Sequence[str]) -> bool:
    request = stream.request
    return policy.allows(
        right, owner=stream.key.owner, managers=request.managers, monitors=request.monitors, caller=caller
    )


def _duration(stream: StreamRow) -> dict[str, float]:
    """How long a stream was there, seconds: by the clock, which may have been set meanwhile."""
    return (
        {}
        if stream.claimed_at is None
        else {"duration_s": round(max(0.0, time.time() - stream.claimed_at), 3)}
    )


def _ends(stream: StreamRow) -> dict[str, Sequence[str]]:
    """Between which addresses a stream was: where it listened, and what it was asked to connect to."""
    request = stream.request
    dialled = [
        one.address for relay in (request.offer.relays if request.offer else ()) for one in relay.listeners
    ]
    lists = {
        "listeners": stream.offer.addresses if stream.offer else (),
        "targets": request.targets,
        "peers": dialled,
    }
    return {name: some for name, some in lists.items() if some}


def _reserved(request: Request) -> int:
    return request.rate_mbits_per_s if request.reserve_rate else 0


def _with_share(changes: Mapping[str, Any], row: RelayRow, request: Request) -> Mapping[str, Any]:
    """The changes for one relay of a stream: of the rate, its share."""
    if "rate_mbits_per_s" not in changes:
        return changes
    return {**changes, "rate_mbits_per_s": _share_of_rate(changes["rate_mbits_per_s"], row, request)}


def _share_of_rate(rate_mbits_per_s: int, row: RelayRow, request: Request) -> int:
    return policy.share_of_rate(
        rate_mbits_per_s, row.indices, num_conn=request.num_conn, gateways=request.gateways
    )


def _again_if_cut_off(ask: Callable[[], T]) -> T:
    """What a relay says; one that ended in the middle of its answer is asked once more: now it is gone, or says how."""
    try:
        return ask()
    except RelayError as wrong:
        if wrong.details.get("cause") != "io":
            raise
    return ask()


def _each(ask: Callable[[A], T], things: Sequence[A]) -> list[T]:
    """What `ask` answers for each, asked AT_ONCE at a time. All have been asked to the end when one raises."""
    if len(things) < 2:
        return [ask(one) for one in things]
    with ThreadPoolExecutor(min(len(things), AT_ONCE), thread_name_prefix="gateway") as pool:
        futures = [pool.submit(ask, one) for one in things]
    return [future.result() for future in futures]


def _step(name: str, key: Key) -> None:
    log.debug("%s %s (%s)", name, key.uid, key.role)
