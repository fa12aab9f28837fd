"""The registry: locks that the kernel frees, intents before relays, state that is the user's alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scistream_flows import registry as registry_module
from scistream_flows.errors import Busy, ConfigError, RegistryError
from scistream_flows.models import Listener, Offer, OfferedRelay, RelayStatus, Request
from scistream_flows.policy import Usage
from scistream_flows.registry import KEEP_ENDED_S, Key, Placement, Registry, RelayRow, file_system_of

KEY = Key("urn:a", "s", "PROD")
OTHER = Key("urn:b", "s", "PROD")
INDEXES = {"streams_by_name", "streams_by_owner", "streams_by_phase"}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "state")
    yield registry
    registry.close()


def row(
    relay_id: str = "1" * 32,
    *,
    gateway: str = "gw",
    indices: tuple[int, ...] = (0,),
    connections: int = 64,
    reserved: int = 0,
) -> RelayRow:
    return RelayRow(
        relay_id=relay_id,
        gateway=gateway,
        indices=indices,
        connections=connections,
        reserved_mbits_per_s=reserved,
    )


def request(uid: str = "s") -> Request:
    return Request(uid=uid, role="PROD")


def offer() -> Offer:
    relay = OfferedRelay(
        relay_id="1" * 32,
        gateway="gw",
        public_key="A" * 43,
        listeners=[Listener(index=0, address="192.0.2.1:1")],
    )
    return Offer(uid="s", role="PROD", mode="tls", lease_remaining_s=1, relays=[relay])


def test_a_stream_goes_from_opening_to_open_to_ended(registry: Registry) -> None:
    stream = registry.claim(KEY, request(), lambda _: [row()])
    assert (stream.phase, stream.offer, stream.relays) == ("opening", None, (row(),))
    registry.opened(stream, offer())
    found = registry.find(KEY)
    assert found is not None
    assert (found.phase, found.offer, found.request) == ("open", offer(), request())
    end = RelayStatus(relay_id="1" * 32, role="PROD", state="ENDED", reason="finished")
    registry.ended(stream, [end])
    found = registry.find(KEY)
    assert found is not None
    assert (found.phase, found.ended) == ("ended", (end,))


def test_the_first_end_is_the_one_that_stays(registry: Registry) -> None:
    stream = registry.claim(KEY, request(), lambda _: [row()])
    registry.ended(stream, [RelayStatus(relay_id="1" * 32, role="PROD", state="ENDED", reason="finished")])
    registry.ended(stream, [RelayStatus(relay_id="1" * 32, role="PROD", state="FAILED", reason="relay_lost")])
    found = registry.find(KEY)
    assert found is not None
    assert found.ended[0].reason == "finished"


def test_streams_of_one_name_belong_to_their_owners(registry: Registry) -> None:
    registry.claim(KEY, request(), lambda _: [row()])
    assert registry.find(OTHER) is None
    registry.claim(OTHER, request(), lambda _: [row("2" * 32)])
    assert [one.key.owner for one in registry.named("s", "PROD")] == ["urn:a", "urn:b"]
    assert set(registry.relays()) == {"1" * 32, "2" * 32}


def test_a_new_claim_takes_the_place_of_an_ended_stream(registry: Registry) -> None:
    stream = registry.claim(KEY, request(), lambda _: [row()])
    registry.ended(stream, [])
    assert registry.relays() == {}
    registry.claim(KEY, request(), lambda _: [row("2" * 32)])
    assert set(registry.relays()) == {"2" * 32}


def test_a_claim_that_is_taken_back_leaves_nothing(registry: Registry) -> None:
    registry.discard(registry.claim(KEY, request(), lambda _: [row()]))
    assert registry.find(KEY) is None
    assert registry.relays() == {}


def test_nothing_looks_through_all_that_has_ended(registry: Registry) -> None:
    """Thousands of ends are kept for a day: what the verbs ask of SQLite goes by an index."""
    asked: list[str] = []
    stream = registry.claim(KEY, request(), lambda _: [row()])
    registry._open().set_trace_callback(asked.append)
    registry.ended(stream, [])
    stream = registry.claim(KEY, request(), lambda _: [row("2" * 32)])
    registry.opened(stream, offer())
    registry.find(KEY)
    registry.named("s", "PROD")
    registry.streams("opening", "open")
    registry.relays()
    registry.usage("urn:a")
    registry.mentions("urn:globus:groups:id:", uid="s")
    registry.discard(stream)
    registry._open().set_trace_callback(None)
    questions = [one for one in asked if one.startswith(("SELECT", "UPDATE", "DELETE", "INSERT"))]
    assert len(questions) > 15
    for question in questions:
        with registry._transaction() as db:
            plan = [step["detail"] for step in db.execute(f"EXPLAIN QUERY PLAN {question}")]
        assert not [step for step in plan if step.startswith(("SCAN streams", "SCAN relays"))], question


def test_a_registry_that_had_no_indexes_gets_them(registry: Registry) -> None:
    names = "SELECT name FROM sqlite_master WHERE type = 'index' AND name LIKE 'streams_by_%'"
    with registry._transaction() as db:
        for name in INDEXES:
            db.execute(f"DROP INDEX {name}")
    registry.close()
    registry.find(KEY)
    with registry._transaction() as db:
        assert {one["name"] for one in db.execute(names)} == INDEXES


def test_a_claim_adds_up_what_is_open_without_reading_the_documents_of_streams(registry: Registry) -> None:
    asked: list[str] = []
    registry._open().set_trace_callback(asked.append)
    registry.usage("urn:a")
    registry._open().set_trace_callback(None)
    with registry._transaction() as db:
        plans = [db.execute(f"EXPLAIN QUERY PLAN {one}").fetchall() for one in asked if "FROM streams" in one]
    steps = [step["detail"] for plan in plans for step in plan if "streams" in step["detail"]]
    assert len(steps) == 3
    assert all("COVERING INDEX streams_by_owner" in step for step in steps)


def test_usage_counts_what_is_open_or_opening(registry: Registry) -> None:
    seen: list[Usage] = []

    def place(relay: RelayRow) -> Placement:
        def see(usage: Usage) -> list[RelayRow]:
            seen.append(usage)
            return [relay]

        return see

    first = registry.claim(KEY, request(), place(row(indices=(0, 1, 2), connections=192, reserved=100)))
    registry.claim(OTHER, request(), place(row("2" * 32, indices=(0, 1), connections=20, reserved=50)))
    registry.ended(first, [])
    registry.claim(KEY, request(), place(row("3" * 32)))
    assert [usage.listeners for usage in seen] == [{}, {"gw": 3}, {"gw": 2}]
    assert [usage.reserved_mbits_per_s for usage in seen] == [{}, {"gw": 100}, {"gw": 50}]
    assert [usage.connections for usage in seen] == [{}, {"gw": 192}, {"gw": 20}]
    assert [usage.streams for usage in seen] == [{}, {"gw": 1}, {"gw": 1}]
    assert [usage.streams_of_owner for usage in seen] == [0, 0, 0]
    mine = registry.usage(OTHER.owner)
    assert (mine.streams_of_owner, mine.reserved_of_owner_mbits_per_s) == (1, 50)


def test_which_listeners_a_relay_has_is_kept(registry: Registry) -> None:
    rows = [row(indices=(0, 2)), row("2" * 32, gateway="gw2", indices=(1,))]
    registry.claim(KEY, request(), lambda _: rows)
    found = registry.find(KEY)
    assert found is not None
    assert found.relays == tuple(rows)


def test_a_gateway_drains_in_every_process_until_it_is_taken_back(registry: Registry, tmp_path: Path) -> None:
    other = Registry(tmp_path / "state")
    assert registry.drain("gw", draining=True)
    assert not other.drain("gw", draining=True)
    assert other.usage("urn:a").draining == {"gw"}
    assert other.drain("gw", draining=False)
    assert not registry.drain("gw", draining=False)
    assert registry.usage("urn:a").draining == frozenset()
    other.close()


# A database as the first version of this package wrote it: one stream, one relay with three listeners.
FIRST_LAYOUT = """
CREATE TABLE streams (
    id INTEGER PRIMARY KEY, owner TEXT NOT NULL, uid TEXT NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('PROD', 'CONS')),
    phase TEXT NOT NULL CHECK (phase IN ('opening', 'open', 'ended')),
    request TEXT NOT NULL, offer TEXT, ended TEXT, ended_at REAL, UNIQUE (owner, uid, role)
);
CREATE TABLE relays (
    relay_id TEXT PRIMARY KEY, stream INTEGER NOT NULL REFERENCES streams (id) ON DELETE CASCADE,
    gateway TEXT NOT NULL, listeners INTEGER NOT NULL, reserved_mbits_per_s INTEGER NOT NULL
);
CREATE INDEX relays_of_stream ON relays (stream);
INSERT INTO streams (owner, uid, role, phase, request) VALUES ('urn:a', 's', 'PROD', 'opening',
    '{"protocol":1,"uid":"s","role":"PROD","num_conn":3,"max_connections":10}');
