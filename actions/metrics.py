"""Figures of a facility for Prometheus: of all its streams together, never of one. No uid, owner or address is in them.

Counters are the facility's, not a process's: they are kept in its state directory, so that it does not matter which of
several workers answers, and a restart takes nothing back. What the relays carry is looked at when somebody asks, at
most once a second whoever asks, and never waited for longer than `PATIENCE_S`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse
from starlette.requests import HTTPConnection

from scistream_flows import __version__
from scistream_flows.config import FacilityConfig
from scistream_flows.errors import PolicyDenied, RegistryError, ScistreamError
from scistream_flows.models import GatewayReport, Mode, Reason, Role, State, Status
from scistream_flows.s2cs import S2CS
from scistream_flows.tokens import read_secret

from .admission import Admission, Authorization, bearer
from .auth import bearer_token, names_group
from .lifecycle import identify
from .provider import ERRORS

log = logging.getLogger(__name__)

FRESH_S: Final = 1.0
"""So old may a look at the relays be that is answered again, seconds."""

PATIENCE_S: Final = 3.0
"""So long a new look is waited for; then the last one is answered, with its age."""

LATENCY_S: Final = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
"""Upper bounds of the buckets of answering times, seconds."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_AUDIT_BYTES: Final = 4 << 20  # at a look: a log that was never read takes several
_FLUSH_S: Final = 1.0
_METHODS: Final = frozenset({"GET", "POST", "PATCH", "DELETE", "OPTIONS", "HEAD", "PUT"})
_LIVING: Final[list[State]] = [one for one in get_args(State) if one not in ("ENDED", "FAILED")]
_ROLES: Final[tuple[Role, ...]] = get_args(Role)
_DIRECTIONS: Final = ("to_consumer", "to_producer")
_DENIALS: Final = ("denied", "capacity", "ports")

