"""How often a caller may ask, at every door; and what strangers can cost."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Caller, Served, serving
from standins.globus import INTROSPECT, Globus
from test_provider import with_client

from scistream_flows import connect_facility
from scistream_flows.actions.admission import REFUSED_AT_ONCE, REFUSED_PER_MIN
from scistream_flows.allowance import Allowance
from scistream_flows.config import Policy, Quota, load_facility
from scistream_flows.doorway import ask, serve_socket
from scistream_flows.errors import RateLimited, error_from_document
from scistream_flows.policy import paced
from scistream_flows.registry import Registry
from scistream_flows.rest import RestService
from scistream_flows.s2cs import REFUSALS_AT_ONCE, S2CS, unix_owner

Make = Callable[..., S2CS]
ALICE, BOB, ALSO_ALICE = "urn:test:alice", "urn:test:bob", "urn:test:alice-at-home"
GROUP = "urn:globus:groups:id:00000000-0000-4000-8000-000000000003"
SLOW = "max_requests_per_min_per_caller = 1\nrequest_burst_per_caller = 5\n"


def denied(state_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (state_dir / "audit.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "deny"]


# --- the arithmetic


def test_a_burst_may_come_at_once_and_then_so_many_a_minute() -> None:
    busy, waits = 0.0, []
    for _ in range(4):
        busy, wait = paced(busy, 100.0, per_min=60, burst=3)
        waits.append(wait)
    assert waits == [0, 0, 0, pytest.approx(1)]
    busy, wait = paced(busy, 101.0, per_min=60, burst=3)
    assert wait == 0
    assert paced(busy, 101.0, per_min=60, burst=3)[1] == pytest.approx(1)


def test_who_is_refused_does_not_push_his_turn_away() -> None:
    busy = 0.0
    for _ in range(1000):
        busy, _ = paced(busy, 100.0, per_min=60, burst=3)
    assert paced(busy, 101.0, per_min=60, burst=3)[1] == 0


def test_a_clock_that_was_set_back_costs_a_burst_at_most() -> None:
    busy, wait = paced(1e9, 100.0, per_min=60, burst=3)
    assert wait == pytest.approx(1)
    assert paced(busy, 101.0, per_min=60, burst=3)[1] == 0


def test_by_default_a_flow_may_look_at_every_stream_of_an_owner_every_two_seconds() -> None:
    policy = Policy()
    busy, now_s = 0.0, 1000.0
    for _ in range(300):
        for _ in range(policy.max_streams_per_owner):
            busy, wait = paced(
                busy,
                now_s,
                per_min=policy.max_requests_per_min_per_caller,
                burst=policy.request_burst_per_caller,
            )
            assert wait == 0
        now_s += 2


def test_many_strangers_take_no_more_memory_than_some() -> None:
    allowance = Allowance(per_min=60, burst=1, most=100)
    for number in range(10_000):
        assert allowance.take(str(number)) == 0
    assert len(allowance) == 100
    assert allowance.take("9999") > 0
    assert allowance.wait_s("0") == 0  # forgotten


# --- in S2CS


ELSEWHERE = """
import sys
from scistream_flows.config import load_facility
from scistream_flows.errors import RateLimited
from scistream_flows.s2cs import S2CS
with S2CS(load_facility("aps")) as service:
    try:
        service.pace(sys.argv[1])
        print(0)
    except RateLimited as limited:
        print(limited.retry_after_s)
"""


def count_elsewhere(owner: str, limits: dict[str, str]) -> float:
    """How long a process of its own has to wait with a request of this caller."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, owner],
        check=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, **limits},
    )
    return float(done.stdout)


