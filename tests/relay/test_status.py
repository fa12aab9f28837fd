"""What `status` knows of a stream: its legs, what limits it, its rate; and what `update` changes."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from .apps import Applications, Payload, digest, receive_exactly, send, send_and_end
from .gateway import DEADLINE_S, Gateway, Pair, RefusedError, Relay, eventually, is_running
from .test_splice import connect_with_small_windows, small_windows

RESET = (b"", "ConnectionResetError")
TCP = {
    "rtt_s", "rtt_var_s", "receive_rtt_s", "retransmits", "lost", "cwnd_bytes", "mss_bytes", "delivery_bits_per_s",
    "pacing_bits_per_s", "min_rtt_s", "busy_s", "limited_by_receiver_s", "limited_by_send_buffer_s",
    "limited_by_application_s", "notsent_bytes", "congestion_control",
}  # fmt: skip


def test_status_shows_each_connection_and_both_its_legs(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    for there, back in ((consumer, producer), (producer, consumer)):
        moving = apps.task(lambda there=there: there.sendall(bytes(5_000_000)))  # type: ignore[misc]
        receive_exactly(back, 5_000_000)
        moving.result()
    for relay in pair:
        status = relay.status()
        assert status["state"] == "STREAMING"
        assert status["connections"] == {"active": 1, "total": 1, "refused": 0, "aborted": 0, "kept": 0}
        (stream,) = status["streams"]
        assert (stream["connection"], stream["listener"], stream["half_closed"]) == (1, 0, False)
        assert stream["bytes"] == status["bytes"] == {"to_consumer": 5_000_001, "to_producer": 5_000_001}
        assert 0 < stream["first_byte_s"] < stream["age_s"] < status["uptime_s"]
        assert set(stream["legs"]) == {"lan", "wan"}
        for leg in stream["legs"].values():
            assert set(leg) == TCP
            assert 0 < leg["min_rtt_s"] <= leg["rtt_s"] < 5
            assert leg["mss_bytes"] >= 500
            assert leg["cwnd_bytes"] >= leg["mss_bytes"]
            assert leg["delivery_bits_per_s"] > 0
            assert leg["lost"] == 0
            assert 0 <= leg["busy_s"] <= stream["age_s"]
            assert leg["limited_by_receiver_s"] <= leg["busy_s"]
            assert leg["congestion_control"]
        assert status["resources"]["descriptors"] > 4
        assert status["resources"]["rss_bytes"] > 100_000
        assert status["resources"]["cpu_s"] > 0
    send_and_end(consumer, Payload(1, 1))
    eventually(lambda: all(relay.status()["streams"][0]["half_closed"] for relay in pair))


def test_nothing_limits_a_stream_that_does_not_move(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()])
    assert [relay.status()["limiting"] for relay in pair] == [None, None]
    assert [relay.status()["streams"] for relay in pair] == [[], []]
    apps.established(server, pair.cons)
    eventually(lambda: all(relay.status()["limiting"] is None for relay in pair))


class Flood:
    """Bytes from one application to the other, with a pause at one of them, until it is stopped."""

    def __init__(
        self, apps: Applications, sender: socket.socket, reader: socket.socket, *, slow: str
    ) -> None:
        self._stop = threading.Event()
        self._tasks = [
            apps.task(lambda: self._send(sender, 0.01 if slow == "sender" else 0)),
            apps.task(lambda: self._read(reader, 0.01 if slow == "reader" else 0)),
        ]

    def _send(self, sender: socket.socket, pause_s: float) -> None:
        while not self._stop.wait(pause_s):
            sender.sendall(bytes(20_000))
        sender.shutdown(socket.SHUT_WR)

    def _read(self, reader: socket.socket, pause_s: float) -> None:
        while reader.recv(20_000):
            if pause_s and not self._stop.is_set():
                time.sleep(pause_s)

    def stop(self) -> None:
        self._stop.set()
        for task in self._tasks:
            task.result()


@pytest.mark.parametrize("mode", ["none", "tls"])
@pytest.mark.parametrize(
    ("direction", "slow", "prod_says", "cons_says"),
    [
        ("to_consumer", "sender", "producer_application", "upstream"),
        ("to_consumer", "reader", "consumer", "consumer_application"),
        ("to_producer", "sender", "upstream", "consumer_application"),
        ("to_producer", "reader", "producer_application", "producer"),
    ],
)
def test_who_is_slow_is_named(
    gateway: Gateway, apps: Applications, mode: str, direction: str, slow: str, prod_says: str, cons_says: str
) -> None:
    server = apps.listen()
    small_windows(server)
    pair = gateway.pair(mode, [server.getsockname()])
    consumer = connect_with_small_windows(apps, pair)
    producer = apps.accept(server)
    sender, reader = (producer, consumer) if direction == "to_consumer" else (consumer, producer)
    flood = Flood(apps, sender, reader, slow=slow)

    def verdict(relay: Relay) -> tuple[str, str]:
        limiting = relay.status()["limiting"]
        assert limiting
        assert 0 < limiting["share"] <= 1
        assert limiting["share"] == max(limiting["shares"].values())
        return limiting["direction"], limiting["leg"]

    def agreed() -> bool:
        found = [verdict(relay) for relay in pair]
        assert found == [(direction, prod_says), (direction, cons_says)], [
            relay.status()["limiting"] for relay in pair
        ]
        return True

    try:
        eventually(agreed, within_s=10, every_s=0.05)
    finally:
        flood.stop()


def test_a_rate_is_kept_to_and_the_stream_arrives_whole(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    rate = {"rate_mbits_per_s": 80}
    pair = gateway.pair(mode, [server.getsockname()], prod=rate, cons=rate)
    assert [relay.status()["rate_mbits_per_s"] for relay in pair] == [80, 80]
    consumer, producer = apps.established(server, pair.cons)
    eventually(lambda: all(paced(relay) for relay in pair))
    apps.exchange(consumer, producer, Payload(1, 3_000_000), Payload(2, 3_000_000))
    for relay in pair:
        assert relay.update(rate_mbits_per_s=0)["rate_mbits_per_s"] == 0
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 3_000_000), Payload(2, 3_000_000))


def test_a_new_connection_keeps_to_the_rate_from_its_first_byte(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """It does not wait for the next time that the rate is divided."""
    server = apps.listen()
    rate = {"rate_mbits_per_s": 80}
    pair = gateway.pair(mode, [server.getsockname()], prod=rate, cons=rate)
    for _ in range(10):
        ends = apps.established(server, pair.cons)
        assert [paced(relay) for relay in pair] == [True, True]
        apps.exchange(*ends, Payload(1, 1000), Payload(2, 1000))
        pair.wait_idle()


def test_connections_that_say_a_little_all_the_time_leave_the_rate_to_the_one_that_needs_it(
    gateway: Gateway, apps: Applications
) -> None:
    """What a rate is divided by is what each sends, not how many are alive."""
    server = apps.listen()
    rate = {"rate_mbits_per_s": 400}
    pair = gateway.pair("none", [server.getsockname()], prod=rate, cons=rate)
    consumer, producer = apps.established(server, pair.cons)
    talkers = [apps.established(server, pair.cons) for _ in range(3)]
    enough = threading.Event()

    def talk() -> None:
        while not enough.wait(0.02):
            for one, other in talkers:
                other.sendall(b"here")
                assert receive_exactly(one, 4) == b"here"

    flood = Flood(apps, producer, consumer, slow="nobody")
    talking = apps.task(talk)
    try:
        # the first division is long past by then
        eventually(lambda: pair.prod.status()["bytes"]["to_consumer"] >= 20_000_000)
        eventually(lambda: max(shares(pair.prod)) >= 0.9 * 400e6)
        assert len(shares(pair.prod)) == 4
    finally:
        enough.set()
        flood.stop()
        talking.result()


def test_what_a_stream_that_uses_its_rate_up_says_before_it_pauses_arrives_before_it_goes_on(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """Where much comes from the WAN a relay waits for more of it, and not for ever."""
    server = apps.listen()
    rate = {"rate_mbits_per_s": 1000}
    pair = gateway.pair(mode, [server.getsockname()], prod=rate, cons=rate)
    consumer, producer = apps.established(server, pair.cons)
    for number in range(3):
        payload = Payload(number, 50_000_011)
        sending = apps.task(partial(send, producer, payload))
        assert digest(receive_exactly(consumer, payload.size)) == payload.digest()
        sending.result()
        consumer.sendall(b"?")
        assert receive_exactly(producer, 1) == b"?"
        producer.sendall(b"!")
        assert receive_exactly(consumer, 1) == b"!"


def shares(relay: Relay) -> list[float]:
    """What each connection may send into the WAN, in bits per second."""
    return [stream["legs"]["wan"]["pacing_bits_per_s"] for stream in relay.status()["streams"]]


def paced(relay: Relay) -> bool:
    """The kernel has been told: it sends no faster into the WAN than 80 Mbit/s."""
    pacing = relay.status()["streams"][0]["legs"]["wan"]["pacing_bits_per_s"]
    return pacing is not None and pacing <= 80_000_000


@pytest.mark.parametrize(
    "changes",
    [
        {"rate_mbits_per_s": 100_000_001},
        {"rate_mbits_per_s": "fast"},
        {"lease_s": 0},
        {"mode": "none"},
        {"max_connections": 5},
        {"targets": ["example.org:80"]},
        {"sources": ["everywhere"]},
        {"peers": [{"public_key": "short"}]},
        {"peers": [{"public_key": "A" * 43, "colour": "red"}]},
        [],
    ],
    ids=str,
)
def test_a_wrong_update_is_refused_whole(gateway: Gateway, changes: Any) -> None:
    relay = gateway.start(gateway.config("PROD", "tls"))
    if isinstance(changes, dict):
        changes = {"lease_s": 77, **changes}
    with pytest.raises(RefusedError) as refusal:
        gateway.verb("update", relay.id, document=changes)
    assert refusal.value.code == "bad-request"
    status = relay.status()
    assert status["lease_remaining_s"] > 100
    assert (status["targets"], status["sources"], status["peers"]) == ([], ["127.0.0.0/8"], [])


def test_a_consumer_has_no_targets_to_update(gateway: Gateway) -> None:
    relay = gateway.start(gateway.config("CONS", "tls"))
    with pytest.raises(RefusedError) as refusal:
        relay.update(targets=["127.0.0.1:80"])
    assert refusal.value.code == "bad-request"


def test_an_update_of_the_sources_lets_a_new_one_in_and_keeps_the_old_one_out(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], cons={"sources": ["127.0.0.2"]})
    running = apps.dial(pair.cons.address(), "127.0.0.2")
    producer = apps.accept(server)
    running.sendall(b"?")
    assert receive_exactly(producer, 1) == b"?"
    assert apps.knock(pair.cons.address()) == RESET
    assert pair.cons.update(sources=["127.0.0.1/32"])["sources"] == ["127.0.0.1/32"]
    consumer, other = apps.established(server, pair.cons)
    assert apps.knock(pair.cons.address(), source="127.0.0.2") == RESET
    apps.exchange(consumer, other, Payload(1, 1000), Payload(2, 1000))
    apps.exchange(running, producer, Payload(3, 1000), Payload(4, 1000))  # who is in, stays in


# Reads all that comes, from an address on the command line, and says what it was.
READER = """
import hashlib, socket, sys
digest, count = hashlib.sha256(), 0
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60) as consumer:
    while piece := consumer.recv(65536):
        count += len(piece)
        digest.update(piece)