INSERT INTO relays VALUES ('11111111111111111111111111111111', 1, 'gw', 3, 70);
PRAGMA user_version = 1;
"""


def test_a_registry_of_the_first_layout_is_read_and_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    with sqlite3.connect(state / "registry.sqlite") as db:
        db.executescript(FIRST_LAYOUT)
    old_version = sqlite3.connect(
        state / "registry.sqlite"
    )  # still serving, and knows nothing of the new columns
    registry = Registry(state)
    found = registry.find(KEY)
    assert found is not None
    assert found.relays == (row(indices=(0, 1, 2), connections=30, reserved=70),)
    assert registry.drain("gw", draining=True)
    with old_version:
        old_version.execute(
            "INSERT INTO relays (relay_id, stream, gateway, listeners, reserved_mbits_per_s)"
            " VALUES (?, 1, 'gw', 2, 5)",
            ("2" * 32,),
        )
    old_version.close()
    found = registry.find(KEY)
    assert found is not None
    assert found.relays[1].indices == (0, 1)
    registry.close()
    Registry(state).close()  # and it is migrated once only


def test_a_stream_is_written_as_the_version_before_can_read_it(registry: Registry) -> None:
    wide = Request(uid="s", role="PROD", num_conn=2, gateways=2)
    registry.claim(KEY, wide, lambda _: [row(), row("2" * 32, gateway="gw2", indices=(1,))])
    with contextlib.closing(sqlite3.connect(registry.state_dir / "registry.sqlite")) as db:
        (text,) = db.execute("SELECT request FROM streams").fetchone()
    assert "gateways" not in json.loads(text)  # which that version does not know, and would refuse
    found = registry.find(KEY)
    assert found is not None
    assert found.request == wide


def test_all_identities_of_an_owner_count_for_what_he_has(registry: Registry) -> None:
    seen: list[int] = []

    def place(usage: Usage) -> list[RelayRow]:
        seen.append(usage.streams_of_owner)
        return [row(f"{len(seen)}" * 32)]

    registry.claim(KEY, request(), place)
    registry.claim(OTHER, request(), place)
    registry.claim(Key("urn:c", "s", "PROD"), request(), place, identities=("urn:c", "urn:b", "urn:a"))
    assert seen == [0, 0, 2]


def test_a_placement_that_refuses_leaves_the_ended_stream_as_it_was(registry: Registry) -> None:
    registry.ended(registry.claim(KEY, request(), lambda _: [row()]), [])

    def refuse(usage: Usage) -> list[RelayRow]:
        raise Busy(f"no, with {usage.streams_of_owner}")

    with pytest.raises(Busy):
        registry.claim(KEY, request(), refuse)
    found = registry.find(KEY)
    assert found is not None
    assert found.phase == "ended"


def test_ends_are_forgotten_after_a_day(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.ended(registry.claim(KEY, request(), lambda _: [row()]), [])
    later = time.time() + KEEP_ENDED_S + 1
    monkeypatch.setattr(time, "time", lambda: later)
    registry.ended(registry.claim(OTHER, request(), lambda _: [row("2" * 32)]), [])
    assert registry.find(KEY) is None
    assert registry.find(OTHER) is not None


def test_a_lock_holds_against_other_threads_but_not_other_streams(registry: Registry) -> None:
    refused: list[object] = []

    def contend() -> None:
        try:
            with registry.lock(KEY, timeout_s=0.05):
                refused.append("got it")
        except Busy as busy:
            refused.append(busy)
        with registry.lock(OTHER, timeout_s=0.05):
            refused.append("the other")

    with registry.lock(KEY, timeout_s=1):
        thread = threading.Thread(target=contend)
        thread.start()
        thread.join()
        with registry.lock_if_free(KEY) as held:
            assert not held
    assert isinstance(refused[0], Busy)
    assert refused[1] == "the other"
    with registry.lock_if_free(KEY) as held:
        assert held


def test_a_waiting_thread_gets_the_lock_as_soon_as_it_is_free(registry: Registry) -> None:
    got = threading.Event()

    def wait() -> None:
        with registry.lock(KEY, timeout_s=5):
            got.set()

    thread = threading.Thread(target=wait)
    with registry.lock(KEY, timeout_s=1):
        thread.start()
        assert not got.wait(0.1)
    assert got.wait(5)
    thread.join()


HOLD = """
import sys, time
from pathlib import Path
from scistream_flows.registry import Key, Registry
registry = Registry(Path(sys.argv[1]))
with registry.lock(Key("urn:a", "s", "PROD"), timeout_s=5):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_goes_with_its_process_also_by_kill_9(registry: Registry) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(registry.state_dir)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with registry.lock_if_free(KEY) as held:
            assert not held
        holder.send_signal(signal.SIGKILL)
        with registry.lock(KEY, timeout_s=5):
            pass


