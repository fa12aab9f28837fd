"""The action providers when something breaks: a killed service, a gateway that hangs. Nothing is lost or left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import Caller, Served, serving

from scistream_flows.config import load_facility
from scistream_flows.registry import Key, Registry
from scistream_flows.s2cs import S2CS, unix_owner

Relays = Callable[..., list[int]]

HANGING = """
[[gateway]]
name = "far"
kind = "ssh"
host = "127.0.0.1"
port = {port}
user = "nobody"
wan_bind = "127.0.0.1"
lan_bind = "127.0.0.1"
connect_timeout_s = {timeout_s}
"""


@pytest.fixture
def base(tmp_path: Path, relays_below: Relays) -> Iterator[Path]:
    """Where the facilities keep their state; after the test no relay of theirs runs."""
    yield tmp_path
    assert relays_below(tmp_path, patience_s=5) == []


@contextlib.contextmanager
def calling(served: Served) -> Iterator[Caller]:
    caller = Caller(served, served.token)
    try:
        yield caller
    finally:
        caller.close()


def prod(uid: str = "s", **more: Any) -> dict[str, Any]:
    return {"stream_id": uid, "role": "PROD", "targets": ["127.0.0.1:9"]} | more


def of(uid: str = "s") -> dict[str, Any]:
    return {"stream_id": uid, "role": "PROD"}


WATCH = {**of(), "until": {"duration_s": 600}}


# --- kill -9


def run_and_be_killed(base: Path, step: str) -> None:
    with serving(base, "aps", killed_at=step) as served, calling(served) as caller:
        with pytest.raises(httpx.TransportError):
            caller.run("start", prod(), request_id="one")
        assert served.process.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("step", ["opening", "claimed", "started", "opened"])
def test_a_run_killed_at_any_step_is_finished_by_the_next_look(
    base: Path, step: str, relays_below: Relays
) -> None:
    run_and_be_killed(base, step)
    with serving(base, "aps", workers=2) as served, calling(served) as caller:
        (begun,) = caller.ask("GET", "/actions/start/actions").json()
        assert begun["status"] == "ACTIVE"
        done = caller.until_final("start", begun)
        assert done["status"] == "SUCCEEDED"
        assert len(relays_below(base)) == 1
        again = caller.run("start", prod(), request_id="one")
        assert (again.status_code, again.json()["details"]["offer"]) == (200, done["details"]["offer"])
        caller.details("release", of())


def test_the_same_run_after_a_kill_starts_one_relay(base: Path, relays_below: Relays) -> None:
    run_and_be_killed(base, "started")
    before = relays_below(base)
    with serving(base, "aps", workers=2) as served, calling(served) as caller:
        done = caller.done("start", prod(), request_id="one")
        assert done["status"] == "SUCCEEDED"
        assert relays_below(base) == before
        caller.details("release", of())


def test_a_cancelled_start_of_a_killed_service_leaves_nothing(base: Path, relays_below: Relays) -> None:
    run_and_be_killed(base, "started")
    with serving(base, "aps") as served, calling(served) as caller:
        (begun,) = caller.ask("GET", "/actions/start/actions").json()
        cancelled = caller.ask("POST", f"/actions/start/{begun['action_id']}/cancel").json()
        assert (cancelled["status"], cancelled["details"]["code"]) == ("FAILED", "cancelled")
        assert relays_below(base, patience_s=10) == []


def test_a_killed_worker_is_replaced_and_loses_nothing(base: Path, within: Callable[..., None]) -> None:
    with serving(base, "aps", workers=2) as served, calling(served) as caller:
        within(lambda: len(served.pids) >= 3, timeout_s=20)
        caller.details("start", prod(lease_s=600))
        watch = caller.run("monitor", WATCH).json()["action_id"]
        os.kill(served.pids[-1], signal.SIGKILL)

        def answers() -> bool:
            try:
                return bool(caller.status("monitor", watch)["status"] == "ACTIVE")
            except httpx.TransportError:  # a connection that the worker had
                return False

        within(answers, timeout_s=20)
        caller.close()
        caller.http = httpx.Client(timeout=30)
        caller.details("release", of())
        assert caller.done("monitor", WATCH)["status"] == "FAILED"


def test_workers_end_when_their_parent_is_killed(base: Path, within: Callable[..., None]) -> None:
    with serving(base, "aps", workers=2) as served:
        within(lambda: len(served.pids) >= 3, timeout_s=20)
        httpx.get(f"{served.url}/health", timeout=30).raise_for_status()
        workers = served.pids[1:]
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait(30)
        within(lambda: not any(psutil.pid_exists(pid) for pid in workers), timeout_s=30)


def test_everything_killed_and_started_again_goes_on(base: Path, relays_below: Relays) -> None:
    with serving(base, "aps", workers=2) as served, calling(served) as caller:
        caller.details("start", prod(lease_s=600))
        watch = caller.run("monitor", WATCH, request_id="watch").json()
        served.kill()
    relays = relays_below(base)
    assert len(relays) == 1
    with serving(base, "aps", workers=2) as served, calling(served) as caller:
        assert relays_below(base) == relays
        now = caller.status("monitor", watch["action_id"])
        assert (now["status"], now["start_time"]) == ("ACTIVE", watch["start_time"])
        again = caller.run("monitor", WATCH, request_id="watch")
        assert (again.status_code, again.json()["action_id"]) == (200, watch["action_id"])
        caller.details("release", of())
        end = caller.until_final("monitor", now)
        assert (end["status"], end["details"]["code"]) == ("FAILED", "released")


# --- a verb that takes long


@contextlib.contextmanager
def held_up(served: Served, uid: str = "s") -> Iterator[None]:
    """Verbs on the stream wait: another process, this one, works on it."""
    registry = Registry(served.state_dir)
    try:
        with registry.lock(Key(unix_owner(), uid, "PROD"), timeout_s=10):
            yield
    finally:
        registry.close()


def test_a_slow_start_is_active_until_it_is_done_whoever_is_asked(base: Path, relays_below: Relays) -> None:
    with serving(base, "aps", workers=2) as served, calling(served) as caller:
        with held_up(served):
            began = caller.run("start", prod(), request_id="one").json()
            again = caller.run("start", prod(), request_id="one").json()
            looks = [caller.status("start", began["action_id"]) for _ in range(3)]
            assert {one["status"] for one in (began, again, *looks)} == {"ACTIVE"}
        done = caller.until_final("start", began)
        assert done["status"] == "SUCCEEDED"
        assert len(relays_below(base)) == 1
        caller.details("release", of())


def test_a_start_that_is_cancelled_in_the_middle_leaves_nothing(
    base: Path, relays_below: Relays, within: Callable[..., None]
) -> None:
    with serving(base, "aps") as served, calling(served) as caller:
        with held_up(served):
            action = caller.run("start", prod()).json()["action_id"]
            caller.ask("POST", f"/actions/start/{action}/cancel").raise_for_status()
        within(
            lambda: caller.ask("GET", "/streams").json()["streams"] == [] and not relays_below(base),
            timeout_s=20,
        )
        assert caller.status("start", action)["details"]["code"] == "cancelled"


def test_a_start_that_is_done_after_its_deadline_leaves_nothing(
    base: Path, relays_below: Relays, within: Callable[..., None]
) -> None:
    with serving(base, "aps") as served, calling(served) as caller:
        with held_up(served):
            soon = (datetime.now(timezone.utc) + timedelta(seconds=5)).isoformat()
            began = caller.run("start", prod(), deadline=soon).json()
            assert began["status"] == "ACTIVE", began
            end = caller.until_final("start", began)
        assert (end["status"], end["details"]["code"]) == ("FAILED", "deadline")
        within(
            lambda: caller.ask("GET", "/streams").json()["streams"] == [] and not relays_below(base),
            timeout_s=20,
        )


# --- a gateway that hangs


@pytest.fixture
def hanging() -> Iterator[int]:
    """The port of a host that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for one in held:
            one.close()