def test_all_processes_of_a_facility_count_together(facility: Make) -> None:
    limits = {
        "SCISTREAM_POLICY_MAX_REQUESTS_PER_MIN_PER_CALLER": "2",
        "SCISTREAM_POLICY_REQUEST_BURST_PER_CALLER": "3",
    }
    service = facility("aps", **limits)
    for _ in range(2):
        service.pace(ALICE)
    assert count_elsewhere(ALICE, limits) == 0
    assert 0 < count_elsewhere(ALICE, limits) <= 30
    with pytest.raises(RateLimited, match="more than 2 times a minute") as caught:
        service.pace(ALICE)
    assert 0 < caught.value.retry_after_s <= 30
    service.pace(BOB)


def test_a_restart_of_the_machine_shuts_nobody_out(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "state")
    registry.pace(ALICE, per_min=6000, burst=2)
    with contextlib.closing(sqlite3.connect(tmp_path / "state/registry.sqlite")) as database:
        database.execute("UPDATE callers SET busy_until_s = busy_until_s + 1e6")  # the clock began anew
        database.commit()
    wait_s = registry.pace(ALICE, per_min=6000, burst=2)
    assert 0 < wait_s <= 0.011
    time.sleep(wait_s)
    assert registry.pace(ALICE, per_min=6000, burst=2) == 0
    registry.close()


def test_linked_identities_are_one_caller_and_a_group_is_many(facility: Make, site: Any) -> None:
    quota = [{"users": [BOB], "request_burst_per_caller": 9}]
    site("aps", {}, max_requests_per_min_per_caller=1, request_burst_per_caller=4, quota=quota)
    service = facility()
    for caller in ((ALICE, ALSO_ALICE), (ALSO_ALICE, ALICE, GROUP)):
        for _ in range(2):
            service.pace(caller)
    with pytest.raises(RateLimited):
        service.pace((ALSO_ALICE, ALICE))
    for _ in range(9):
        service.pace((BOB, GROUP))
    with pytest.raises(RateLimited):
        service.pace(BOB)


def test_nought_is_no_limit(facility: Make) -> None:
    service = facility("aps", SCISTREAM_POLICY_MAX_REQUESTS_PER_MIN_PER_CALLER="0")
    for _ in range(2 * Policy().request_burst_per_caller):
        service.pace(ALICE)


def test_a_quota_may_have_every_limit_of_the_policy() -> None:
    limits = {name for name in Policy.model_fields if name.startswith(("max_", "longest_", "request_"))}
    assert limits < {*Quota.model_fields}


# --- by HTTP


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, "aps", more=SLOW) as served:
        yield served


def test_who_asks_too_often_is_told_when_to_ask_again(slow: Served) -> None:
    caller = Caller(slow, slow.token)
    asked: list[Callable[[], httpx.Response]] = [
        lambda: caller.ask("GET", "/streams"),
        lambda: caller.ask("GET", "/streams/s/PROD"),
        lambda: caller.run("status", {"stream_id": "s", "role": "PROD"}),
        lambda: caller.ask("GET", "/actions/monitor/x/status"),
        lambda: caller.ask("POST", "/streams/s/PROD/renew", json={}),
    ]
    assert [one().status_code for one in asked] == [200, 404, 202, 404, 404]
    for one in asked:
        answer = one()
        assert (answer.status_code, answer.json()["code"]) == (429, "rate-limited")
        assert 50 <= int(answer.headers["Retry-After"]) <= 60
        assert answer.json()["details"]["retry_after_s"] == int(answer.headers["Retry-After"])
    # what needs no caller is answered all the same
    assert caller.ask("GET", "/health").status_code == 200
    assert caller.ask("GET", "/actions/start/").status_code == 200
    lines = [line for line in denied(slow.state_dir) if line["code"] == "rate-limited"]
    assert [(line["owner"], line["from"]) for line in lines] == len(asked) * [(unix_owner(), "127.0.0.1")]
    caller.close()


def test_a_client_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCISTREAM_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path / "none"))
    pace = "max_requests_per_min_per_caller = 120\nrequest_burst_per_caller = 1\n"
    with serving(tmp_path, "aps", more=pace) as served, connect_facility(served.url) as facility:  # type: ignore[attr-defined]
        for _ in range(4):
            assert facility.list().streams == []
    assert any(line["code"] == "rate-limited" for line in denied(served.state_dir))


