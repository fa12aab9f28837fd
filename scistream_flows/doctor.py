"""What stands in the way of a facility's streams, and the exact change that clears it away.

Facts come from the nodes themselves (`s2ds inspect`); what they mean, `diagnosis` decides. Nothing is changed, and
nothing is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import secrets
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import filterfalse
from pathlib import Path
from typing import Any, Final, NamedTuple

from scistream_flows import doorway
from scistream_flows.config import FacilityConfig, Policy
from scistream_flows.diagnosis import (
    ADDRESS_KEYS,
    Case,
    Finding,
    another_directory,
    edit,
    judge,
    judge_state,
)
from scistream_flows.errors import (
    PROTOCOL,
    ConfigError,
    FacilityUnreachable,
    HostKeyRejected,
    NotFound,
    RelayError,
    ScistreamError,
)
from scistream_flows.facility import Facility, LocalFacility, connect_facility
from scistream_flows.gateway import Gateway, connect_gateway
from scistream_flows.haproxy import find_haproxy
from scistream_flows.models import (
    Peer,
    Probe,
    Release,
    Request,
    Role,
    StatusQuery,
    Update,
    read,
    split_address,
)
from scistream_flows.registry import file_system_of
from scistream_flows.relay import DirectoryFacts, FileSystem, NodeFacts
from scistream_flows.s2cs import S2CS

REACH_TIMEOUT_S: Final = 20.0
SETTLE_S: Final = 2.0
SOCKET_TIMEOUT_S: Final = 10.0

# --- gathering


def examine(
    config: FacilityConfig,
    *,
    gateways: Sequence[str] = (),
    rate_mbits_per_s: int | None = None,
    rtt_s: float | None = None,
    peer: str | Facility | None = None,
    service: S2CS | None = None,
) -> Iterator[Finding]:
    """Look at a facility: its configuration, its state, each gateway, and on request the way to another facility.

    Args:
        config: The facility.
        gateways: Their names; by default all.
        rate_mbits_per_s: What a stream is to carry; by default the gateway's capacity.
        rtt_s: The round trip to the other facility, seconds.
        peer: Another facility. For each gateway here, in both directions, a stream is opened that is proven up to the
            far relay and released at once.
        service: The service of the facility, where one runs in this process: it knows what is draining.

    Yields:
        Findings, as soon as they are known. A gateway that does not answer is one of them.

    Raises:
        NotFound: A gateway of this name is not configured.
    """
    unknown = [name for name in gateways if name not in [one.name for one in config.gateways]]
    if unknown:
        raise NotFound(
            f"facility {config.name} has no gateway {unknown[0]!r}",
            which=unknown[0],
            hint=f"Its gateways: {', '.join(one.name for one in config.gateways)}",
        )
    yield from _configuration(config)
    yield from _secret(config)
    yield from _socket(config)
    yield from _data_server(config)
    yield from judge_state(_directory_here(config.state_dir), uid=os.geteuid())
    if service is not None:
        yield from _draining(service)
    with tempfile.TemporaryDirectory(prefix="scistream-doctor-") as place:
        # what is opened for the proof belongs to a facility of its own, so that it can be on this gateway and no other
        for one in config.gateways:
            if gateways and one.name not in gateways:
                continue
            alone = config.model_copy(
                update={
                    "gateways": (one,),
                    "state_dir": Path(place) / one.name,
                    "policy": config.policy.model_copy(update={"users": None}),
                }
            )
            alone.state_dir.mkdir(mode=0o700)
            yield from _examine_gateway(config, alone, rate_mbits_per_s, rtt_s, peer)


def _examine_gateway(
    config: FacilityConfig,
    alone: FacilityConfig,
    rate_mbits_per_s: int | None,
    rtt_s: float | None,
    peer: str | Facility | None,
) -> Iterator[Finding]:
    (one,) = alone.gateways
    gateway: Gateway | None = None
    try:
        gateway = connect_gateway(one, state_dir=alone.state_dir)
        case, round_trip_s = _ask(gateway, config, rate_mbits_per_s, rtt_s)
        facts = case.facts
        yield case.finding(
            "gateway",
            "ok",
            f"answers in {round_trip_s * 1000:.0f} ms: s2ds {facts.version} (protocol {facts.protocol}) on "
            f"{facts.host}, {facts.architecture}, user {facts.user or facts.uid}",
        )
        yield from judge(case)
        if peer is not None and config.data_server == "haproxy":
            yield case.finding(
                "reach", "note", "HAProxy sends no probe: only data shows whether a peer is reached"
            )
        elif peer is not None:
            yield from _reach(gateway, alone, case, peer)
    except ScistreamError as wrong:
        refusal = _refusal("gateway", wrong, one.name)
        if type(wrong) is RelayError and one.s2ds is None and wrong.details.get("cause") != "architecture":
            # what was copied there cannot be kept or run
            refusal = refusal.model_copy(update={"fix": another_directory(one, config)})
        yield refusal
    finally:
        if gateway is not None:
            gateway.close()


def _ask(
    gateway: Gateway, config: FacilityConfig, rate_mbits_per_s: int | None, rtt_s: float | None
) -> tuple[Case, float]:
    one = gateway.config
    relays = gateway.relays  # connected, and the binary copied, before the clock is looked at
    request = {
        "addresses": list(dict.fromkeys(ip for key in ADDRESS_KEYS for ip in getattr(one, key))),
        "first_port": one.port_range.first,
        "last_port": one.port_range.last,
        # after that of the relays which are started for the proof
        "directories": [str(config.state_dir / "relays")] if one.kind == "local" else [],
    }
    began_ns, began = time.time_ns(), time.monotonic()
    facts = relays.inspect(request)
    elapsed_s = time.monotonic() - began
    case = Case(
        facts=facts,
        gateway=one,
        config=config,
        rate_mbits_per_s=rate_mbits_per_s or one.capacity_mbits_per_s,
        rtt_s=rtt_s,
        clock_offset_s=clock_offset_s(facts, began_ns=began_ns, elapsed_s=elapsed_s),
        relay_dir=facts.directories[-1].path if facts.directories else "",
    )
    return case, elapsed_s - facts.took_s


def clock_offset_s(facts: NodeFacts, *, began_ns: int, elapsed_s: float) -> float:
    """By how much a node's clock is ahead of ours at least, negative when it is behind; 0 when they may agree.

    It was read some time between our question and its answer, less the time that the node has worked after reading it.
    """
    most_s = (facts.at_ns - began_ns) / 1e9
    least_s = most_s - max(0.0, elapsed_s - facts.took_s)
    return most_s if most_s < 0 else max(0.0, least_s)


def _configuration(config: FacilityConfig) -> Iterator[Finding]:
    if config.file is None:
        yield Finding(
            check="configuration",
            level="note",
            message=f"no file names facility {config.name}: it is a development facility, on loopback only",
            fix=f"s2cs init --facility {shlex.quote(config.name)}",
        )
        return
    yield Finding(check="configuration", level="ok", message=f"{config.file} is understood")
    for key, words in (
        ("targets", "PROD may connect to no application"),
        ("peers", "CONS may dial no other facility"),
        ("consumers", "no application may connect to CONS"),
    ):
        if not getattr(config.policy, key):
            yield Finding(
                check="policy",
                level="note",
                message=f"policy.{key} is empty: {words}",
                fix=edit(config, "under [policy]", **{key: ["NETWORK/LENGTH"]}),
            )


def _secret(config: FacilityConfig) -> Iterator[Finding]:
    """The file with the secret of the facility's client; its content is not looked at."""
    if config.globus is None or config.globus.client_secret_file is None:
        return
    path = Path(config.globus.client_secret_file).expanduser()
    quoted = shlex.quote(str(path))
    try:
        about = path.stat()
    except OSError as wrong:
        name = errno.errorcode.get(wrong.errno or 0, "EIO")
        message = f"globus.client_secret_file {path} cannot be read ({name})"
        yield Finding(
            check="secret", level="problem", message=message, fix=f"install -m 0600 /dev/stdin {quoted}"
        )
        return
    if about.st_uid not in (os.geteuid(), 0) or about.st_mode & 0o077:
        whose = f"uid {about.st_uid}, mode {about.st_mode & 0o777:o}"
        yield Finding(
            check="secret",
            level="problem",
            message=f"globus.client_secret_file {path} is not of this user alone ({whose})",
            fix=f"chown {os.geteuid()} {quoted} && chmod 0600 {quoted}",
        )
        return
    yield Finding(check="secret", level="ok", message=f"{path} is for this user alone")