def test_run_answers_while_the_gateway_hangs_and_the_action_fails_with_its_words(
    base: Path, hanging: int
) -> None:
    gateway = HANGING.format(port=hanging, timeout_s=6)
    with serving(base, "far", gateway=gateway) as served, calling(served) as caller:
        began = caller.run("start", prod(), request_id="one")
        assert (began.status_code, began.json()["status"]) == (202, "ACTIVE")
        again = caller.run("start", prod(), request_id="one")  # as Flows does when it hears nothing
        assert (again.status_code, again.json()["status"]) == (200, "ACTIVE")
        end = caller.until_final("start", began.json())
        assert (end["status"], end["details"]["code"]) == ("FAILED", "gateway-unreachable")
        assert "far" in end["details"]["description"]


def test_a_start_that_is_cancelled_while_the_gateway_hangs_is_over_at_once(base: Path, hanging: int) -> None:
    gateway = HANGING.format(port=hanging, timeout_s=6)
    with serving(base, "far", gateway=gateway) as served, calling(served) as caller:
        action = caller.run("start", prod()).json()["action_id"]
        cancelled = caller.ask("POST", f"/actions/start/{action}/cancel").json()
        assert (cancelled["status"], cancelled["details"]["code"]) == ("FAILED", "cancelled")
        assert caller.status("start", action) == cancelled