@pytest.mark.parametrize("said", [-5, 0, float("nan"), float("inf"), "soon", None, True])
def test_a_pause_that_is_none_is_a_second(said: object) -> None:
    document = RateLimited("too often", retry_after_s=said).to_document()
    limited = error_from_document(document)
    assert isinstance(limited, RateLimited)
    assert limited.retry_after_s == 1


def test_who_cannot_wait_so_long_gets_the_typed_error(slow: Served) -> None:
    service = RestService(slow.url, authorizer=lambda _: slow.token, deadline_s=5)
    said = [service.answer("list", {}) for _ in range(6)]
    service.close()
    assert [one["ok"] for one in said] == 5 * [True] + [False]
    limited = error_from_document(said[-1]["error"])
    assert isinstance(limited, RateLimited)
    assert limited.retry_after_s > 5


# --- at the socket


def test_an_account_at_the_socket_has_the_same_limit(
    state_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # paths of sockets are short
        path = Path(place) / "s2cs.sock"
        text = '[facility]\nname = "aps"\n[[gateway]]\nname = "gw"\nwan_bind = "127.0.0.1"\nlan_bind = "127.0.0.1"\n'
        (Path(place) / "aps.toml").write_text(f'{text}[policy]\n{SLOW}[service]\nsocket = "{path}"\n')
        monkeypatch.setenv("SCISTREAM_CONFIG_DIR", place)
        with serve_socket(load_facility("aps")):
            said = [ask(path, "list", {"protocol": 1}, deadline_s=5) for _ in range(7)]
    assert [one["ok"] for one in said] == 5 * [True] + 2 * [False]
    assert said[-1]["error"]["code"] == "rate-limited"
    (first, *_) = denied(state_base / "aps")
    assert (first["owner"], first["from"]) == (unix_owner(), f"uid {os.geteuid()} pid {os.getpid()}")


# --- strangers


def test_a_flood_of_strangers_is_bounded_and_shuts_nobody_out(tmp_path: Path) -> None:
    with Globus() as globus, with_client(globus, tmp_path, "aps") as served:
        ada = globus.add_person("ada@example.org")
        known = Caller(served, globus.mint(ada, served.scope))
        assert known.ask("GET", "/streams").status_code == 200
        before, began = globus.calls[INTROSPECT], time.monotonic()
        with httpx.Client(base_url=served.url, timeout=30) as strangers:
            answers = [
                strangers.get("/streams", headers={"Authorization": f"Bearer guess-{number}"})
                for number in range(2 * REFUSED_AT_ONCE)
            ]
            tickets = [strangers.post("/hello", json={"ticket": "sst_" + 43 * "x"}) for _ in range(3)]
            # a token that is known to be none costs nothing
            again = strangers.get("/streams", headers={"Authorization": "Bearer guess-0"})
        statuses = [one.status_code for one in answers]
        assert statuses[:REFUSED_AT_ONCE] == REFUSED_AT_ONCE * [401]
        assert int(answers[statuses.index(429)].headers["Retry-After"]) >= 1
        admitted = REFUSED_AT_ONCE + (time.monotonic() - began) * REFUSED_PER_MIN / 60 + 1
        assert globus.calls[INTROSPECT] - before <= admitted < len(answers)
        assert 429 in [one.status_code for one in tickets]
        assert again.status_code == 401
        assert known.ask("GET", "/streams").status_code == 200
        known.close()
        served.stop()
        lines = denied(served.state_dir)
        assert len(lines) <= REFUSALS_AT_ONCE + 5
        assert {"unauthenticated", "rate-limited"} >= {line["code"] for line in lines if "code" in line}
        assert (
            sum(1 + line.get("unwritten", 0) for line in lines if "code" in line)
            + lines[-1].get("unwritten", 0)
            >= 2 * REFUSED_AT_ONCE
        )
        assert "guess" not in (served.state_dir / "audit.jsonl").read_text() + served.log.read_text()