def test_a_forked_child_has_a_database_of_its_own_and_holds_no_lock(registry: Registry) -> None:
    registry.claim(KEY, request(), lambda _: [row()])
    (done, child_is_done), (may_end, parent_is_done) = os.pipe(), os.pipe()
    try:
        with registry.lock(KEY, timeout_s=1):
            pid = os.fork()
            if pid == 0:
                os.close(parent_is_done)
                os.write(child_is_done, b"1" if registry.find(KEY) is not None else b"0")
                os.read(may_end, 1)  # the end of input, at the latest when the parent ends
                os._exit(0)
            assert os.read(done, 1) == b"1"
        with registry.lock(KEY, timeout_s=1):  # although the child still has a copy of the descriptor
            assert registry.find(KEY) is not None
    finally:
        for end in (done, child_is_done, may_end, parent_is_done):
            os.close(end)
    os.waitpid(pid, 0)


# In a program of its own: what is started anew cannot import a test module by its name.
OPENING = """
import pathlib, sys
from scistream_flows.models import Request
from scistream_flows.registry import Key, Registry, RelayRow
process = int(sys.argv[2])
registry = Registry(pathlib.Path(sys.argv[1]))
for number in range(20):
    relay = RelayRow(
        relay_id=f"{process:016x}{number:016x}", gateway="gw", indices=(0,), connections=1, reserved_mbits_per_s=0
    )
    key = Key("urn:a", f"s{process}-{number}", "PROD")
    registry.claim(key, Request(uid=key.uid, role="PROD"), lambda _: [relay])
registry.close()
"""