print(f"{count} bytes {digest.hexdigest()}")
"""


@pytest.fixture
def readers() -> Iterator[list["subprocess.Popen[str]"]]:
    """Consumers in processes of their own; none is left."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_a_paused_consumer_is_not_cut_and_gets_everything_when_it_goes_on(
    gateway: Gateway, apps: Applications, readers: list["subprocess.Popen[str]"]
) -> None:
    """A stopped process answers by its kernel, with a closed window; the kernel would call that a dead peer."""
    payload = Payload(1, 80_000_000)
    pairs: list[Pair] = []
    for mode in ("none", "tls"):
        server = apps.listen()
        impatient = {"user_timeout_s": 1}
        pair = gateway.pair(mode, [server.getsockname()], prod=impatient, cons=impatient)
        host, port = pair.cons.address()
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, host, str(port)], stdout=subprocess.PIPE, text=True
        )
        pairs.append(pair)
        readers.append(reader)
        producer = apps.accept(server)
        apps.task(lambda producer=producer: send_and_end(producer, payload))  # type: ignore[misc]
        eventually(lambda pair=pair: pair.cons.status()["bytes"]["to_consumer"] > 0)  # type: ignore[misc]
        reader.send_signal(signal.SIGSTOP)
    time.sleep(4)  # four times the time-out, of a window that has closed
    for pair in pairs:
        for relay in pair:
            assert is_running(relay.pid)
            assert relay.status()["connections"]["active"] == 1, relay.events("close")
            assert relay.status()["bytes"]["to_consumer"] < payload.size
    for reader in readers:
        reader.send_signal(signal.SIGCONT)
    for reader in readers:
        answer, _ = reader.communicate(timeout=DEADLINE_S)
        assert answer.strip() == payload.digest()


