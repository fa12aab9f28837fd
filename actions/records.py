"""The actions of one facility, on disk: what was asked, how far it has come, how it ended.

SQLite beside the registry, for any number of threads and processes; everything survives kill -9. A status that is
final is never overwritten, and nothing is kept for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from scistream_flows.errors import CapacityExhausted, Conflict, RegistryError

ActionState: TypeAlias = Literal["ACTIVE", "SUCCEEDED", "FAILED"]

MAX_ACTIVE_PER_CREATOR: Final = 1_000
MAX_FINISHED_PER_CREATOR: Final = 10_000
MAX_LOG_ENTRIES: Final = 100
LONGEST_LISTING: Final = 1_000

_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE actions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    action_id TEXT NOT NULL UNIQUE,
    provider TEXT NOT NULL,
    creator_id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    asked TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('ACTIVE', 'SUCCEEDED', 'FAILED')),
    display_status TEXT NOT NULL,
    details TEXT NOT NULL,
    memory TEXT,
    began_at REAL NOT NULL,
    deadline_at REAL NOT NULL,
    completed_at REAL,
    keep_s REAL NOT NULL,
    forget_at REAL NOT NULL,
    UNIQUE (provider, creator_id, request_id)
);
CREATE INDEX actions_of_creator ON actions (creator_id, status);
CREATE INDEX actions_to_forget ON actions (forget_at);
CREATE TABLE log (
    action INTEGER NOT NULL REFERENCES actions (number) ON DELETE CASCADE,
    at REAL NOT NULL,
    code TEXT NOT NULL,
    description TEXT NOT NULL
);
CREATE INDEX log_of_action ON log (action);
"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a caller asked for: together with provider, creator and request_id this names an action.

    Attributes:
        body: The input of the action, as it came.
        caller: The caller's URNs, the effective one first.
        label: A name for people, 1 to 64 characters.
        monitor_by: URNs that may see the action.
        manage_by: URNs that may see, cancel and release it.
        deadline_at: The deadline that was given, seconds since the epoch.
    """

    body: Mapping[str, Any]
    caller: Sequence[str]
    label: str | None = None
    monitor_by: Sequence[str] = ()
    manage_by: Sequence[str] = ()
    deadline_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One action.

    Attributes:
        number: Counts up, never used twice.
        memory: What the operation remembers from one look to the next; None until its first step has been done.
        began_at, deadline_at, completed_at: Seconds since the epoch.
        keep_s: So long it is kept after its completion.
    """

    number: int
    action_id: str
    provider: str
    creator_id: str
    asked: Asked
    status: ActionState
    display_status: str
    details: Mapping[str, Any]
    memory: Mapping[str, Any] | None
    began_at: float
    deadline_at: float
    completed_at: float | None
    keep_s: float

    @property
    def final(self) -> bool:
        """Whether nothing will change any more."""
        return self.status != "ACTIVE"

    @property
    def overdue(self) -> bool:
        """Whether it should have ended by now."""
        return not self.final and time.time() > self.deadline_at


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How far an action has come.

    Attributes:
        status: ACTIVE, SUCCEEDED or FAILED.
        display_status: The same for people, cut to 64 characters.
        details: Progress, the result, or the cause of the failure.
        memory: What the operation wants to find at the next step.
    """

    status: ActionState
    display_status: str
    details: Mapping[str, Any]
    memory: Mapping[str, Any] | None = field(default_factory=dict)


class LogEntry(NamedTuple):
    """One line of an action's log; `at` in seconds since the epoch."""

    at: float
    code: str
    description: str


