"""A service killed at every step, and several on one registry: nothing is lost, nothing is left."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scistream_flows.errors import NotFound
from scistream_flows.models import Offer
from scistream_flows.s2cs import S2CS

Facility = Callable[..., S2CS]
Relays = Callable[..., list[int]]

PROD = {"protocol": 1, "uid": "s", "role": "PROD", "targets": ["127.0.0.1:9"]}
SIDE = {"protocol": 1, "uid": "s", "role": "PROD"}
OTHER = {**PROD, "uid": "other"}

# Runs verbs and kills itself at the step named: the service's own log says how far it has come.
KILLED = """
import json, logging, os, signal, sys
from scistream_flows.config import load_facility
from scistream_flows.s2cs import S2CS

class Kill(logging.Handler):
    def emit(self, record):
        if record.getMessage().split()[0] == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)

logger = logging.getLogger("scistream_flows.s2cs")
logger.setLevel(logging.DEBUG)
logger.addHandler(Kill())
service = S2CS(load_facility("aps"))
for verb, document in json.loads(sys.argv[2]):
    getattr(service, verb)(document)
print("survived")
"""

# Waits for a file, so that several start at the same moment; prints the answer.
RACING = """
import json, pathlib, sys, time
from scistream_flows.config import load_facility
from scistream_flows.s2cs import S2CS
service = S2CS(load_facility("aps"))
print("ready", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.001)
for verb, document in json.loads(sys.argv[2]):
    print(json.dumps(service.answer(verb, document)), flush=True)
