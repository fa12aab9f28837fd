"""open_stream from end to end: real relays, real bytes, real failures; nothing is ever left."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scistream_flows import (
    BadRequest,
    PolicyDenied,
    ScistreamError,
    StreamFailed,
    StreamNotReady,
    WaitTimeout,
    aopen_stream,
    connect_facility,
    open_stream,
)
from scistream_flows.errors import CapacityExhausted, Conflict
from scistream_flows.models import Limiting, Mode, Renewal, Role, StatusQuery, join_address, split_address
from scistream_flows.stream import limiting_leg

Relays = Callable[..., list[int]]
Talk = Callable[[str, bytes], str]
Within = Callable[..., None]

PAYLOAD = random.Random(2).randbytes(3_000_000)  # noqa: S311 - no secret
MODES: list[Mode] = ["tls", "auth", "none"]

pytestmark = pytest.mark.usefixtures("state_base")


def sha(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


@pytest.fixture
def nothing_left(state_base: Path, relays_below: Relays) -> Callable[[], None]:
    """A function that fails if a relay, a file of one, or an open stream is left at any facility of the test."""

    def check() -> None:
        assert relays_below(state_base, patience_s=3) == []
        assert [str(one) for one in state_base.glob("*/relays/*")] == []
        for state in state_base.iterdir():
            with connect_facility(f"local:{state.name}") as facility:  # type: ignore[attr-defined]
                assert facility.list().streams == []

    return check


# --- success


@pytest.mark.parametrize("mode", MODES)
def test_bytes_arrive_whole_in_both_directions_at_once(
    mode: Mode, application: Any, talk: Talk, nothing_left: Callable[[], None]
) -> None:
    with open_stream(
        "local:aps", "local:alcf", targets=[application.address], mode=mode, linger_s=1
    ) as stream:
        assert talk(stream.listeners[0], PAYLOAD) == sha(application.payload)
        end = stream.wait(20)
    assert application.received == [sha(PAYLOAD)]
    assert end.reasons == {"PROD": "finished", "CONS": "finished"}
    assert end.in_order
    assert end.check() is end
    for side in (end.prod, end.cons):
        assert (side.bytes.to_consumer, side.bytes.to_producer) == (len(application.payload), len(PAYLOAD))
    nothing_left()


def test_a_one_shot_script_needs_no_configuration(application: Any, nothing_left: Callable[[], None]) -> None:
    script = f"""
from scistream_flows import open_stream
with open_stream("local:aps", "local:alcf", targets=["{application.address}"]) as stream:
    print(stream.listeners)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("['127.0.0.1:")
    nothing_left()


def test_one_facility_may_be_both_sides(
    application: Any, talk: Talk, nothing_left: Callable[[], None]
) -> None:
    with open_stream("local:aps", "local:aps", targets=[application.address], until="released") as stream:
        assert talk(stream.listeners[0], b"x") == sha(application.payload)
    nothing_left()