def _socket(config: FacilityConfig) -> Iterator[Finding]:
    """The socket at which the service serves the accounts of this machine: who may write beside it, and who answers."""
    if config.service.socket is None:
        return
    path = Path(config.service.socket)
    for name in filterfalse(_is_account, config.service.accounts):
        yield Finding(
            check="accounts",
            level="warning",
            message=f"service.accounts names {name}, which is no account of this machine",
            fix=f"in {config.file}, under [service.accounts]: take {name} out, or make the account",
        )
    try:
        doorway.ask(path, "list", {"protocol": PROTOCOL}, deadline_s=SOCKET_TIMEOUT_S)
    except ConfigError as wrong:
        yield Finding(
            check="socket", level="problem", message=wrong.message, fix=wrong.hint.partition(",")[0]
        )
    except FacilityUnreachable as wrong:
        service = f"s2cs --config {shlex.quote(str(config.file))}"
        yield Finding(check="socket", level="warning", message=wrong.message, fix=service)
    except ScistreamError as wrong:
        yield _refusal("socket", wrong, None)
    else:
        yield Finding(check="socket", level="ok", message=f"the service answers at {path}")


def _data_server(config: FacilityConfig) -> Iterator[Finding]:
    """HAProxy, where it is run in the place of our relay."""
    if config.data_server == "haproxy":
        try:
            found = find_haproxy()
        except RelayError as missing:
            yield _refusal("data-server", missing, None)
        else:
            yield Finding(check="data-server", level="ok", message=f"{found} carries the data")


