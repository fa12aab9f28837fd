"""The streams of one facility, on disk: a SQLite database, a lock per stream, and the audit log.

Everything here survives kill -9 at any point. The intent to start a relay is written before it starts, so that no
relay is ever unknown; locks are held by the kernel and vanish with their process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

from scistream_flows.errors import Busy, CapacityExhausted, ConfigError, NotFound, RegistryError
from scistream_flows.models import Offer, RelayStatus, Request, Role
from scistream_flows.policy import Usage, paced

KEEP_ENDED_S = 86_400
"""How long the end of a stream can be asked for, seconds."""

NETWORK_FILE_SYSTEMS = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "lustre", "gpfs", "beegfs", "panfs", "ceph"),
        *("glusterfs", "pvfs2", "orangefs", "wekafs", "dvs"),
        *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.juicefs"),
    }
)

MOST_TICKETS = 256
"""Tickets of one side that have not expired: one for each of its listeners."""

AUDIT_FILE_BYTES = 32 << 20
"""How large a file of the audit log becomes before the next one is begun."""

AUDIT_FILES = 10
"""How many files of the audit log there are: `audit.jsonl`, and older ones as `audit.jsonl.1` to `.9`."""

OUTLIVED_S = 300
"""So long after the lifetime of a stream none of its relays can run, whatever clocks and slow starts add, seconds."""

_SCHEMA_VERSION = 5
_SCHEMA = """
CREATE TABLE streams (
    id INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    uid TEXT NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('PROD', 'CONS')),
    phase TEXT NOT NULL CHECK (phase IN ('opening', 'open', 'ended')),
    request TEXT NOT NULL,
    offer TEXT,
    ended TEXT,
    ended_at REAL,
    UNIQUE (owner, uid, role)
);
CREATE TABLE relays (
    relay_id TEXT PRIMARY KEY,
    stream INTEGER NOT NULL REFERENCES streams (id) ON DELETE CASCADE,
    gateway TEXT NOT NULL,
    listeners INTEGER NOT NULL,
    reserved_mbits_per_s INTEGER NOT NULL
);
CREATE INDEX relays_of_stream ON relays (stream);
"""
# From each layout to the next. A process of the version before that has the database open can go on with it: what it
# does not write has a default.
_STEPS = {
    0: _SCHEMA,
    1: """
ALTER TABLE relays ADD COLUMN indices TEXT;
ALTER TABLE relays ADD COLUMN connections INTEGER NOT NULL DEFAULT 0;
UPDATE relays SET connections = listeners * coalesce(
    (SELECT json_extract(request, '$.max_connections') FROM streams WHERE id = stream), 0);
CREATE TABLE draining (gateway TEXT PRIMARY KEY);
""",
    2: "ALTER TABLE streams ADD COLUMN claimed_at REAL",
    3: """