def test_each_listener_leads_to_its_target(talk: Talk, nothing_left: Callable[[], None]) -> None:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    stopping = threading.Event()

    def greet(number: int) -> None:
        servers[number].settimeout(0.1)
        while not stopping.is_set():
            try:
                connection, _ = servers[number].accept()
            except TimeoutError:
                continue
            with connection:
                connection.sendall(b"%d" % number)

    threads = [threading.Thread(target=greet, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    targets = ["{}:{}".format(*server.getsockname()) for server in servers]
    try:
        with open_stream("local:aps", "local:alcf", targets=targets, num_conn=4, until="released") as stream:
            greetings = [talk(address, b"") for address in stream.listeners]
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        for server in servers:
            server.close()
    assert greetings == [sha(b"0"), sha(b"1"), sha(b"0"), sha(b"1")]
    nothing_left()


def test_progress_is_told_step_by_step(application: Any) -> None:
    told: list[Any] = []
    with open_stream("local:aps", "local:alcf", targets=[application.address], on_progress=told.append):
        pass
    steps = [progress.step for progress in told]
    assert list(dict.fromkeys(steps)) == ["request-prod", "request-cons", "connect", "probe", "ready"]
    assert [progress.elapsed_s for progress in told] == sorted(progress.elapsed_s for progress in told)


def test_status_shows_both_sides(application: Any, talk: Talk) -> None:
    with open_stream("local:aps", "local:alcf", targets=[application.address], until="released") as stream:
        before = stream.status()
        assert before.ready
        assert before.prod.proof == "target"
        talk(stream.listeners[0], PAYLOAD)
        after = stream.status()
    assert (before.bytes.to_consumer, before.bytes.to_producer) == (0, 0)
    assert (after.bytes.to_consumer, after.bytes.to_producer) == (len(application.payload), len(PAYLOAD))
    assert not after.ended


def test_the_lease_is_renewed_while_the_block_runs(application: Any) -> None:
    with open_stream("local:aps", "local:alcf", targets=[application.address], lease_s=2) as stream:
        time.sleep(3.5)
        assert stream.status().ready
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("renew")]


def test_waiting_renews_the_lease_without_a_block(application: Any, nothing_left: Callable[[], None]) -> None:
    stream = open_stream("local:aps", "local:alcf", targets=[application.address], lease_s=2)
    with pytest.raises(WaitTimeout, match="has not ended within"):
        stream.wait(3.5)
    end = stream.release()
    stream.close()
    assert end.reasons == {"PROD": "released", "CONS": "released"}
    nothing_left()


def test_without_a_block_the_lease_ends_what_nobody_releases(
    application: Any, within: Within, nothing_left: Callable[[], None]
) -> None:
    stream = open_stream("local:aps", "local:alcf", targets=[application.address], lease_s=1)
    within(lambda: stream.status().ended, timeout_s=10)
    assert "lease_expired" in stream.wait(1).reasons.values()
    stream.close()
    nothing_left()


def test_releasing_twice_gives_the_same_end(application: Any) -> None:
    stream = open_stream("local:aps", "local:alcf", targets=[application.address])
    assert stream.release() == stream.release()
    stream.close()


def test_the_same_name_with_the_same_content_is_the_same_stream(
    application: Any, nothing_left: Callable[[], None]
) -> None:
    options: dict[str, Any] = {"targets": [application.address], "uid": "run-42"}
    with open_stream("local:aps", "local:alcf", **options) as one:
        other = open_stream("local:aps", "local:alcf", **options)
        assert other.listeners == one.listeners
        other.close()
    nothing_left()


# --- failure


def test_a_wrong_target_names_the_producers_lan_and_leaves_nothing(
    free_address: str, nothing_left: Callable[[], None]
) -> None:
    with pytest.raises(StreamNotReady, match=f"cannot connect to its target {free_address}") as caught:
        open_stream("local:aps", "local:alcf", targets=[free_address], ready_timeout_s=1.5)
    error = caught.value
    assert (error.leg, error.reason, error.details["errno"]) == (
        "producer-lan",
        "unreachable",
        "ECONNREFUSED",
    )
    assert "Start the application" in error.hint
    assert type(pickle.loads(pickle.dumps(error))) is StreamNotReady  # noqa: S301 - our own bytes
    nothing_left()


def test_an_application_that_starts_late_is_waited_for(
    free_address: str, nothing_left: Callable[[], None]
) -> None:
    host, port = free_address.rsplit(":", 1)
    servers: list[socket.socket] = []
    timer = threading.Timer(1.0, lambda: servers.append(socket.create_server((host, int(port)))))
    timer.start()
    try:
        with open_stream("local:aps", "local:alcf", targets=[free_address], ready_timeout_s=20):
            pass
    finally:
        timer.join()
        for server in servers:
            server.close()
    nothing_left()


def test_no_target_is_said_to_be_missing(nothing_left: Callable[[], None]) -> None:
    stream = open_stream("local:aps", "local:alcf", targets=[])
    with stream, pytest.raises(StreamNotReady, match="no target was named") as caught:
        stream.wait_ready(timeout_s=0.5)
    assert (caught.value.leg, caught.value.reason) == ("producer-lan", "no-target")
    nothing_left()


def test_a_hello_timeout_of_the_relays_is_a_reason(
    free_address: str, nothing_left: Callable[[], None]
) -> None:
    with pytest.raises(StreamNotReady) as caught:
        open_stream("local:aps", "local:alcf", targets=[free_address], hello_timeout_s=1, ready_timeout_s=20)
    assert caught.value.leg == "producer-lan"
    nothing_left()


def test_a_refusal_by_the_consumers_facility_releases_the_producers(
    application: Any, nothing_left: Callable[[], None]
) -> None:
    with pytest.raises(PolicyDenied, match=r"10\.0\.0\.0/8 in consumers"):
        open_stream("local:aps", "local:alcf", targets=[application.address], consumers=["10.0.0.0/8"])
    nothing_left()


def test_an_exhausted_port_range_leaves_nothing(
    application: Any, monkeypatch: pytest.MonkeyPatch, nothing_left: Callable[[], None]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("SCISTREAM_PORT_RANGE", str(taken.getsockname()[1]))
        with pytest.raises(CapacityExhausted):
            open_stream("local:aps", "local:alcf", targets=[application.address])
    nothing_left()


def test_a_conflict_does_not_touch_the_stream_that_was_there(
    application: Any, talk: Talk, nothing_left: Callable[[], None]
) -> None:
    with open_stream(
        "local:aps", "local:alcf", targets=[application.address], uid="x", until="released"
    ) as stream:
        with pytest.raises(Conflict, match="different num_conn"):
            open_stream(
                "local:aps",
                "local:alcf",
                targets=[application.address],
                uid="x",
                until="released",
                num_conn=2,
            )
        assert talk(stream.listeners[0], b"still here") == sha(application.payload)
    nothing_left()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_conn": 0}, "num_conn"),
        ({"mode": "ssl"}, "mode"),
        ({"uid": "../x"}, "uid"),
        ({"targets": ["x"]}, "targets"),
    ],
    ids=str,
)
def test_wrong_arguments_are_bad_requests(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        open_stream("local:aps", "local:alcf", **({"targets": ["127.0.0.1:9"]} | options))


def test_what_is_no_address_of_a_facility_is_refused(nothing_left: Callable[[], None]) -> None:
    with pytest.raises(BadRequest, match="not the address of a facility"):
        open_stream("local:aps", "alcf", targets=["127.0.0.1:9"])
    nothing_left()


def test_an_error_in_the_block_is_raised_and_the_stream_released(
    application: Any, nothing_left: Callable[[], None]
) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        open_stream("local:aps", "local:alcf", targets=[application.address]),
    ):
        raise ZeroDivisionError
    nothing_left()