def _is_account(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _draining(service: S2CS) -> Iterator[Finding]:
    try:
        reports = service.gateways()
    except ScistreamError as wrong:
        yield _refusal("state", wrong, None)
        return
    for report in reports:
        if report.draining:
            yield Finding(
                check="draining",
                level="note",
                gateway=report.name,
                message="takes no new stream, somebody drains it",
                fix=f"s2cs gateway undrain {shlex.quote(report.name)}",
            )


def _directory_here(path: Path) -> DirectoryFacts:
    """The facts about a directory of this machine, seen by this process."""
    about, wrong = _looked_at(path)
    existing = next(one for one in (path, *path.parents) if _looked_at(one)[0])
    if wrong == "ENOENT" and not os.access(existing, os.W_OK):
        wrong = "EACCES"
    volume = os.statvfs(existing)
    return DirectoryFacts(
        path=str(path),
        errno=wrong,
        mode=about.st_mode & 0o7777 if about else None,
        uid=about.st_uid if about else None,
        file_system=FileSystem(type=file_system_of(existing)),
        free_bytes=volume.f_bavail * volume.f_frsize,
        free_files=volume.f_favail if volume.f_files else None,
        read_only=bool(volume.f_flag & os.ST_RDONLY),
        noexec=bool(volume.f_flag & os.ST_NOEXEC),
    )


def _looked_at(path: Path) -> tuple[os.stat_result | None, str | None]:
    try:
        return path.stat(), None
    except OSError as wrong:  # Path.exists would raise where a folder above may not be looked into
        return None, errno.errorcode.get(wrong.errno or 0, "EIO")


def _refusal(check: str, wrong: ScistreamError, gateway: str | None) -> Finding:
    fix = wrong.details.get("command") if isinstance(wrong, HostKeyRejected) else None
    return Finding(
        check=check, level="problem", gateway=gateway, message=wrong.message, fix=fix or wrong.hint or None
    )


# --- the way to another facility


class Attempt(NamedTuple):
    """How far a throw-away stream came.

    Attributes:
        probe: What the dialling relay said last; None when it has not dialled yet.
        listener: Where the listening relay listened.
        producer: The gateway of the relay that listened.
        consumer: The gateway of the relay that dialled.
        dial_addresses: Where the listening side expected it to come from.
    """

    probe: Probe | None
    listener: str
    producer: str
    consumer: str
    dial_addresses: Sequence[str]

    @property
    def arrived(self) -> bool:
        """Whether the relays have proven themselves to each other. The listening one has no target, and says so."""
        probe = self.probe
        return probe is not None and (
            probe.result == "ok" or (probe.result == "not-ready" and probe.errno is None)
        )


def _reach(gateway: Gateway, alone: FacilityConfig, case: Case, peer: str | Facility) -> Iterator[Finding]:
    with contextlib.ExitStack() as closing:
        try:
            there = connect_facility(peer) if isinstance(peer, str) else peer
        except ScistreamError as wrong:
            yield _refusal("peer", wrong, None)
            return
        if isinstance(peer, str):
            closing.callback(there.close)
        if gateway.config.kind == "ssh" and case.relay_dir:
            # ours alone, and empty by then
            closing.callback(lambda: gateway.run(["rmdir", case.relay_dir], timeout_s=10))
        here = LocalFacility(S2CS(alone, gateways={gateway.config.name: gateway}))
        closing.callback(here.close)
        for inward in (True, False):
            prod, cons = (here, there) if inward else (there, here)
            try:
                attempt = _attempt(prod, cons, alone.policy)
            except ScistreamError as wrong:
                direction = f"from {there.name} to here" if inward else f"from here to {there.name}"
                yield case.finding("reach", "problem", f"{direction}: {wrong.message}", wrong.hint or None)
            else:
                yield judge_attempt(case, attempt, far=there.name, inward=inward)


def _attempt(prod: Facility, cons: Facility, policy: Policy) -> Attempt:
    """Open a stream without a target, wait until its relays have met or do not meet, and release it."""
    uid = f"doctor-{secrets.token_hex(8)}"
    common: Mapping[str, Any] = {
        "protocol": 1,
        "uid": uid,
        "mode": policy.modes[0],
        "lease_s": min(30, policy.longest_lease_s),
        "lifetime_s": min(60, policy.longest_lifetime_s),
        "hello_timeout_s": min(60, policy.longest_hello_timeout_s),
        "until": "released",
        "probe": "path",
        "max_connections": 1,
    }
    opened: dict[Role, Facility] = {}
    try:
        opened["PROD"] = prod
        offer = prod.request(read(Request, {**common, "role": "PROD"}))
        opened["CONS"] = cons
        answer = cons.request(
            read(Request, {**common, "role": "CONS", "offer": offer.model_dump(mode="json")})
        )
        peers = [
            Peer(public_key=one.public_key, source_addresses=one.dial_addresses) for one in answer.relays
        ]
        prod.update(Update(uid=uid, role="PROD", peers=peers))
        began = time.monotonic()
        while True:
            attempt = Attempt(
                cons.status(StatusQuery(uid=uid, role="CONS")).last_probe,
                offer.relays[0].listeners[0].address,
                offer.relays[0].gateway,
                answer.relays[0].gateway,
                answer.relays[0].dial_addresses,
            )
            waited_s = time.monotonic() - began
            settled = attempt.probe is not None and attempt.probe.result in _FINAL and waited_s >= SETTLE_S
            if attempt.arrived or settled or waited_s >= REACH_TIMEOUT_S:
                return attempt
            time.sleep(0.1)
    finally:
        for role, facility in opened.items():
            _release(facility, uid, role)


_FINAL: Final = ("timeout", "refused", "no-route", "peer-rejected", "denied", "protocol")


def _release(facility: Facility, uid: str, role: Role) -> None:
    try:
        facility.release(Release(uid=uid, role=role))
    except ScistreamError:
        return  # its lease is short


def judge_attempt(case: Case, attempt: Attempt, *, far: str, inward: bool) -> Finding:
    """What it means how far a throw-away stream came: towards this facility (`inward`), or away from it."""
    ours, theirs = (attempt.producer, attempt.consumer) if inward else (attempt.consumer, attempt.producer)
    way = f"{far} gateway {theirs} -> {ours}" if inward else f"{ours} -> {far} gateway {theirs}"
    where = f"{way}, WAN, {attempt.listener}"
    if attempt.arrived:
        return case.finding("reach", "ok", f"{where}: the relays have proven themselves to each other")
    host, port = split_address(attempt.listener)
    turned_away = (
        f"the listening relay turns it away: it does not come from {' or '.join(attempt.dial_addresses)}"
    )
    first, last = case.gateway.port_range if inward and case.gateway.port_range.first else (port, port)
    ports = f"{first}:{last}" if last > first else f"{first}"
    tables, anywhere = ("ip6tables", "::/0") if ":" in host else ("iptables", "0.0.0.0/0")
    sources = [one for one in attempt.dial_addresses if (":" in one) == (":" in host)]
    rules = " && ".join(
        f"{tables} -I INPUT -p tcp -s {source} --dport {ports} -j ACCEPT" for source in sources or [anywhere]
    )
    listening = "" if inward else f"at {far}, on gateway {attempt.producer}: "
    dialling = f"at {far}, on gateway {attempt.consumer}: " if inward else ""
    probe = attempt.probe or Probe(result="no-answer")
    number = f" ({probe.errno})" if probe.errno else ""
    words, fix = {
        "timeout": ("no answer comes, a firewall there or on the way swallows it", f"{listening}{rules}"),
        "refused": (
            "nobody listens at that address as seen from there, or a firewall refuses",
            f"{listening}{rules}; behind a translation of addresses set wan_advertise",
        ),
        "no-route": (
            "there is no route",
            f"{dialling}ip route get {host}, and add the route that is missing",
        ),
        "not-ready": (
            turned_away,
            f"set wan_advertise of gateway {attempt.consumer} to what others see it come from",
        ),
        "denied": (
            turned_away,
            f"set wan_advertise of gateway {attempt.consumer} to what others see it come from",
        ),
        "peer-rejected": (
            "who answers there is another relay",
            f"set wan_advertise of gateway {attempt.producer} to an address that leads to this gateway only",
        ),
    }.get(probe.result or "", ("the relays do not meet", "look at the logs of both relays"))
    return case.finding("reach", "problem", f"{where}: {probe.result}{number}: {words}", fix)
