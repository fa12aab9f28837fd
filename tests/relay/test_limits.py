"""What a node gives a relay, and what the relay does with little: descriptors, and options that cannot be set."""

import errno
import os
import re
import resource
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from .apps import Applications, Payload
from .gateway import DEADLINE_S, Gateway, RefusedError, Relay, eventually, is_running, join, split
from .test_splice import Crowd, small_windows

WITHOUT = Path(__file__).with_name("without.py")


class Limited(Protocol):
    """Makes a gateway whose relays are started by a shell that runs some commands first, or through a runner."""

    def __call__(self, commands: str = "", runner: str = "") -> Gateway: ...


@pytest.fixture
def limited(binary: Path) -> Iterator[Limited]:
    with ExitStack() as stack:

        def make(commands: str = "", runner: str = "") -> Gateway:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            wrapper = folder / "s2ds"
            wrapper.write_text(f'#!/bin/sh\n{commands}\nexec {runner} {shlex.quote(str(binary))} "$@"\n')
            wrapper.chmod(0o755)
            gateway = Gateway(wrapper)
            stack.callback(gateway.close)
            return gateway

        yield make


def descriptor_limits(relay: Relay) -> list[str]:
    (line,) = re.findall(r"Max open files +(\S+) +(\S+)", Path(f"/proc/{relay.pid}/limits").read_text())
    return list(line)


def test_a_relay_takes_the_hard_limit_of_descriptors(limited: Limited) -> None:
    gateway = limited("ulimit -Sn 64; ulimit -Hn 3000")
    relay = gateway.start(gateway.config("PROD", "tls"))
    assert descriptor_limits(relay) == ["3000", "3000"]


@pytest.mark.parametrize("verb", ["start", "run"])
def test_a_configuration_that_does_not_fit_is_refused_with_the_number_that_is_needed(
    limited: Limited, verb: str
) -> None:
    size = {"max_connections": 500, "workers": 3, "listen": {"indices": [0, 1]}}
    needed = 144 + 2 + 23 * 3 + 2 * 500 * 2
    gateway = limited(f"ulimit -n {needed - 1}")
    with pytest.raises(RefusedError) as refusal:
        gateway.verb(verb, document=gateway.config("PROD", "tls", **size))
    assert (refusal.value.exit, refusal.value.code) == (1, "limits")
    assert "2 listeners (num_conn) of 500 connections (max_connections)" in refusal.value.message
    assert f"need {needed} descriptors" in refusal.value.message
    assert f"may have {needed - 1} " in refusal.value.message
    enough = limited(f"ulimit -n {needed}")
    assert enough.start(enough.config("PROD", "tls", **size)).status()["state"] == "WAITING_HELLO"


def test_a_relay_that_may_choose_has_as_many_workers_as_its_descriptors_allow(limited: Limited) -> None:
    gateway = limited(f"ulimit -n {144 + 1 + 23 + 2 * 100}")
    relay = gateway.start(gateway.config("PROD", "tls", max_connections=100))
    assert psutil.Process(relay.pid).num_threads() == 1


def test_five_listeners_full_of_connections_fit_into_the_usual_limit(
    limited: Limited, apps: Applications
) -> None:
    """As a stream of the command line has them, on a machine of eight cores or more."""
    scarce = limited("ulimit -n 1024")
    listeners, most = 5, 64
    size = {"workers": 8, "max_connections": most, "listen": {"indices": [*range(listeners)]}}
    server = apps.listen()
    pair = scarce.pair("none", [server.getsockname()], prod=size, cons=size)
    ends = [apps.established(server, pair.cons, index) for index in range(listeners) for _ in range(most)]
    for relay in pair:
        connections = relay.status()["connections"]
        assert (connections["active"], connections["refused"]) == (listeners * most, 0)
    for number, both in enumerate(ends[::79]):
        apps.exchange(*both, Payload(number, 1_000_000), Payload(number + 9, 1_000_000))


def test_full_pipes_take_no_connection_its_descriptors(limited: Limited, apps: Applications) -> None:
    """Whose readers stand still may fill pipes as long as there are some to spare; then bytes are copied."""
    most, stuck = 64, 50
    size = {"workers": 1, "max_connections": most}
    scarce = limited(f"ulimit -n {144 + 1 + 23 + 2 * most}")
    server = apps.listen()
    small_windows(server)
    pair = scarce.pair("none", [server.getsockname()], prod=size, cons=size)
    crowd = Crowd(apps, pair, server, stuck)
    for relay in pair:
        assert relay.status()["resources"]["pipes"] == 8
    for _ in range(most - stuck):
        apps.established(server, pair.cons)
    for relay in pair:
        assert relay.status()["connections"]["active"] == most
        assert relay.events("refused") == []
    crowd.release()