def test_many_processes_open_and_fill_one_new_registry_at_the_same_time(tmp_path: Path) -> None:
    argv = [sys.executable, "-W", "error", "-c", OPENING, str(tmp_path / "state")]
    processes = [subprocess.Popen([*argv, str(number)]) for number in range(6)]
    assert [process.wait(60) for process in processes] == [0] * 6
    registry = Registry(tmp_path / "state")
    assert len(registry.streams("opening")) == 120
    assert len(registry.relays()) == 120
    registry.close()


def test_a_new_registry_can_be_opened_by_several_at_the_very_same_moment(tmp_path: Path) -> None:
    # SQLite itself refuses one in twenty of these: it does not wait for the switch to its write-ahead log.
    def open_it(state_dir: Path, together: threading.Barrier) -> None:
        together.wait(10)
        Registry(state_dir).close()

    with ThreadPoolExecutor(4) as pool:
        for number in range(50):
            together = threading.Barrier(4)
            opening = [pool.submit(open_it, tmp_path / f"state-{number}", together) for _ in range(4)]
            for one in opening:
                one.result(30)


def test_the_state_is_the_users_alone(registry: Registry) -> None:
    registry.audit("open", KEY, mode="tls")
    with registry.lock(KEY, timeout_s=1):
        pass
    assert registry.state_dir.stat().st_mode & 0o777 == 0o700
    for file in registry.state_dir.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(ConfigError, match="not a directory of this user alone"):
        Registry(tmp_path / "open")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(ConfigError, match="not a directory of this user alone"):
        Registry(tmp_path / "theirs")