def test_a_missing_binary_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2DS", "/nowhere/s2ds")
    with pytest.raises(ScistreamError, match="cargo build"):
        open_stream("local:aps", "local:alcf", targets=["127.0.0.1:9"])


# --- relays that die


def pid_of(stream: Any, side: str) -> int:
    pid = getattr(stream.status(), side).relays[0].pid
    assert isinstance(pid, int)
    return pid


@pytest.mark.parametrize("side", ["prod", "cons"])
def test_a_killed_relay_shows_within_a_second_and_ends_the_wait(
    side: str, application: Any, within: Within, nothing_left: Callable[[], None]
) -> None:
    with open_stream("local:aps", "local:alcf", targets=[application.address]) as stream:
        os.kill(pid_of(stream, side), signal.SIGKILL)
        within(lambda: getattr(stream.status(), side).reason == "relay_lost", timeout_s=1)
        end = stream.wait(15)
        assert not end.in_order
        with pytest.raises(StreamFailed, match="relay_lost") as caught:
            end.check()
        assert caught.value.reason == "relay_lost"
    nothing_left()


@pytest.mark.parametrize("side", ["PROD", "CONS"])
def test_a_relay_killed_while_opening_is_named(
    side: Role, free_address: str, nothing_left: Callable[[], None]
) -> None:
    killed: list[int] = []

    def kill(progress: Any) -> None:
        if progress.step == "probe" and not killed:
            name = "local:aps" if side == "PROD" else "local:alcf"
            with connect_facility(name) as facility:  # type: ignore[attr-defined]
                status = facility.status(StatusQuery(uid="x", role=side))
            killed.append(status.relays[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(StreamNotReady, match="was killed") as caught:
        open_stream(
            "local:aps", "local:alcf", targets=[free_address], uid="x", on_progress=kill, ready_timeout_s=10
        )
    assert (caught.value.leg, caught.value.reason) == (
        "producer-lan" if side == "PROD" else "consumer-lan",
        "relay_lost",
    )
    nothing_left()


def test_an_aborted_transfer_is_no_success(application: Any, nothing_left: Callable[[], None]) -> None:
    with open_stream("local:aps", "local:alcf", targets=[application.address], linger_s=1) as stream:
        host, port = stream.listeners[0].rsplit(":", 1)
        consumer = socket.create_connection((host, int(port)), timeout=10)
        assert consumer.recv(1000)
        consumer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        consumer.close()
        end = stream.wait(20)
    assert not end.in_order
    assert "aborted_by_consumer" in end.reasons.values()
    nothing_left()


# --- interruption

SCRIPT = """
import sys, time
from scistream_flows import open_stream
with open_stream("local:aps", "local:alcf", targets=[sys.argv[1]], on_progress=lambda p: print(p.step, flush=True)):
    print("open", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("step", ["request-prod", "request-cons", "connect", "probe", "open"])
def test_ctrl_c_at_any_moment_leaves_nothing(
    step: str, application: Any, free_address: str, nothing_left: Callable[[], None]
) -> None:
    target = free_address if step == "probe" else application.address
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as script:
        assert script.stdout is not None
        while (line := script.stdout.readline()) and line.strip() != step:
            pass
        time.sleep(0.02)
        os.killpg(script.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        _, stderr = script.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    assert script.returncode != 0
    nothing_left()


def test_two_ctrl_c_leave_nothing_either(application: Any, nothing_left: Callable[[], None]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, application.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as script:
        assert script.stdout is not None
        while (line := script.stdout.readline()) and line.strip() != "open":
            pass
        script.send_signal(signal.SIGINT)
        time.sleep(0.01)
        script.send_signal(signal.SIGINT)
        script.communicate(timeout=30)
    nothing_left()


def test_a_killed_script_is_cleared_away_by_the_lease(
    application: Any, state_base: Path, relays_below: Relays, nothing_left: Callable[[], None]
) -> None:
    script = SCRIPT.replace("targets=", "lease_s=2, targets=")
    with subprocess.Popen(
        [sys.executable, "-c", script, application.address], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line.strip() != "open":
            pass
        assert len(relays_below(state_base)) == 2
        process.kill()
    assert relays_below(state_base, patience_s=8) == []
    for name in ("aps", "alcf"):
        with connect_facility(f"local:{name}") as facility:  # type: ignore[attr-defined]
            assert facility.list().streams == []
    nothing_left()


# --- asynchronous


def test_async_with_opens_and_releases(
    application: Any, talk: Talk, nothing_left: Callable[[], None]
) -> None:
    async def run() -> str:
        async with aopen_stream(
            "local:aps", "local:alcf", targets=[application.address], until="released"
        ) as stream:
            return await asyncio.to_thread(talk, stream.listeners[0], PAYLOAD)

    assert asyncio.run(run()) == sha(application.payload)
    assert application.received == [sha(PAYLOAD)]
    nothing_left()


def test_async_opening_does_not_block_the_loop(free_address: str, nothing_left: Callable[[], None]) -> None:
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def run() -> None:
        ticking = asyncio.create_task(tick())
        try:
            with pytest.raises(StreamNotReady):
                async with aopen_stream("local:aps", "local:alcf", targets=[free_address], ready_timeout_s=1):
                    pass
        finally:
            ticking.cancel()

    asyncio.run(run())
    assert max(later - earlier for earlier, later in pairwise(ticks)) < 0.5
    nothing_left()


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_a_cancellation_while_opening_leaves_nothing(
    after_s: float, free_address: str, nothing_left: Callable[[], None]
) -> None:
    async def run() -> None:
        async def stream() -> None:
            async with aopen_stream("local:aps", "local:alcf", targets=[free_address]):
                raise AssertionError("it cannot be ready")

        task = asyncio.create_task(stream())
        await asyncio.sleep(after_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    began = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - began < 10
    nothing_left()


def test_a_cancellation_in_the_block_releases(application: Any, nothing_left: Callable[[], None]) -> None:
    async def run() -> None:
        opened = asyncio.Event()

        async def stream() -> None:
            async with aopen_stream("local:aps", "local:alcf", targets=[application.address]):
                opened.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(stream())
        await asyncio.wait_for(opened.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    nothing_left()


def test_many_streams_at_once(application: Any, talk: Talk, nothing_left: Callable[[], None]) -> None:
    async def one() -> str:
        async with aopen_stream(
            "local:aps", "local:alcf", targets=[application.address], until="released"
        ) as stream:
            return await asyncio.to_thread(talk, stream.listeners[0], b"x")

    async def run() -> list[str]:
        return await asyncio.gather(*(one() for _ in range(6)))

    assert asyncio.run(run()) == [sha(application.payload)] * 6
    nothing_left()


# --- which leg limits


def verdict(leg: str | None, *, share: float = 0.9, direction: str = "to_consumer") -> Limiting | None:
    return None if leg is None else Limiting(direction=direction, leg=leg, share=share)


@pytest.mark.parametrize(
    ("prod", "cons", "leg"),
    [
        (None, None, None),
        ("producer", None, "producer"),
        (None, "consumer_lan", "consumer_lan"),
        (None, "upstream", None),
        ("producer", "upstream", "producer"),
        ("wan", "upstream", "wan"),
        ("consumer", "consumer_lan", "consumer_lan"),
        ("consumer", "consumer_application", "consumer_application"),
        ("consumer", "upstream", "wan"),
    ],
)
def test_the_limiting_leg_comes_from_the_relay_that_sees_it(
    prod: str | None, cons: str | None, leg: str | None
) -> None:
    found = limiting_leg(verdict(prod), verdict(cons))
    assert (found.leg if found else None) == leg


@pytest.mark.parametrize(
    ("prod", "cons", "leg"),
    [
        ("upstream", "consumer", "consumer"),
        ("upstream", "wan", "wan"),
        ("producer_application", "producer", "producer_application"),
        ("upstream", "producer", "wan"),
    ],
)
def test_for_bytes_to_the_producer_the_relays_change_places(prod: str, cons: str, leg: str) -> None:
    found = limiting_leg(verdict(prod, direction="to_producer"), verdict(cons, direction="to_producer"))
    assert found is not None
    assert found.leg == leg


def test_of_two_clear_verdicts_the_larger_share_counts() -> None:
    found = limiting_leg(verdict("producer", share=0.5), verdict("consumer_lan", share=0.8))
    assert found is not None
    assert found.leg == "consumer_lan"


def test_a_consumer_that_reads_slowly_is_named_as_the_limit(within: Within) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = "{}:{}".format(*server.getsockname())
        with open_stream("local:aps", "local:alcf", targets=[target], until="released") as stream:
            host, port = stream.listeners[0].rsplit(":", 1)
            stopping = threading.Event()
            with socket.create_connection((host, int(port)), timeout=10) as consumer:
                producer, _ = server.accept()
                threads = [threading.Thread(target=flood, args=(producer, stopping))]
                threads.append(threading.Thread(target=sip, args=(consumer, stopping)))
                for thread in threads:
                    thread.start()
                try:
                    within(lambda: named(stream.status().limiting) == "consumer_application", timeout_s=15)
                finally:
                    stopping.set()
                    for thread in threads:
                        thread.join(10)
                    producer.close()


def named(limiting: Limiting | None) -> str | None:
    return limiting.leg if limiting else None


def flood(connection: socket.socket, stopping: threading.Event) -> None:
    connection.settimeout(0.2)
    while not stopping.is_set():
        with contextlib.suppress(TimeoutError):
            connection.send(b"x" * 65_536)


def sip(connection: socket.socket, stopping: threading.Event) -> None:
    while not stopping.is_set():
        connection.recv(65_536)
        time.sleep(0.005)


# --- addresses


GATEWAY = """
[facility]
name = "{name}"
[[gateway]]
name = "gw"
wan_bind = "{wan}"
lan_bind = "{lan}"
[policy]
targets = ["127.0.0.0/8", "::1/128"]
peers = ["127.0.0.0/8", "::1/128"]
consumers = ["127.0.0.0/8", "::1/128"]
modes = ["tls", "auth", "none"]
"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("producer", "consumer"),
    [(("::1", "::1"), ("::1", "::1")), (("127.0.0.2", "127.0.0.3"), ("127.0.0.4", "127.0.0.5"))],
    ids=["IPv6", "four addresses"],
)
def test_gateways_have_the_addresses_of_their_files(
    mode: Mode,
    producer: tuple[str, str],
    consumer: tuple[str, str],
    talk: Talk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_left: Callable[[], None],
) -> None:
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path))
    for name, (wan, lan) in (("aps", producer), ("alcf", consumer)):
        (tmp_path / f"{name}.toml").write_text(GATEWAY.format(name=name, wan=wan, lan=lan))
    family = socket.AF_INET6 if producer[0] == "::1" else socket.AF_INET
    with socket.create_server((producer[1], 0), family=family) as server:
        greeter = threading.Thread(target=greet_once, args=(server,))
        greeter.start()
        target = join_address(producer[1], server.getsockname()[1])
        with open_stream("local:aps", "local:alcf", targets=[target], mode=mode) as stream:
            assert split_address(stream.offers["PROD"].addresses[0])[0] == producer[0]
            assert split_address(stream.listeners[0])[0] == consumer[1]
            assert talk(stream.listeners[0], b"") == sha(b"hello")
        greeter.join(10)
    nothing_left()