def test_a_gateway_that_hangs_does_not_keep_the_service_from_answering(base: Path, hanging: int) -> None:
    gateway = HANGING.format(port=hanging, timeout_s=4)
    with serving(base, "far", gateway=gateway) as served, calling(served) as caller:
        runs = [caller.run("start", prod(f"s{n}"), request_id=str(n)).json() for n in range(2)]
        assert {one["status"] for one in runs} == {"ACTIVE"}
        assert httpx.get(f"{served.url}/health", timeout=30).json() == {"status": "ok"}
        assert len(caller.ask("GET", "/actions/start/actions").json()) == 2
        assert {caller.until_final("start", one)["status"] for one in runs} == {"FAILED"}


# --- endings


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_service_and_leaves_the_relays(
    base: Path, relays_below: Relays, workers: int, by: signal.Signals
) -> None:
    with serving(base, "aps", workers=workers) as served, calling(served) as caller:
        caller.details("start", prod(lease_s=600))
        assert served.stop(by) == 0
        assert len(relays_below(base)) == 1
        assert "Traceback" not in served.log.read_text()
    with S2CS(load_facility("aps", file=base / "aps.toml", state_dir=base / "aps")) as service:
        service.release({"protocol": 1, "uid": "s", "role": "PROD"})


def test_the_log_has_paths_but_no_token(base: Path) -> None:
    with serving(base, "aps") as served, calling(served) as caller:
        caller.ask("GET", f"/streams?include_ended=true&access_token={served.token}")
        caller.details("release", of())
        token = served.token
    said = served.log.read_text()
    assert "POST /actions/release/run 202" in said
    assert token not in said
    assert "Traceback" not in said


def test_two_callers_at_once_see_one_final_status(base: Path) -> None:
    with serving(base, "aps", workers=2) as served, calling(served) as caller:
        caller.details("start", prod())
        watch = caller.run("monitor", {**of(), "until": {"duration_s": 1}}).json()
        seen: list[dict[str, Any]] = []

        def look() -> None:
            with calling(served) as mine:
                seen.append(mine.until_final("monitor", watch))

        threads = [threading.Thread(target=look) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(seen) == 6
        assert all(one == seen[0] for one in seen)
        caller.details("release", of())