def test_a_place_that_cannot_hold_it_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot be used"):
        Registry(tmp_path / "file" / "state")


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /home rw,relatime shared:2 - nfs4 server:/home rw
31 30 0:41 / /home/local rw - tmpfs tmpfs rw
32 22 0:42 / /my\\040data rw - lustre mgs@tcp:/x rw
33 22 0:43 / /twice rw - ext4 /dev/a rw
34 22 0:44 / /twice rw - gpfs /dev/b rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib", "ext4"),
        ("/home/me/.local", "nfs4"),
        ("/home/local/x", "tmpfs"),
        ("/homes", "ext4"),
        ("/my data/x", "lustre"),
        ("/twice", "gpfs"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_innermost_mount(
    tmp_path: Path, path: str, kind: str
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert file_system_of(Path(path), mountinfo=tmp_path / "mountinfo") == kind


def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "file_system_of", lambda _: "lustre")
    with pytest.raises(ConfigError, match=r"network file system \(lustre\).*SCISTREAM_STATE_DIR"):
        Registry(tmp_path / "state")


def test_a_registry_of_another_layout_is_refused_and_left_alone(registry: Registry) -> None:
    registry.close()
    with sqlite3.connect(registry.state_dir / "registry.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(RegistryError, match="layout 99"):
        Registry(registry.state_dir)


def test_the_audit_log_has_one_json_line_an_event(registry: Registry) -> None:
    registry.audit("open", KEY, mode="tls")
    registry.audit("close", KEY, reason="finished")
    lines = [json.loads(line) for line in (registry.state_dir / "audit.jsonl").read_text().splitlines()]
    assert [(line["event"], line["owner"], line["uid"], line["role"]) for line in lines] == [
        ("open", *KEY),
        ("close", *KEY),
    ]
    assert lines[0]["at"].endswith("Z")


def test_a_registry_that_was_closed_opens_again_when_used(registry: Registry) -> None:
    registry.claim(KEY, request(), lambda _: [row()])
    registry.close()
    registry.close()
    assert registry.find(KEY) is not None


def test_the_audit_log_is_read_on_from_where_it_was_left(registry: Registry) -> None:
    everything = 1 << 20
    assert registry.audit_from(0, most_bytes=everything) == ([], 0)
    for number in range(3):
        registry.audit("open", Key("urn:a", f"s{number}", "PROD"))
    lines, end = registry.audit_from(0, most_bytes=everything)
    assert [one["uid"] for one in lines] == ["s0", "s1", "s2"]
    log = registry.state_dir / "audit.jsonl"
    assert registry.audit_from(end, most_bytes=everything) == ([], end)
    first, position = registry.audit_from(0, most_bytes=log.stat().st_size // 2)  # only whole lines
    rest, _ = registry.audit_from(position, most_bytes=everything)
    assert [*first, *rest] == lines
    with log.open("ab") as file:
        file.write(b'{"event": "op')  # its writer is at it, or was killed
    assert registry.audit_from(end, most_bytes=everything) == ([], end)
    log.write_text('{"event": "drain"}\n')  # another log in its place
    assert registry.audit_from(end, most_bytes=everything)[0] == [{"event": "drain"}]