CREATE TABLE tickets (
    hash BLOB PRIMARY KEY,
    stream INTEGER NOT NULL REFERENCES streams (id) ON DELETE CASCADE,
    networks TEXT NOT NULL,
    expires_at REAL NOT NULL,
    used_for TEXT
);
CREATE INDEX tickets_of_stream ON tickets (stream);
""",
    4: "CREATE TABLE callers (name TEXT PRIMARY KEY, busy_until_s REAL NOT NULL)",
}
# What ended within the last day is many times what is open, and no verb may look through it. They are no part of the
# layout: a process of a version that does not know them keeps them up all the same.
_INDEXES = (
    "CREATE INDEX IF NOT EXISTS streams_by_phase ON streams (phase, ended_at)",
    "CREATE INDEX IF NOT EXISTS streams_by_name ON streams (uid, role)",
    # What a claim adds up is in it: the rows, with their documents, stay where they are.
    "CREATE INDEX IF NOT EXISTS streams_by_owner ON streams (phase, owner)",
)

Phase = Literal["opening", "open", "ended"]


class Key(NamedTuple):
    """What names one side of a stream."""

    owner: str
    uid: str
    role: Role


@dataclass(frozen=True, kw_only=True)
class RelayRow:
    """A relay that was or will be started: written before the start.

    Attributes:
        relay_id: Its name.
        gateway: The name of its gateway.
        indices: The stream's listeners that it has.
        connections: Concurrent connections booked for it.
        reserved_mbits_per_s: Rate booked for it, Mbit/s per direction.
    """

    relay_id: str
    gateway: str
    indices: tuple[int, ...]
    connections: int
    reserved_mbits_per_s: int


@dataclass(frozen=True, kw_only=True)
class StreamRow:
    """One side of a stream.

    Attributes:
        id: Its number here.
        key: What names it.
        phase: How far it is.
        request: What was asked for.
        offer: None while `opening`.
        relays: Those that were or will be started.
        ended: The end of each relay, once `ended`.
        claimed_at: When the intent was written, seconds since 1970; None when an older version wrote it.
    """

    id: int
    key: Key
    phase: Phase
    request: Request
    offer: Offer | None
    relays: tuple[RelayRow, ...]
    ended: tuple[RelayStatus, ...]
    claimed_at: float | None = None

    @property
    def outlived(self) -> bool:
        """Whether its relays have ended by themselves, even where nobody can ask them: its lifetime is over."""
        return _outlived(self.claimed_at, self.request.lifetime_s)


class LivingRelay(NamedTuple):
    """What the comparison with what runs has to know of a relay whose stream has not ended.

    Attributes:
        gateway: The name of its gateway.
        stream: The number of its stream.
        key: What names that.
        phase: How far it is.
        outlived: As of its stream.
    """

    gateway: str
    stream: int
    key: Key
    phase: Phase
    outlived: bool


@dataclass(frozen=True, kw_only=True)
class TicketRow:
    """A ticket that counts still.

    Attributes:
        stream: Of which side.
        networks: Where it may be used.
        used_for: By whom and for what it was used; None: not yet.
    """

    stream: StreamRow
    networks: tuple[str, ...]
    used_for: str | None


asked_from: ContextVar[str | None] = ContextVar("asked_from", default=None)
"""Where the call comes from that is just answered, as the door through which it came knows: for the audit log."""

Placement: TypeAlias = Callable[[Usage], Sequence[RelayRow]]
"""From the usage at that moment to the relays to start, or an error for the caller of `request`."""

# The byte that is locked while the database is opened: SQLite does not wait for the switch to WAL.
_OPENING = Key("", "", "PROD")
# The same for the names of the audit log's files.
_AUDIT = Key("", "audit", "PROD")
_AUDIT_LOG = "audit.jsonl"
# A position in the log: the number of a file, and so many bits for the place in it.
_AUDIT_OFFSET_BITS = 26
_AUDIT_INODE = (1 << 36) - 1


class Registry:
    """The registry in `state_dir`, which is made 0700 when it is not there.

    Raises:
        ConfigError: When the directory is on a network file system, somebody else's, or open to others.
        RegistryError: When it cannot be read or written.
    """

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        _prepare(state_dir)
        self._lock_file = state_dir / "locks"
        self._database = state_dir / "registry.sqlite"
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._closing: weakref.finalize[..., Registry] | None = None
        with self._transaction():
            pass

    def close(self) -> None:
        """Close the database. The registry opens it again when it is used again."""
        with self._mutex:
            if self._closing is not None:
                self._closing()
            self._connection = None

    # --- locks

    @contextlib.contextmanager
    def lock(self, key: Key, *, timeout_s: float) -> Iterator[None]:
        """Hold the stream `key` against every other thread and process on this registry.

        Raises:
            Busy: When another one holds it for `timeout_s` seconds.
        """
        with contextlib.ExitStack() as stack:
            deadline = time.monotonic() + timeout_s
            pause_s = 0.002
            while not self._try_lock(key, stack):
                if time.monotonic() >= deadline:
                    raise Busy(
                        f"another process has been working on stream {key.uid!r} ({key.role}) for {timeout_s:g} s",
                        which=key.uid,
                        hint="Try again; if it lasts, look for a process of the facility that hangs",
                    )
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.05)
            yield

    @contextlib.contextmanager
    def lock_if_free(self, key: Key, *, patience_s: float = 0) -> Iterator[bool]:
        """Hold the stream `key` if nobody does, or soon nobody; answers whether it is held."""
        with contextlib.ExitStack() as stack:
            deadline = time.monotonic() + patience_s
            while not (held := self._try_lock(key, stack)) and time.monotonic() < deadline:
                time.sleep(0.01)
            yield held

    def _try_lock(self, key: Key, stack: contextlib.ExitStack) -> bool:
        # One byte of one file per stream, locked by open file description: the kernel frees it with the process,
        # threads exclude each other too, and no file per stream stays behind.
        file = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        digest = hashlib.sha256("\0".join(key).encode()).digest()
        start = int.from_bytes(digest[:8], "big") >> 2
        request = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
        except BlockingIOError:
            os.close(file)
            return False
        except BaseException:
            os.close(file)
            raise
        stack.callback(_unlock, file, start)
        return True

    # --- streams

    def find(self, key: Key) -> StreamRow | None:
        """The stream of exactly this owner."""
        with self._transaction() as db:
            row = db.execute("SELECT * FROM streams WHERE owner = ? AND uid = ? AND role = ?", key).fetchone()
            return None if row is None else _stream(db, row)

    def named(self, uid: str, role: Role) -> list[StreamRow]:
        """The streams of this name of all owners."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT * FROM streams WHERE uid = ? AND role = ? ORDER BY id", (uid, role)
            ).fetchall()
            return [_stream(db, row) for row in rows]

    def streams(self, *phases: Phase) -> list[StreamRow]:
        """The streams in these phases, oldest first."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT * FROM streams WHERE phase IN (SELECT value FROM json_each(?)) ORDER BY id",
                (json.dumps(phases),),
            ).fetchall()
            return [_stream(db, row) for row in rows]

    def mentions(self, text: str, *, uid: str | None = None) -> bool:
        """Whether the request of any stream, or of any of this name, has this text in it."""
        with self._transaction() as db:
            if uid is None:
                found = db.execute("SELECT 1 FROM streams WHERE instr(request, ?) LIMIT 1", (text,))
            else:
                found = db.execute(
                    "SELECT 1 FROM streams WHERE uid = ? AND instr(request, ?) LIMIT 1", (uid, text)
                )
            return found.fetchone() is not None

    def relays(self) -> dict[str, LivingRelay]:
        """Each relay_id that is written down for a stream that has not ended."""
        with self._transaction() as db:
            # every second: without the documents
            rows = db.execute(
                "SELECT relay_id, gateway, streams.id AS stream, owner, uid, role, phase, claimed_at,"
                " json_extract(request, '$.lifetime_s') AS lifetime_s"
                " FROM streams CROSS JOIN relays ON relays.stream = streams.id WHERE phase IN ('opening', 'open')"
            ).fetchall()
        return {
            row["relay_id"]: LivingRelay(
                gateway=row["gateway"],
                stream=row["stream"],
                key=Key(row["owner"], row["uid"], row["role"]),
                phase=row["phase"],
                outlived=_outlived(row["claimed_at"], row["lifetime_s"]),
            )
            for row in rows
        }

    def claim(
        self, key: Key, request: Request, place: Placement, *, identities: Sequence[str] = ()
    ) -> StreamRow:
        """Write the intent to open a stream, in place of an ended one of the same name.

        `place` is called with the usage at that moment, inside the transaction: what it admits cannot be given away
        twice. The caller holds the stream's lock.

        Args:
            key: The stream.
            request: What is asked for.
            place: Where to.
            identities: All URNs of the owner; what any of them has open counts as his.
        """
        with self._transaction() as db:
            relays = place(_usage(db, {key.owner, *identities}))
            db.execute("DELETE FROM streams WHERE owner = ? AND uid = ? AND role = ?", key)
            cursor = db.execute(
                "INSERT INTO streams (owner, uid, role, phase, request, claimed_at)"
                " VALUES (?, ?, ?, 'opening', ?, ?)",
                # as many gateways as relays: unsaid, so that a process of the version before can read it
                (*key, request.model_dump_json(exclude={"gateways"}), time.time()),
            )
            db.executemany(
                "INSERT INTO relays"
                " (relay_id, stream, gateway, listeners, reserved_mbits_per_s, indices, connections)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        one.relay_id,
                        cursor.lastrowid,
                        one.gateway,
                        len(one.indices),
                        one.reserved_mbits_per_s,
                        json.dumps(one.indices),
                        one.connections,
                    )
                    for one in relays
                ],
            )
            row = db.execute("SELECT * FROM streams WHERE id = ?", (cursor.lastrowid,)).fetchone()
            return _stream(db, row)

    def opened(self, stream: StreamRow, offer: Offer) -> None:
        """The relays run: write the offer."""
        with self._transaction() as db:
            db.execute(
                "UPDATE streams SET phase = 'open', offer = ? WHERE id = ?",
                (offer.model_dump_json(), stream.id),
            )

    def ended(self, stream: StreamRow, ends: Sequence[RelayStatus]) -> None:
        """The relays are gone: write how they ended. A stream that has an end keeps it."""
        text = json.dumps([one.model_dump(mode="json", exclude_defaults=True) | _kept(one) for one in ends])
        with self._transaction() as db:
            db.execute(
                "UPDATE streams SET phase = 'ended', ended = ?, ended_at = ? WHERE id = ? AND phase != 'ended'",
                (text, time.time(), stream.id),
            )
            db.execute(
                "DELETE FROM streams WHERE phase = 'ended' AND ended_at < ?", (time.time() - KEEP_ENDED_S,)
            )

    def discard(self, stream: StreamRow) -> None:
        """Take back a claim whose relays did not start."""
        with self._transaction() as db:
            db.execute("DELETE FROM streams WHERE id = ?", (stream.id,))

    # --- tickets

    def keep_ticket(
        self, secret: str, stream: StreamRow, *, networks: Sequence[str], expires_s: float
    ) -> None:
        """Write a ticket down, by its hash: nobody who reads the database can use it.

        Raises:
            CapacityExhausted: The stream has MOST_TICKETS that have not expired.
        """
        now = time.time()
        with self._transaction() as db:
            db.execute("DELETE FROM tickets WHERE expires_at < ?", (now,))
            count = db.execute("SELECT count(*) FROM tickets WHERE stream = ?", (stream.id,)).fetchone()[0]
            if count >= MOST_TICKETS:
                raise CapacityExhausted(
                    f"stream {stream.key.uid!r} ({stream.key.role}) has {count} tickets that have not expired",
                    which=stream.key.uid,
                    hint="Ask for such that expire sooner, or say hello with a token",
                    limit=MOST_TICKETS,
                )
            db.execute(
                "INSERT INTO tickets (hash, stream, networks, expires_at) VALUES (?, ?, ?, ?)",
                (_hashed(secret), stream.id, json.dumps([*networks]), now + expires_s),
            )

    def ticket(self, secret: str) -> TicketRow | None:
        """What is known of a ticket; None of one that never was, or has expired."""
        with self._transaction() as db:
            found = db.execute(
                "SELECT stream, networks, used_for FROM tickets WHERE hash = ? AND expires_at >= ?",
                (_hashed(secret), time.time()),
            ).fetchone()
            if found is None:
                return None
            row = db.execute("SELECT * FROM streams WHERE id = ?", (found["stream"],)).fetchone()
            networks = tuple(json.loads(found["networks"]))
            return TicketRow(stream=_stream(db, row), networks=networks, used_for=found["used_for"])

    def use_ticket(self, secret: str, *, used_for: str) -> bool:
        """Use a ticket up; answers whether this use is its first, or the very same again."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE tickets SET used_for = ? WHERE hash = ? AND expires_at >= ? AND coalesce(used_for, ?) = ?",
                (used_for, _hashed(secret), time.time(), used_for, used_for),
            )
            return changed.rowcount > 0

    def usage(self, owner: str) -> Usage:
        """What is in use now, and by `owner`."""
        with self._transaction() as db:
            return _usage(db, {owner})

    def pace(self, name: str, *, per_min: int, burst: int) -> float:
        """Count a request of a caller, in all processes together; answers how long it has to wait, seconds.

        Written as `policy.paced` has it, by the clock that all processes of this machine share.
        """
        now_s = time.monotonic()
        with self._transaction() as db:
            db.execute("DELETE FROM callers WHERE busy_until_s < ?", (now_s,))
            row = db.execute("SELECT busy_until_s FROM callers WHERE name = ?", (name,)).fetchone()
            after_s, wait_s = paced(row["busy_until_s"] if row else 0.0, now_s, per_min=per_min, burst=burst)
            # also of one who has to wait: what is left of the clock before a restart of the machine may be far ahead
            db.execute("INSERT OR REPLACE INTO callers VALUES (?, ?)", (name, after_s))
            return wait_s

    # --- gateways

    def drain(self, gateway: str, *, draining: bool) -> bool:
        """Let a gateway take no new stream, or take them again; answers whether that changed anything."""
        statement = (
            "INSERT OR IGNORE INTO draining VALUES (?)"
            if draining
            else "DELETE FROM draining WHERE gateway = ?"
        )
        with self._transaction() as db:
            return db.execute(statement, (gateway,)).rowcount > 0

    # --- audit

    def audit_lines(self) -> Iterator[dict[str, Any]]:
        """The lines of the audit log, oldest first. One that is torn, because its writer was killed, is left out.

        Raises:
            RegistryError: When a file cannot be read.
        """
        with self._audit_files() as files:
            for file in files:
                yield from filter(None, map(_audit_line, file))

    def audit_followed(self) -> Iterator[dict[str, Any] | None]:
        """The lines of the audit log, oldest first, and then each that comes: None whenever there is none yet.

        Raises:
            RegistryError: When a file cannot be read.
        """
        with contextlib.ExitStack() as stack:
            files = stack.enter_context(self._audit_files())
            for file in files[:-1]:
                yield from filter(None, map(_audit_line, file))
            last = files[-1] if files else None
            begun = b""
            while True:
                if last is not None:
                    moved = not self._is_the_audit_log(last)  # looked at first: then all of it is read
                    while piece := last.readline():
                        begun += piece
                        if begun.endswith(b"\n"):
                            line, begun = _audit_line(begun), b""
                            if line:
                                yield line
                    if not moved:
                        yield None
                        continue
                    last.close()
                    last = None
                try:
                    last = stack.enter_context((self.state_dir / _AUDIT_LOG).open("rb"))
                except FileNotFoundError:
                    yield None
                except OSError as wrong:
                    raise _unusable(self.state_dir, wrong) from wrong

    def audit_from(self, position: int, *, most_bytes: int) -> tuple[list[dict[str, Any]], int]:
        """The whole lines of the audit log from a position on, of so many bytes, and the position after them.

        The first position is 0. A position is a file and a place in it; where that file is gone, or shorter, it is read
        from the beginning of what is there.

        Raises:
            RegistryError: When a file cannot be read.
        """
        with self._audit_files() as files:
            known = [os.fstat(file.fileno()).st_ino & _AUDIT_INODE for file in files]
            inode, start = position >> _AUDIT_OFFSET_BITS, position & ((1 << _AUDIT_OFFSET_BITS) - 1)
            at = known.index(inode) if inode in known else 0
            if inode not in known or start > os.fstat(files[at].fileno()).st_size:
                start = 0
            found: list[dict[str, Any]] = []
            for number in range(at, len(files)):
                files[number].seek(start)
                whole = files[number].read(most_bytes).rpartition(b"\n")[0]
                found += filter(None, map(_audit_line, whole.splitlines()))
                position = known[number] << _AUDIT_OFFSET_BITS | (start + len(whole) + bool(whole))
                if whole:  # the next file is for the next time
                    break
                start = 0
            return found, position if files else 0

    def audit(self, event: str, key: Key | None, **details: Any) -> None:
        """Append one JSON line to `audit.jsonl` (0600).

        It has `at, event`, of a stream `owner, uid, role`, where known `from`, and the details. When the file is full,
        the next one is begun, and the oldest of AUDIT_FILES is removed.

        Raises:
            RegistryError: When the line cannot be written.
        """
        at = said_at(time.time())
        where = asked_from.get()
        about = {**(key._asdict() if key else {}), **({"from": where} if where else {})}
        line = json.dumps({"at": at, "event": event, **about, **details}) + "\n"
        try:
            file = os.open(
                self.state_dir / _AUDIT_LOG, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            try:
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":  # torn: its writer was killed
                    line = "\n" + line
                os.write(file, line.encode())  # one write: lines of several processes do not mix
            finally:
                os.close(file)
            if size + len(line) >= AUDIT_FILE_BYTES:
                self._begin_audit_file()
        except OSError as wrong:
            raise _unusable(self.state_dir, wrong) from wrong

    def _begin_audit_file(self) -> None:
        with self.lock(_AUDIT, timeout_s=30):
            names = [self.state_dir / name for name in _audit_names()]
            # another process has begun it, or has put the full one away and not written yet
            if not names[0].exists() or names[0].stat().st_size < AUDIT_FILE_BYTES:
                return
            for newer, older in reversed([*pairwise(names)]):
                with contextlib.suppress(FileNotFoundError):
                    newer.replace(older)

    @contextlib.contextmanager
    def _audit_files(self) -> Iterator[Sequence[BinaryIO]]:
        """The files of the audit log, the oldest first, open for reading."""
        with contextlib.ExitStack() as stack:
            files = []
            try:
                with self.lock(_AUDIT, timeout_s=30):  # so that none is read twice, or not at all
                    for name in reversed(_audit_names()):
                        with contextlib.suppress(FileNotFoundError):
                            files.append(stack.enter_context((self.state_dir / name).open("rb")))
            except OSError as wrong:
                raise _unusable(self.state_dir, wrong) from wrong
            yield files

    def _is_the_audit_log(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat((self.state_dir / _AUDIT_LOG).stat(), os.fstat(file.fileno()))
        except OSError:
            return False

    # --- the database

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            try:
                db = self._open()
                try:
                    db.execute("BEGIN IMMEDIATE")
                    yield db
                    db.commit()
                except BaseException:
                    if db.in_transaction:
                        db.rollback()
                    raise
            except sqlite3.Error as wrong:
                raise _unusable(self.state_dir, wrong) from wrong

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._pid == os.getpid():
            return self._connection
        # a connection does not survive a fork: the child leaves the parent's alone and opens its own
        if self._closing is not None:
            self._closing.detach()
        with self.lock(_OPENING, timeout_s=30):
            db = self._connect()
        self._connection, self._pid = db, os.getpid()
        self._closing = weakref.finalize(self, _close_own, db, self._pid)
        return db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._database, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self._database.chmod(0o600)
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("BEGIN IMMEDIATE")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version < _SCHEMA_VERSION:
                for step in range(version, _SCHEMA_VERSION):
                    for statement in _STEPS[step].split(";\n"):
                        db.execute(statement)
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise RegistryError(
                    f"{self._database} has layout {version}, this version reads {_SCHEMA_VERSION}",
                    which=str(self._database),
                    hint="Use the version that wrote it, or release its streams and move the file away",
                )
            for index in _INDEXES:
                db.execute(index)
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db


def _audit_names() -> list[str]:
    return [_AUDIT_LOG, *(f"{_AUDIT_LOG}.{number}" for number in range(1, AUDIT_FILES))]


def _audit_line(line: bytes) -> dict[str, Any] | None:
    """What a line says; None of one that is torn."""
    with contextlib.suppress(ValueError):
        document = json.loads(line)
        if isinstance(document, dict):
            return document
    return None


def said_at(time_s: float) -> str:
    """A moment, seconds since 1970, as the audit log writes it; texts are in the order of the moments."""
    at = datetime.fromtimestamp(time_s, timezone.utc)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def not_found(uid: str, role: Role) -> NotFound:
    """The one answer for a stream that is not there and for one that is not the caller's."""
    return NotFound(
        f"there is no stream {uid!r} with role {role} for this caller",
        which=uid,
        hint="List your streams; one that has ended is forgotten after a day",
    )


def _stream(db: sqlite3.Connection, row: sqlite3.Row) -> StreamRow:
    relays = db.execute("SELECT * FROM relays WHERE stream = ? ORDER BY rowid", (row["id"],)).fetchall()
    return StreamRow(
        id=row["id"],
        key=Key(row["owner"], row["uid"], row["role"]),
        phase=row["phase"],
        request=Request.model_validate_json(row["request"]).model_copy(update={"gateways": len(relays) or 1}),
        offer=None if row["offer"] is None else Offer.model_validate_json(row["offer"]),
        relays=tuple(
            RelayRow(
                relay_id=one["relay_id"],
                gateway=one["gateway"],
                indices=_indices(one),
                connections=one["connections"],
                reserved_mbits_per_s=one["reserved_mbits_per_s"],
            )
            for one in relays
        ),
        ended=tuple(RelayStatus.model_validate(one) for one in json.loads(row["ended"] or "[]")),
        claimed_at=row["claimed_at"],
    )


def _indices(relay: sqlite3.Row) -> tuple[int, ...]:
    # written down since layout 2: before, a relay had all listeners of its stream
    text = relay["indices"]
    return tuple(range(relay["listeners"]) if text is None else json.loads(text))


def _usage(db: sqlite3.Connection, owners: Collection[str]) -> Usage:
    named = json.dumps([*owners])
    # CROSS JOIN: in this order; SQLite would rather begin with all relays there were
    streams = db.execute(
        "SELECT count(*) FROM streams WHERE phase IN ('opening', 'open')"
        " AND owner IN (SELECT value FROM json_each(?))",
        (named,),
    ).fetchone()[0]
    reserved = db.execute(
        "SELECT total(reserved_mbits_per_s) FROM streams CROSS JOIN relays ON relays.stream = streams.id"
        " WHERE phase IN ('opening', 'open') AND owner IN (SELECT value FROM json_each(?))",
        (named,),
    ).fetchone()[0]
    rows = db.execute(
        "SELECT gateway, count(*) AS streams, sum(listeners) AS listeners, sum(connections) AS connections,"
        " sum(reserved_mbits_per_s) AS reserved"
        " FROM streams CROSS JOIN relays ON relays.stream = streams.id"
        " WHERE phase IN ('opening', 'open') GROUP BY gateway"
    ).fetchall()
    return Usage(
        streams_of_owner=streams,
        reserved_of_owner_mbits_per_s=int(reserved),
        streams={row["gateway"]: row["streams"] for row in rows},
        reserved_mbits_per_s={row["gateway"]: row["reserved"] for row in rows},
        listeners={row["gateway"]: row["listeners"] for row in rows},
        connections={row["gateway"]: row["connections"] for row in rows},
        draining=frozenset(row["gateway"] for row in db.execute("SELECT gateway FROM draining")),
    )


def _kept(end: RelayStatus) -> dict[str, Any]:
    return {"protocol": end.protocol, "relay_id": end.relay_id, "role": end.role, "state": end.state}


def _outlived(claimed_at: float | None, lifetime_s: float) -> bool:
    return claimed_at is not None and time.time() > claimed_at + lifetime_s + OUTLIVED_S


def _hashed(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _unlock(file: int, start: int) -> None:
    # said explicitly: a forked child may hold a copy of the descriptor, and closing ours would not free the lock
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_UNLCK, os.SEEK_SET, start, 1, 0))
    finally:
        os.close(file)


def _close_own(db: sqlite3.Connection, pid: int) -> None:
    if pid == os.getpid():
        db.close()


def _unusable(state_dir: Path, wrong: Exception) -> RegistryError:
    return RegistryError(
        f"the state in {state_dir} cannot be used: {wrong}",
        which=str(state_dir),
        hint="Look at the disk and its permissions, or set SCISTREAM_STATE_DIR to another local directory",
    )


def _prepare(state_dir: Path) -> None:
    try:
        state_dir.parent.mkdir(parents=True, exist_ok=True)
        state_dir.mkdir(mode=0o700, exist_ok=True)
        about = state_dir.stat()
    except OSError as wrong:
        raise _unusable(state_dir, wrong) from wrong
    hint = "Set SCISTREAM_STATE_DIR to a directory on a local disk, such as below /var/tmp"
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
        raise ConfigError(
            f"the state directory {state_dir} is not a directory of this user alone",
            which=str(state_dir),
            hint="Make it 0700 and owned by the user who runs the facility, or set SCISTREAM_STATE_DIR",
            file=str(state_dir),
            key="state_dir",
        )
    kind = file_system_of(state_dir)
    if kind in NETWORK_FILE_SYSTEMS:
        raise ConfigError(
            f"the state directory {state_dir} is on a network file system ({kind}), where locks cannot be trusted",
            which=str(state_dir),
            hint=hint,
            file=str(state_dir),
            key="state_dir",
        )


def file_system_of(path: Path, *, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that `path` is on, such as `ext4` or `nfs4`; empty when it cannot be told."""
    resolved = path.resolve()
    best, kind = -1, ""
    try:
        lines = mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mounted = Path(fields.split()[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        # the last of equal depth wins: later mounts lie over earlier ones
        if (resolved == mounted or mounted in resolved.parents) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), rest.split()[0]
    return kind
