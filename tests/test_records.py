"""The records of actions: once, final, bounded, and there after a crash."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scistream_flows.actions import records as module
from scistream_flows.actions.records import Asked, Outcome, Record, Records
from scistream_flows.errors import CapacityExhausted, Conflict, RegistryError

ALICE, BOB = "urn:globus:auth:identity:a", "urn:globus:auth:identity:b"
DONE = Outcome(status="SUCCEEDED", display_status="done", details={"n": 1})


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    records = Records(tmp_path)
    yield records
    records.close()


def add(
    records: Records, request_id: str = "r", *, caller: str = ALICE, provider: str = "start", **more: Any
) -> tuple[Record, bool]:
    options = {"deadline_at": time.time() + 60, "keep_s": 60.0} | {
        name: more.pop(name) for name in ("deadline_at", "keep_s") if name in more
    }
    asked = Asked(**({"body": {"stream_id": "s"}, "caller": [caller]} | more))
    added: tuple[Record, bool] = records.add(provider, request_id, asked, **options)
    return added


def test_the_same_request_is_the_same_action(records: Records) -> None:
    first, new = add(records)
    again, new_again = add(records)
    assert (new, new_again) == (True, False)
    assert again == first


def test_twenty_threads_with_one_request_get_one_action(records: Records) -> None:
    with ThreadPoolExecutor(20) as pool:
        found = [one.result() for one in [pool.submit(add, records) for _ in range(20)]]
    assert len({record.action_id for record, _ in found}) == 1
    assert sum(new for _, new in found) == 1


def test_a_request_id_with_other_content_is_a_conflict_that_names_what_differs(records: Records) -> None:
    add(records)
    with pytest.raises(Conflict, match="different body, label"):
        add(records, body={"stream_id": "t"}, label="other")
    asked = Asked(body={"stream_id": "s"}, caller=[ALICE], deadline_at=1e12)
    with pytest.raises(Conflict, match="deadline, release_after"):
        records.add("start", "r", asked, deadline_at=1e12, keep_s=1)


def test_a_request_id_is_of_one_caller_and_one_provider(records: Records) -> None:
    assert add(records)[1]
    assert add(records, caller=BOB)[1]
    assert add(records, provider="monitor")[1]


def test_the_same_caller_may_be_in_other_groups_when_it_asks_again(records: Records) -> None:
    first, _ = add(records)
    again, new = records.add(
        "start",
        "r",
        Asked(body={"stream_id": "s"}, caller=[ALICE, "urn:globus:groups:id:g"]),
        deadline_at=0,
        keep_s=60,
    )
    assert (again.action_id, new) == (first.action_id, False)


def test_a_final_status_is_never_overwritten(records: Records) -> None:
    record, _ = add(records)
    assert records.advance(record, DONE)
    for status in ("ACTIVE", "FAILED", "SUCCEEDED"):
        assert not records.advance(record, Outcome(status=status, display_status="no", details={}))
    now = records.find("start", record.action_id)
    assert now is not None
    assert (now.status, now.details, now.final) == ("SUCCEEDED", {"n": 1}, True)
    assert now.completed_at is not None


def test_of_many_that_finish_an_action_at_once_one_wins(records: Records) -> None:
    record, _ = add(records)
    outcomes = [Outcome(status="SUCCEEDED", display_status=str(n), details={"n": n}) for n in range(20)]
    with ThreadPoolExecutor(20) as pool:
        written = list(pool.map(lambda outcome: records.advance(record, outcome), outcomes))
    now = records.find("start", record.action_id)
    assert sum(written) == 1
    assert now is not None
    assert now.details == {"n": written.index(True)}


def test_a_display_status_has_1_to_64_characters(records: Records) -> None:
    for said, stored in (("x" * 100, "x" * 64), ("", "active")):
        record, _ = add(records, request_id=said)
        records.advance(record, Outcome(status="ACTIVE", display_status=said, details={}))
        now = records.find("start", record.action_id)
        assert now is not None
        assert now.display_status == stored


def test_an_action_is_forgotten_when_its_time_is_over(records: Records, within: Callable[..., None]) -> None:
    record, _ = add(records, keep_s=0.05)
    records.advance(record, DONE)
    within(lambda: records.find("start", record.action_id) is None)
    assert add(records, keep_s=0.05)[1]


def test_an_action_that_is_kept_for_no_time_is_seen_once(records: Records) -> None:
    record, _ = add(records, keep_s=0)
    records.advance(record, DONE)
    last = records.find("start", record.action_id)
    assert last is not None
    assert last.status == "SUCCEEDED"
    assert records.find("start", record.action_id) is None


def test_an_action_that_nobody_looks_at_is_forgotten_after_its_deadline(
    records: Records, within: Callable[..., None]
) -> None:
    record, _ = add(records, deadline_at=time.time() + 0.02, keep_s=0.02)
    within(lambda: records.find("start", record.action_id) is None)


def test_only_what_is_final_can_be_removed(records: Records) -> None:
    record, _ = add(records)
    records.remove(record)
    assert records.find("start", record.action_id)
    records.advance(record, DONE)
    records.remove(record)
    assert records.find("start", record.action_id) is None
    assert records.log(record) == []


def test_a_creator_has_a_bounded_number_of_actions(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ACTIVE_PER_CREATOR", 3)
    monkeypatch.setattr(module, "MAX_FINISHED_PER_CREATOR", 2)
    running = [add(records, str(n))[0] for n in range(3)]
    with pytest.raises(CapacityExhausted, match="3 actions running"):
        add(records, "4")
    assert add(records, "4", caller=BOB)[1]
    for record in running:
        records.advance(record, DONE)
    add(records, "5")
    assert records.find("start", running[0].action_id) is None  # the oldest of the finished ones
    assert records.find("start", running[2].action_id)


def test_the_log_says_what_happened_and_is_bounded(records: Records) -> None:
    record, _ = add(records)
    for n in range(150):
        records.advance(record, Outcome(status="ACTIVE", display_status=f"step {n}", details={}))
    records.advance(record, DONE)
    entries = records.log(record)
    assert len(entries) == module.MAX_LOG_ENTRIES
    assert [(one.code, one.description) for one in entries[:2]] == [
        ("succeeded", "done"),
        ("active", "step 149"),
    ]


def test_one_thread_at_a_time_works_on_an_action(records: Records) -> None:
    record, _ = add(records)
    refused: list[bool] = []

    def other() -> None:
        with records.working_on(record) as mine:
            refused.append(not mine)

    with records.working_on(record) as mine:
        assert mine
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert refused == [True]
    with records.working_on(record) as mine:
        assert mine


HOLDER = """
import sys, time
from pathlib import Path
from scistream_flows.actions.records import Records
records = Records(Path(sys.argv[1]))
with records.working_on(records.find("start", sys.argv[2])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_gives_back_what_it_worked_on(
    records: Records, tmp_path: Path, within: Callable[..., None]
) -> None:
    record, _ = add(records)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path, record.action_id], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with records.working_on(record) as mine:
            assert not mine
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(10)

    def free() -> bool:
        with records.working_on(record) as mine:
            return bool(mine)

    within(free)


def test_records_survive_their_process(records: Records, tmp_path: Path) -> None:
    record, _ = add(records, label="mine", monitor_by=[BOB])
    records.advance(record, Outcome(status="ACTIVE", display_status="on", details={"a": 1}, memory={"b": 2}))
    others = Records(tmp_path)
    found = others.find("start", record.action_id)
    assert found is not None
    assert (found.asked, found.details, found.memory) == (record.asked, {"a": 1}, {"b": 2})
    others.close()


OPENER = """
import sys
from pathlib import Path
from scistream_flows.actions.records import Records
Records(Path(sys.argv[1])).close()
"""


def test_many_processes_may_open_new_records_at_once(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", OPENER, tmp_path]) for _ in range(4)]
    assert [one.wait(60) for one in processes] == [0, 0, 0, 0]


def test_the_file_is_of_its_user_alone(records: Records, tmp_path: Path) -> None:
    add(records)
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}, modes


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "actions.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(RegistryError, match="layout 99"):
        Records(tmp_path)