"""


@pytest.fixture(params=[1, 3], ids=["one gateway", "three gateways"])
def asked(request: pytest.FixtureRequest, site: Callable[..., None]) -> dict[str, Any]:
    """The request for a stream that so many gateways carry."""
    count: int = request.param
    if count > 1:
        site("aps", *({} for _ in range(count)))
    return {**PROD, "num_conn": count, "gateways": count}


def killed_at(step: str, *calls: tuple[str, dict[str, Any]]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, step, json.dumps(calls)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, (done.stdout, done.stderr)


def nothing_left(service: S2CS, relays_below: Relays, state: Path) -> None:
    assert service.list({"protocol": 1}).streams == []
    assert relays_below(state, patience_s=2) == []
    assert list((service.config.state_dir / "relays").glob("*")) == []


@pytest.mark.parametrize("step", ["opening", "claimed", "started", "opened"])
def test_a_request_killed_at_any_step_is_repeated_without_a_second_relay(
    step: str, asked: dict[str, Any], facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    killed_at(step, ("request", asked))
    before = relays_below(state_base)
    service = facility()
    offer = service.request(asked)
    assert len(relays_below(state_base)) == asked["gateways"]
    if step in ("started", "opened"):  # the relay that runs already is the one that is offered
        assert sorted(relays_below(state_base)) == sorted(before)
    assert offer == service.request(asked).model_copy(update={"lease_remaining_s": offer.lease_remaining_s})
    service.release(SIDE)
    nothing_left(service, relays_below, state_base)


@pytest.mark.parametrize("step", ["opening", "claimed", "started", "opened"])
def test_a_request_killed_at_any_step_is_released_without_a_trace(
    step: str, asked: dict[str, Any], facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    killed_at(step, ("request", asked))
    service = facility()
    assert service.release(SIDE).released
    nothing_left(service, relays_below, state_base)


@pytest.mark.parametrize("step", ["claimed", "started", "opened"])
def test_a_call_about_another_stream_settles_what_a_killed_request_left(
    step: str, asked: dict[str, Any], facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    killed_at(step, ("request", asked))
    service = facility()
    service.request(OTHER)
    service.release({**SIDE, "uid": "other"})
    status = service.status(SIDE)
    if step == "claimed":  # its relay never started
        assert (status.state, status.reason) == ("FAILED", "relay_lost")
    else:
        assert status.state == "LISTENING"
        assert len(relays_below(state_base)) == asked["gateways"]
    service.release(SIDE)
    nothing_left(service, relays_below, state_base)


@pytest.mark.parametrize("step", ["stopped", "ended", "forgotten"])
def test_a_release_killed_at_any_step_is_completed_by_the_next_call(
    step: str, asked: dict[str, Any], facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    killed_at(step, ("request", asked), ("release", SIDE))
    assert relays_below(state_base, patience_s=2) == []
    service = facility()
    assert service.status(SIDE).reason == "released"
    nothing_left(service, relays_below, state_base)
    assert service.release(SIDE).end is not None


@pytest.mark.parametrize("after_ms", [0, 5, 10, 20, 40, 60, 90])
def test_a_service_killed_while_a_relay_starts_leaves_none_behind(
    after_ms: int,
    asked: dict[str, Any],
    facility: Facility,
    state_base: Path,
    relays_below: Relays,
    within: Callable[..., None],
    tmp_path: Path,
) -> None:
    go = tmp_path / "go"
    with subprocess.Popen(
        [sys.executable, "-c", RACING, str(go), json.dumps([("request", asked)])],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        go.touch()
        time.sleep(after_ms / 1000)
        process.kill()
    service = facility()
    service.release(SIDE)
    # the command that starts the relay may outlive the service that ran it: what comes up then is nobody's
    within(lambda: service.list({"protocol": 1}).streams == [] and not relays_below(state_base), timeout_s=5)
    within(lambda: not any((service.config.state_dir / "relays").glob("*")), timeout_s=1)


def test_a_stream_that_is_released_while_a_sweep_looks_was_somebodys(
    facility: Facility, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended, swept = threading.Event(), threading.Event()

    def pause(record: logging.LogRecord) -> bool:  # a filter: a handler would hold up other threads too
        if record.getMessage().split()[0] == "ended":
            ended.set()
            assert swept.wait(20)
        return True

    service, other = facility(), facility()
    service.request(PROD)
    look = service._running_everywhere
    release = threading.Thread(target=other.release, args=[SIDE])

    def look_slowly() -> Any:
        running = look()
        release.start()
        assert ended.wait(20)
        return running

    monkeypatch.setattr(service, "_running_everywhere", look_slowly)
    logger = logging.getLogger("scistream_flows.s2cs")
    logger.addFilter(pause)
    try:
        with caplog.at_level(logging.DEBUG, logger=logger.name):
            assert service.list({"protocol": 1}).streams == []
    finally:
        swept.set()
        release.join(20)
        logger.removeFilter(pause)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def race(count: int, calls: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> list[dict[str, Any]]:
    """Run `calls` in `count` processes at the same moment; the last answer of each."""
    go = tmp_path / "go"
    argv = [sys.executable, "-c", RACING, str(go), json.dumps(calls)]
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    go.touch()
    answers = [process.communicate(timeout=60)[0] for process in processes]
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def test_one_request_through_many_processes_starts_one_relay(
    facility: Facility, state_base: Path, relays_below: Relays, tmp_path: Path
) -> None:
    answers = race(5, [("request", PROD)], tmp_path)
    offers = [Offer.model_validate(answer["value"]) for answer in answers]
    assert len({offer.relays[0].relay_id for offer in offers}) == 1
    assert len({tuple(offer.addresses) for offer in offers}) == 1
    assert len(relays_below(state_base)) == 1
    service = facility()
    service.release(SIDE)
    nothing_left(service, relays_below, state_base)


def test_releases_and_requests_of_many_processes_never_leave_two_relays(
    facility: Facility, state_base: Path, relays_below: Relays, tmp_path: Path
) -> None:
    answers = race(4, [("request", PROD), ("release", SIDE)] * 3, tmp_path)
    assert all(answer["ok"] for answer in answers)
    service = facility()
    service.release(SIDE)
    nothing_left(service, relays_below, state_base)


def test_the_last_of_a_capacity_is_given_once(
    facility: Facility, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SCISTREAM_POLICY_MAX_STREAMS_PER_OWNER", "1")
    go = tmp_path / "go"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACING, str(go), json.dumps([("request", {**PROD, "uid": f"s{number}"})])],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    go.touch()
    answers = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in processes]
    assert sorted(answer["ok"] for answer in answers) == [False, False, False, True]
    service = facility()
    (stream,) = service.list({"protocol": 1}).streams
    service.release({**SIDE, "uid": stream.uid})


def test_a_registry_that_was_deleted_leaves_its_relays_to_the_next_call(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    service.request(PROD)
    service.close()
    for file in service.config.state_dir.glob("registry.sqlite*"):
        file.unlink()
    with pytest.raises(NotFound):
        facility().status(SIDE)
    assert relays_below(state_base, patience_s=2) == []


def test_a_stopped_service_does_not_block_others_for_ever(facility: Facility) -> None:
    holding = """
import sys, time
from scistream_flows.config import load_facility
from scistream_flows.registry import Key, Registry
from scistream_flows.s2cs import unix_owner
registry = Registry(load_facility("aps").state_dir)
with registry.lock(Key(unix_owner(), "s", "PROD"), timeout_s=5):
    print("held", flush=True)
    time.sleep(60)
"""
    service = facility()
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        os.kill(holder.pid, signal.SIGSTOP)
        service.request(OTHER)
        service.release({**SIDE, "uid": "other"})
        os.kill(holder.pid, signal.SIGKILL)
    service.request(PROD)
    service.release(SIDE)