def test_out_of_descriptors_a_relay_rests_recovers_and_hears_its_end(
    gateway: Gateway, apps: Applications
) -> None:
    """Somebody has taken them away: it accepts nobody, in peace, until there are some again."""
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()], prod={"handshake_timeout_s": 300})
    consumer, producer = apps.established(server, pair.cons)
    resource.prlimit(pair.prod.pid, resource.RLIMIT_NOFILE, (40, 40))
    crowd = [apps.dial(pair.prod.address()) for _ in range(60)]
    used = cpu_s(pair.prod)
    time.sleep(2)
    assert cpu_s(pair.prod) - used < 0.2
    shortage = [event for event in pair.prod.events("refused") if event["cause"] == "EMFILE"]
    assert 1 <= len(shortage) <= 4
    apps.exchange(consumer, producer, Payload(1, 1_000_000), Payload(2, 1_000_000))
    for stranger in crowd:
        stranger.close()
    apps.exchange(*apps.through(server, pair.cons), Payload(3, 1_000_000), Payload(4, 1_000_000))
    crowd = [apps.dial(pair.prod.address()) for _ in range(60)]
    eventually(lambda: len(list(Path(f"/proc/{pair.prod.pid}/fd").iterdir())) >= 40)
    pair.prod.kill(signal.SIGTERM)
    eventually(lambda: not is_running(pair.prod.pid), within_s=DEADLINE_S)
    assert pair.prod.status()["state"] == "ENDED"


def test_where_descriptors_are_few_a_peer_may_still_open_all_its_connections_at_once(
    limited: Limited, gateway: Gateway, apps: Applications
) -> None:
    """As many as may be open may wait; with all of them open, only the few that are left over."""
    few, size = 60, {"max_connections": 60, "workers": 1, "handshake_timeout_s": 300}
    scarce = limited(f"ulimit -n {144 + 1 + 23 + 2 * few}")
    server = apps.listen()
    prod = scarce.start(scarce.config("PROD", "tls", targets=[join(server.getsockname())], **size))
    cons = gateway.start(gateway.config("CONS", "tls", peers=[gateway.peer_of(prod)], **size))
    gateway.introduce(prod, cons)
    eventually(lambda: cons.status()["state"] == "READY")
    waiting = [apps.dial(prod.address()) for _ in range(few)]
    eventually(lambda: prod.status()["resources"]["descriptors"] > few)
    assert prod.status()["connections"]["refused"] == 0
    for connection in waiting:
        connection.close()
    eventually(lambda: prod.status()["connections"]["refused"] == few)  # they have proven nothing
    for _ in range(few):
        apps.established(server, cons)
    left_over = 32
    for _ in range(left_over):
        apps.dial(prod.address())
    eventually(lambda: prod.status()["resources"]["descriptors"] > 2 * few + left_over)
    assert prod.status()["connections"]["active"] == few
    assert apps.knock(prod.address())[1] == "ConnectionResetError"
    assert prod.status()["connections"]["refused"] == few + 1


def cpu_s(relay: Relay) -> float:
    """What the process has used, from outside: it may have no descriptor left to answer with."""
    fields = Path(f"/proc/{relay.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_relay_without_work_sleeps(gateway: Gateway, apps: Applications, mode: str) -> None:
    pair = gateway.pair(mode, [apps.listen().getsockname()])
    before = [cpu_s(relay) for relay in pair]
    time.sleep(2)
    for relay, used in zip(pair, before, strict=True):
        assert cpu_s(relay) - used < 0.1


def keepalive_timers(far: str) -> list[float]:
    """Of each connection with `far` at the other end: in how many seconds its peer is asked whether it is there."""
    host, port = split(far)
    wanted = f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established, keepalive = "01", "02"
    timers = [row[5].split(":") for row in rows if row[2] == wanted and row[3] == established]
    return [int(when, 16) / os.sysconf("SC_CLK_TCK") for kind, when in timers if kind == keepalive]


def test_both_legs_of_a_connection_ask_whether_their_peer_is_there(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    patience = {"user_timeout_s": 30}
    pair = gateway.pair(mode, [server.getsockname()], prod=patience, cons=patience)
    apps.established(server, pair.cons)
    for relay in pair:
        (stream,) = relay.status()["streams"]
        for far in (stream["source"], stream["onward"]):
            # Another timer may be there for a moment.
            (timer,) = eventually(lambda far=far: keepalive_timers(far))  # type: ignore[misc]
            assert timer <= 10


def test_options_that_cannot_be_set_are_a_warning_and_no_reason_to_refuse(
    limited: Limited, apps: Applications
) -> None:
    gateway = limited(runner=shlex.join([sys.executable, str(WITHOUT), "keepalive", str(errno.EPERM)]))
    server = apps.listen()
    pair = gateway.pair("none", [server.getsockname()])
    for _ in range(3):
        apps.exchange(*apps.through(server, pair.cons), Payload(1, 100_000), Payload(2, 100_000))
    for relay in pair:
        (warning,) = relay.events("warning")
        assert warning["errno"] == "EPERM"
        assert "keepalive" in warning["message"]


def test_a_time_out_longer_than_the_kernel_takes_is_the_longest(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    patient = {"user_timeout_s": 300_000_000}
    pair = gateway.pair("none", [server.getsockname()], prod=patient, cons=patient)
    apps.exchange(*apps.through(server, pair.cons), Payload(1, 100_000), Payload(2, 100_000))
    assert [relay.events("warning") for relay in pair] == [[], []]
    assert join(server.getsockname()) == pair.prod.status()["targets"][0]