def greet_once(server: socket.socket) -> None:
    server.settimeout(30)
    connection, _ = server.accept()
    with connection:
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


def test_a_producers_facility_on_ipv6_serves_a_consumers_on_ipv4(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: Callable[[], None]
) -> None:
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path))
    (tmp_path / "aps.toml").write_text(GATEWAY.format(name="aps", wan="::1", lan="127.0.0.1"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        greeter = threading.Thread(target=greet_once, args=(server,))
        greeter.start()
        target = f"localhost:{server.getsockname()[1]}"
        with open_stream("local:aps", "local:alcf", targets=[target]) as stream:
            assert talk(stream.listeners[0], b"") == sha(b"hello")
        greeter.join(10)
        # in mode none the address is all that proves a peer, and the consumer's gateway has none of this version
        with pytest.raises(BadRequest, match="needs source_addresses"):
            open_stream("local:aps", "local:alcf", targets=[target], mode="none")
    nothing_left()


def test_a_facility_object_is_used_as_it_is_and_stays_open(
    application: Any, nothing_left: Callable[[], None]
) -> None:
    producer, consumer = connect_facility("local:aps"), connect_facility("local:alcf")
    with open_stream(producer, consumer, targets=[application.address], uid="x"):
        assert [stream.uid for stream in producer.list().streams] == ["x"]
    assert producer.renew(Renewal(uid="x", role="PROD")).reason == "released"
    producer.close()
    consumer.close()
    nothing_left()