class Records:
    """The records in `state_dir`, a directory of this user alone (the registry has checked it).

    Raises:
        RegistryError: When they cannot be read or written.
    """

    def __init__(self, state_dir: Path) -> None:
        self._file = state_dir / "actions.sqlite"
        self._mutex = threading.RLock()
        self._busy: set[int] = set()
        try:
            # never closed before the end: closing any descriptor of a file frees the process's locks on it
            self._locks = os.open(state_dir / "actions.locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as wrong:
            raise self._unusable(wrong) from wrong
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, 0)  # SQLite does not wait for the switch to WAL
            try:
                self._db = self._connect()
            finally:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, 0)
        except sqlite3.Error as wrong:
            os.close(self._locks)
            raise self._unusable(wrong) from wrong
        except BaseException:
            os.close(self._locks)
            raise

    def close(self) -> None:
        """Close the files."""
        with self._mutex:
            if self._locks >= 0:
                self._db.close()
                os.close(self._locks)
                self._locks = -1

    # --- one action

    def add(
        self,
        provider: str,
        request_id: str,
        asked: Asked,
        *,
        deadline_at: float,
        keep_s: float,
    ) -> tuple[Record, bool]:
        """The action of this request, and whether it is new: one request_id of one caller is one action.

        Args:
            provider: The name of the provider.
            request_id: The caller's name for the request.
            asked: What is asked for.
            deadline_at: Seconds since the epoch.
            keep_s: Seconds to keep it after its completion.

        Raises:
            Conflict: When the request_id was used for something else.
            CapacityExhausted: When the caller has too many actions running.
        """
        creator = asked.caller[0]
        with self._transaction() as db:
            self._let_go(db, creator)
            row = db.execute(
                "SELECT * FROM actions WHERE provider = ? AND creator_id = ? AND request_id = ?",
                (provider, creator, request_id),
            ).fetchone()
            if row is not None:
                known = _record(row)
                differing = _differences(known, asked, keep_s)
                if differing:
                    raise Conflict(
                        f"request_id {request_id!r} was used before with different {', '.join(differing)}",
                        which=request_id,
                        hint="Use a new request_id for a new action",
                        fields=differing,
                    )
                return known, False
            (running,) = db.execute(
                "SELECT count(*) FROM actions WHERE creator_id = ? AND status = 'ACTIVE'", (creator,)
            ).fetchone()
            if running >= MAX_ACTIVE_PER_CREATOR:
                raise CapacityExhausted(
                    f"the caller has {running} actions running",
                    which=creator,
                    hint="Wait until some have ended, or cancel them",
                )
            cursor = db.execute(
                "INSERT INTO actions (action_id, provider, creator_id, request_id, asked, status, display_status,"
                " details, began_at, deadline_at, keep_s, forget_at)"
                " VALUES (?, ?, ?, ?, ?, 'ACTIVE', 'begun', '{}', ?, ?, ?, ?)",
                (
                    str(uuid.uuid4()),
                    provider,
                    creator,
                    request_id,
                    json.dumps(vars(asked)),
                    time.time(),
                    deadline_at,
                    keep_s,
                    deadline_at + keep_s,
                ),
            )
            row = db.execute("SELECT * FROM actions WHERE number = ?", (cursor.lastrowid,)).fetchone()
            record = _record(row)
            _log(db, record.number, "begun", f"{provider} was asked for")
            return record, True

    def knows(self, provider: str, creator_id: str, request_id: str) -> bool:
        """Whether this request was made before."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT 1 FROM actions WHERE provider = ? AND creator_id = ? AND request_id = ?",
                (provider, creator_id, request_id),
            ).fetchone()
            return row is not None

    def find(self, provider: str, action_id: str) -> Record | None:
        """The action, or None when there is none of this id at this provider."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT * FROM actions WHERE provider = ? AND action_id = ?", (provider, action_id)
            ).fetchone()
            self._let_go(db)  # after the look: one that is kept for no time at all is seen once
            return None if row is None else _record(row)

    def advance(self, record: Record, outcome: Outcome) -> bool:
        """Write how far the action has come; answers whether it was written: what is final, or gone, stays so."""
        display_status = outcome.display_status[:64] or outcome.status.lower()
        completed_at = None if outcome.status == "ACTIVE" else time.time()
        with self._transaction() as db:
            written = db.execute(
                "UPDATE actions SET status = ?, display_status = ?, details = ?, memory = ?, completed_at = ?,"
                " forget_at = coalesce(?, deadline_at) + keep_s WHERE number = ? AND status = 'ACTIVE'",
                (
                    outcome.status,
                    display_status,
                    json.dumps(outcome.details),
                    json.dumps(outcome.memory),
                    completed_at,
                    completed_at,
                    record.number,
                ),
            ).rowcount
            if written and (outcome.status != "ACTIVE" or display_status != record.display_status):
                _log(db, record.number, outcome.status.lower(), display_status)
            return bool(written)

    def remove(self, record: Record) -> None:
        """Forget an action that is final; its request_id is free again."""
        with self._transaction() as db:
            db.execute("DELETE FROM actions WHERE number = ? AND status != 'ACTIVE'", (record.number,))

    def log(self, record: Record) -> list[LogEntry]:
        """What happened to the action, the latest first, 100 entries at most."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT at, code, description FROM log WHERE action = ? ORDER BY rowid DESC", (record.number,)
            ).fetchall()
            return [LogEntry(*row) for row in rows]

    # --- several

    def of_provider(self, provider: str, statuses: Sequence[str]) -> Iterator[Record]:
        """The provider's actions in these states, the latest first."""
        with self._transaction() as db:
            self._let_go(db)
            rows = db.execute(
                f"SELECT * FROM actions WHERE provider = ? AND status IN ({', '.join('?' * len(statuses))})"  # noqa: S608 - question marks only
                " ORDER BY number DESC",
                (provider, *statuses),
            ).fetchall()
        return map(_record, rows)

    @contextlib.contextmanager
    def working_on(self, record: Record) -> Iterator[bool]:
        """Work on the action, unless another thread or process does; answers whether this one may.

        The kernel frees the place of a process that was killed.
        """
        if not self._take(record.number):
            yield False
            return
        try:
            yield True
        finally:
            self._give_back(record.number)

    def _take(self, number: int) -> bool:
        with self._mutex:  # locks of one process do not exclude its threads
            if number in self._busy:
                return False
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except BlockingIOError:
                return False
            self._busy.add(number)
            return True

    def _give_back(self, number: int) -> None:
        with self._mutex:
            self._busy.discard(number)
            if self._locks >= 0:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, number)

    # --- the database

    def _let_go(self, db: sqlite3.Connection, creator: str | None = None) -> None:
        """Remove what has been kept long enough, and the oldest of a creator who has too many."""
        db.execute("DELETE FROM actions WHERE forget_at < ?", (time.time(),))
        if creator is not None:
            db.execute(
                "DELETE FROM actions WHERE number IN (SELECT number FROM actions WHERE creator_id = ?"
                " AND status != 'ACTIVE' ORDER BY number DESC LIMIT -1 OFFSET ?)",
                (creator, MAX_FINISHED_PER_CREATOR),
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as wrong:
                raise self._unusable(wrong) from wrong

    def _connect(self) -> sqlite3.Connection:
        os.close(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(self._file, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self._file.chmod(0o600)
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA foreign_keys = ON")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                db.executescript(f"BEGIN;{_SCHEMA};PRAGMA user_version = {_SCHEMA_VERSION};COMMIT")
            elif version != _SCHEMA_VERSION:
                raise RegistryError(
                    f"{self._file} has layout {version}, this version reads {_SCHEMA_VERSION}",
                    which=str(self._file),
                    hint="Use the version that wrote it, or move the file away: streams do not depend on it",
                )
        except BaseException:
            db.close()
            raise
        return db

    def _unusable(self, wrong: Exception) -> RegistryError:
        return RegistryError(
            f"the records of actions in {self._file} cannot be used: {wrong}",
            which=str(self._file),
            hint="Look at the disk and its permissions",
        )


def _record(row: sqlite3.Row) -> Record:
    return Record(
        number=row["number"],
        action_id=row["action_id"],
        provider=row["provider"],
        creator_id=row["creator_id"],
        asked=Asked(**json.loads(row["asked"])),
        status=row["status"],
        display_status=row["display_status"],
        details=json.loads(row["details"]),
        memory=None if row["memory"] is None else json.loads(row["memory"]),
        began_at=row["began_at"],
        deadline_at=row["deadline_at"],
        completed_at=row["completed_at"],
        keep_s=row["keep_s"],
    )


def _differences(known: Record, asked: Asked, keep_s: float) -> list[str]:
    # the caller's URNs are not compared: the same caller may be in other groups by now
    names = {
        "body": "body",
        "label": "label",
        "monitor_by": "monitor_by",
        "manage_by": "manage_by",
        "deadline_at": "deadline",
    }
    again = json.loads(json.dumps(vars(asked)))
    differing = [said for name, said in names.items() if vars(known.asked)[name] != again[name]]
    return differing + ([] if known.keep_s == keep_s else ["release_after"])


def _log(db: sqlite3.Connection, number: int, code: str, description: str) -> None:
    db.execute("INSERT INTO log VALUES (?, ?, ?, ?)", (number, time.time(), code, description))
    db.execute(
        "DELETE FROM log WHERE rowid IN"
        " (SELECT rowid FROM log WHERE action = ? ORDER BY rowid DESC LIMIT -1 OFFSET ?)",
        (number, MAX_LOG_ENTRIES),
    )