def test_a_consumer_that_pauses_long_after_the_last_byte_came_is_not_cut(
    gateway: Gateway, apps: Applications
) -> None:
    """What waits in the relay's socket may find the window closed when nothing has moved for long."""
    payload = Payload(1, 3_000_000)
    ends = []
    for mode in ("none", "tls"):
        server = apps.listen()
        impatient = {"user_timeout_s": 1}
        pair = gateway.pair(mode, [server.getsockname()], prod=impatient, cons=impatient)
        consumer, producer = apps.established(server, pair.cons)
        apps.task(lambda producer=producer: send(producer, payload))  # type: ignore[misc]
        ends.append((pair, consumer))
    time.sleep(3)  # nothing moves any more, and the relays know it
    heard = [b"" for _ in ends]
    for _ in range(35):
        heard = [
            begun + receive_exactly(consumer, 40_000)
            for begun, (_, consumer) in zip(heard, ends, strict=True)
        ]
        time.sleep(0.05)  # while it reads, its window is open
    time.sleep(4)  # four times the time-out
    for (pair, consumer), begun in zip(ends, heard, strict=True):
        for relay in pair:
            assert relay.status()["connections"]["active"] == 1, relay.events("close")
        assert digest(begun + receive_exactly(consumer, payload.size - len(begun))) == payload.digest()