# What is told: the name, its kind, and what it is. Samples of others are dropped.
_TOLD: Final[Mapping[str, tuple[Literal["gauge", "counter", "histogram"], str]]] = {
    "scistream_info": ("gauge", "The facility and its version; always 1."),
    "scistream_look_age_seconds": ("gauge", "Age of the figures of streams and gateways; kept while one hangs."),
    "scistream_streams": ("gauge", "Sides of streams by role, mode and state."),
    "scistream_connections": ("gauge", "Connections that are open through relays."),
    "scistream_bytes_per_second": ("gauge", "Payload carried now."),
    "scistream_carried_bytes_total": ("counter", "Payload carried, also by streams that have ended."),
    "scistream_streams_opened_total": ("counter", "Sides opened."),
    "scistream_streams_denied_total": ("counter", "Calls that policy or capacity refused."),
    "scistream_streams_not_started_total": ("counter", "Sides whose relays did not start."),
    "scistream_streams_ended_total": ("counter", "Sides ended, by reason."),
    "scistream_gateway_skipped_total": ("counter", "Times that a gateway was skipped because it could not be used."),
    "scistream_gateway_answers": ("gauge", "1 if the gateway answered when last asked."),
    "scistream_gateway_draining": ("gauge", "1 if it takes no new streams."),
    "scistream_gateway_streams": ("gauge", "Sides with a relay on it."),
    "scistream_gateway_ports_used": ("gauge", "Listeners booked."),
    "scistream_gateway_ports_free": ("gauge", "Ports left of its range; absent where the kernel chooses."),
    "scistream_gateway_connections_booked": ("gauge", "Concurrent connections booked."),
    "scistream_gateway_connection_budget": ("gauge", "What these may add up to; absent where not counted."),
    "scistream_gateway_reserved_bits_per_second": ("gauge", "Rate reserved per direction."),
    "scistream_gateway_capacity_bits_per_second": ("gauge", "What this may add up to; absent where not counted."),
    "scistream_http_requests_total": ("counter", "Requests answered, by route, method and status."),
    "scistream_http_request_duration_seconds": ("histogram", "Time to answer, by route."),
}  # fmt: skip

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS counters (
    name TEXT, labels TEXT, value REAL NOT NULL, PRIMARY KEY (name, labels)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS carried (
    relay_id TEXT PRIMARY KEY, role TEXT NOT NULL, to_consumer INTEGER NOT NULL, to_producer INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS look (one INTEGER PRIMARY KEY CHECK (one = 1), at REAL, audit INTEGER, gauges TEXT);
INSERT OR IGNORE INTO look VALUES (1, NULL, 0, '[]');
"""


Counts: TypeAlias = dict[tuple[str, str], float]
"""By name and labels, these as JSON."""


class Sample(NamedTuple):
    """One figure."""

    name: str
    labels: Mapping[str, str]
    value: float


class Metrics:
    """The figures of one facility. Several processes may keep those of the same facility.

    Args:
        service: The facility.
    """

    def __init__(self, service: S2CS) -> None:
        self._service = service
        self._state_dir = service.config.state_dir
        self._mutex = threading.Lock()
        self._noted: Counts = {}
        self._flushing: threading.Timer | None = None
        self._looking: threading.Thread | None = None
        self._closed = False

    def note(self, route: str | None, method: str, status: int, took_s: float) -> None:
        """Count an answered request. `route` is its pattern: what stands in its places is not kept."""
        of_route = {"route": route or "other"}
        request = {**of_route, "method": method if method in _METHODS else "other", "status": str(status)}
        name = "scistream_http_request_duration_seconds"
        counts = {
            ("scistream_http_requests_total", _text(request)): 1.0,
            (f"{name}_count", _text(of_route)): 1,
            (f"{name}_sum", _text(of_route)): took_s,
        }
        for bound in (*LATENCY_S, math.inf):
            if took_s <= bound:
                counts[f"{name}_bucket", _text({**of_route, "le": _number(bound)})] = 1
        with self._mutex:
            for what, count in counts.items():
                self._noted[what] = self._noted.get(what, 0) + count
            if self._flushing is None and not self._closed:
                self._flushing = threading.Timer(_FLUSH_S, self._flush)
                self._flushing.daemon = True
                self._flushing.start()

    def text(self) -> str:
        """All figures, in the text format of Prometheus."""
        self._flush()
        self._look()
        return "".join(_written(self._samples()))

    def close(self) -> None:
        """Write down what was counted, and count no more."""
        with self._mutex:
            self._closed = True
            looking = self._looking
            if self._flushing is not None:
                self._flushing.cancel()
        self._flush()
        if looking is not None:
            looking.join(PATIENCE_S)

    # --- what was counted here

    def _flush(self) -> None:
        with self._mutex:
            noted, self._noted, self._flushing = self._noted, {}, None
        if not noted:
            return
        try:
            with self._database() as db:
                _add(db, noted)
        except RegistryError as wrong:
            log.warning("requests are not counted for now: %s", wrong)
            with self._mutex:
                for what, count in noted.items():
                    self._noted[what] = self._noted.get(what, 0) + count

    # --- what the relays say, and the audit log

    def _look(self) -> None:
        """Look anew if the last look is old, but wait for it only so long."""
        with self._mutex:
            if self._looking is None or not self._looking.is_alive():
                self._looking = threading.Thread(target=self._look_now, name="metrics", daemon=True)
                self._looking.start()
            looking = self._looking
        looking.join(PATIENCE_S)

    def _look_now(self) -> None:
        try:
            with self._alone() as alone:
                if alone and not self._is_fresh():
                    self._look_at_everything()
        except ScistreamError as wrong:
            log.warning("the figures are not fresh: %s", wrong)

    def _is_fresh(self) -> bool:
        with self._database() as db:
            (at,) = db.execute("SELECT at FROM look").fetchone()
        return at is not None and abs(time.time() - at) < FRESH_S

    def _look_at_everything(self) -> None:
        """First the relays, then what has ended meanwhile: what a stream carried is never taken back."""
        streams = [one for one in self._service.survey().streams if not one.ended]
        gauges = [*_of_streams(streams), *_of_gateways(self._service.gateways(ask=False))]
        with self._database() as db:
            (position,) = db.execute("SELECT audit FROM look").fetchone()
            lines, position = self._service.audit_from(position, most_bytes=_AUDIT_BYTES)
            for relay in (relay for stream in streams for relay in stream.relays):
                db.execute(
                    "INSERT INTO carried VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                    " to_consumer = max(to_consumer, excluded.to_consumer),"
                    " to_producer = max(to_producer, excluded.to_producer)",
                    (relay.relay_id, relay.role, relay.bytes.to_consumer, relay.bytes.to_producer),
                )
            for line in lines:
                _add(db, _events(line))
                if line.get("event") == "close":
                    _add(db, _carried_by_ended(db, line))
            document = json.dumps([one._asdict() for one in gauges])
            db.execute("UPDATE look SET at = ?, audit = ?, gauges = ?", (time.time(), position, document))

    def _samples(self) -> Iterator[Sample]:
        yield Sample("scistream_info", {"facility": self._service.config.name, "version": __version__}, 1)
        with self._database() as db:
            at, gauges = db.execute("SELECT at, gauges FROM look").fetchone()
            living = db.execute(
                "SELECT role, sum(to_consumer) AS to_consumer, sum(to_producer) AS to_producer FROM carried"
                " GROUP BY role"
            ).fetchall()
            kept = db.execute("SELECT name, labels, value FROM counters ORDER BY name, labels").fetchall()
        if at is not None:
            yield Sample("scistream_look_age_seconds", {}, max(0.0, time.time() - at))
        yield from (Sample(**one) for one in json.loads(gauges))
        counted: Counts = dict.fromkeys(_at_first(), 0)
        for name, labels, value in kept:
            counted[name, labels] = value
        for row in living:
            for direction in _DIRECTIONS:
                labels = _text({"role": row["role"], "direction": direction})
                what = ("scistream_carried_bytes_total", labels)
                counted[what] = counted.get(what, 0) + row[direction]
        yield from (Sample(name, json.loads(labels), value) for (name, labels), value in counted.items())

    # --- where it is kept

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process looks at the moment; for one that does, it waits, but not for ever."""
        path = self._state_dir / "metrics.lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as wrong:
            raise _unusable(path, wrong) from wrong
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not (alone := _locked(file)) and time.monotonic() < deadline:
                time.sleep(0.05)
            yield alone
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A transaction; whatever of it cannot be done is an error of ours."""
        path = self._state_dir / "metrics.sqlite"
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None)) as db:
                path.chmod(0o600)
                db.row_factory = sqlite3.Row
                db.execute("PRAGMA synchronous = OFF")  # a power failure may take the last figures: no harm
                db.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                yield db
                db.execute("COMMIT")
        except (sqlite3.Error, OSError) as wrong:
            raise _unusable(path, wrong) from wrong


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unusable(path: Path, wrong: Exception) -> RegistryError:
    return RegistryError(
        f"the figures in {path} cannot be used: {wrong}",
        which=str(path),
        hint="Look at the disk; without the file, counters begin anew",
    )


def metrics_token(config: FacilityConfig) -> str | None:
    """The token that opens the figures and nothing else, if the configuration names its file.

    Raises:
        ConfigError: When it cannot be read, or is open to others.
    """
    file = config.service.metrics_token_file
    return None if file is None else read_secret(Path(file).expanduser(), key="service.metrics_token_file")


def routes(metrics: Metrics, *, service: S2CS, admission: Admission) -> APIRouter:
    """The route of the figures: for administrators, and for who has the token of `metrics_token_file`."""
    router = APIRouter(tags=["metrics"], responses=ERRORS)
    auth, config = admission.auth, service.config
    known = metrics_token(config)

    @router.get(
        "/metrics",
        operation_id="metrics",
        response_class=PlainTextResponse,
        dependencies=[Depends(bearer)],
    )
    def read(authorization: Authorization, http: HTTPConnection) -> Response:
        """Figures for Prometheus: of the facility as a whole, without uid, owner or address."""
        token = bearer_token(authorization, scope=auth.config.scope)
        if known is None or not hmac.compare_digest(token.encode(), known.encode()):
            admission.known(authorization, http)
            groups = names_group(config.policy.administrators)
            identity = identify(auth, authorization, groups=groups)
            if not service.administers(identity.urns):
                raise PolicyDenied(
                    f"{identity.urn} may not read the figures of facility {config.name}",
                    which=identity.urn,
                    hint="Administrators may, and who has the token in service.metrics_token_file",
                    key="policy.administrators",
                )
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router


# --- what is counted


def _of_streams(streams: Sequence[Status]) -> Iterator[Sample]:
    for role in _ROLES:
        sides = [one for one in streams if one.role == role]
        for mode in get_args(Mode):
            for state in _LIVING:
                count = sum(one.mode == mode and one.state == state for one in sides)
                yield Sample("scistream_streams", {"role": role, "mode": mode, "state": state}, count)
        yield Sample("scistream_connections", {"role": role}, sum(one.connections.active for one in sides))
        for direction in _DIRECTIONS:
            rate = sum(getattr(one.bits_per_s, direction) for one in sides) / 8
            yield Sample("scistream_bytes_per_second", {"role": role, "direction": direction}, rate)


def _of_gateways(reports: Sequence[GatewayReport]) -> Iterator[Sample]:
    for one in reports:
        figures: dict[str, float | None] = {
            "answers": one.answers,
            "draining": one.draining,
            "streams": one.streams,
            "ports_used": one.listeners,
            "ports_free": max(0, one.ports - one.listeners) if one.ports else None,
            "connections_booked": one.connections,
            "connection_budget": one.connection_budget or None,
            "reserved_bits_per_second": one.reserved_mbits_per_s * 1e6,
            "capacity_bits_per_second": one.capacity_mbits_per_s * 1e6 or None,
        }
        for name, value in figures.items():
            if value is not None:
                yield Sample(f"scistream_gateway_{name}", {"gateway": one.name}, float(value))


def _events(line: Mapping[str, Any]) -> Counts:
    """What a line of the audit log counts for. Its words may be somebody's: only those known here become labels."""

    def known(key: str, words: Iterable[str]) -> str:
        word = line.get(key)
        return word if isinstance(word, str) and word in words else "other"

    role = known("role", _ROLES)
    match line.get("event"):
        case "open":
            found = ("scistream_streams_opened_total", {"role": role, "mode": known("mode", get_args(Mode))})
        case "deny" if line.get("code") in ("not-found", "unauthenticated", "rate-limited"):
            return {}  # no stream was refused
        case "deny":
            found = ("scistream_streams_denied_total", {"role": role, "reason": known("code", _DENIALS)})
        case "fail":
            found = ("scistream_streams_not_started_total", {"role": role})
        case "close":
            found = (
                "scistream_streams_ended_total",
                {"role": role, "reason": known("reason", get_args(Reason))},
            )
        case "skip":
            found = ("scistream_gateway_skipped_total", {"gateway": str(line.get("gateway"))})
        case _:
            return {}
    name, labels = found
    return {(name, _text(labels)): 1}


def _carried_by_ended(db: sqlite3.Connection, line: Mapping[str, Any]) -> Counts:
    """What a stream has carried to its end; its relays are forgotten. One that was lost may have said more before."""
    seen = dict.fromkeys(_DIRECTIONS, 0)
    for relay_id in line.get("relays") or ():
        row = db.execute("SELECT * FROM carried WHERE relay_id = ?", (relay_id,)).fetchone()
        db.execute("DELETE FROM carried WHERE relay_id = ?", (relay_id,))
        for direction in _DIRECTIONS if row else ():
            seen[direction] += row[direction]
    said = line.get("bytes") or {}
    return {
        (
            "scistream_carried_bytes_total",
            _text({"role": str(line.get("role")), "direction": one}),
        ): max(seen[one], said.get(one, 0))
        for one in _DIRECTIONS
    }


def _at_first() -> Iterator[tuple[str, str]]:
    """Counters that are there before anything happened, so that the first time is an increase."""
    for role in _ROLES:
        for name, label, words in (
            ("opened", "mode", get_args(Mode)),
            ("denied", "reason", _DENIALS),
            ("ended", "reason", get_args(Reason)),
        ):
            for word in words:
                yield f"scistream_streams_{name}_total", _text({"role": role, label: word})
        yield "scistream_streams_not_started_total", _text({"role": role})
        for direction in _DIRECTIONS:
            yield "scistream_carried_bytes_total", _text({"role": role, "direction": direction})


def _add(db: sqlite3.Connection, counts: Counts) -> None:
    db.executemany(
        "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
        [(name, labels, value) for (name, labels), value in counts.items()],
    )


# --- the text format


def _written(samples: Iterable[Sample]) -> Iterator[str]:
    families: dict[str, list[Sample]] = {name: [] for name in _TOLD}
    for one in samples:
        family = one.name if one.name in _TOLD else one.name.rpartition("_")[0]
        if family in families:
            families[family].append(one)
    for name, found in families.items():
        if found:
            kind, words = _TOLD[name]
            yield f"# HELP {name} {words}\n# TYPE {name} {kind}\n"
            for one in sorted(found, key=_order) if kind == "histogram" else found:
                labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in one.labels.items())
                yield f"{one.name}{{{labels}}} {_number(one.value)}\n"


def _order(one: Sample) -> tuple[str, bool, float]:
    """Of a histogram: the buckets of a route from small to large, then its count and sum."""
    bound = one.labels.get("le")
    return one.labels["route"], bound is None, float(bound or 0)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)


def _text(labels: Mapping[str, str]) -> str:
    return json.dumps(labels)
