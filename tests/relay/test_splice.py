"""The data path: which way bytes take, that they arrive whatever the way, and how little a connection costs."""

import os
import resource
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from .apps import Applications, Payload, digest, receive, receive_exactly, send_and_end
from .gateway import Gateway, Pair, eventually

SMALL_WINDOW_BYTES = 8192
# Of Ethernet. On loopback a segment has 64 KiB, and buffers of ten of them hold megabytes.
SEGMENT_BYTES = 1460


def small_windows(end: socket.socket) -> None:
    """Between this socket, or whoever is accepted by it from now on, and the relay little is under way."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        end.setsockopt(socket.SOL_SOCKET, option, SMALL_WINDOW_BYTES)


def connect_with_small_windows(apps: Applications, pair: Pair) -> socket.socket:
    consumer = apps.keep(socket.socket())
    small_windows(consumer)
    consumer.connect(pair.cons.address())
    return consumer


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As many descriptors as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_forty_thousand_tiny_messages_into_throttled_readers_arrive_in_order(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """A pipe is full after a few of them, long before its bytes are: what is behind must neither stall nor be lost."""
    server = apps.listen()
    small_windows(server)
    pair = gateway.pair(mode, [server.getsockname()])
    consumer = connect_with_small_windows(apps, pair)
    producer = apps.accept(server)
    there, back = Payload(1, 40_000 * 17), Payload(2, 40_000 * 23)

    def chatter(connection: socket.socket, payload: Payload, size: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        words = payload.bytes()
        for at in range(0, len(words), size):
            connection.sendall(words[at : at + size])
        connection.shutdown(socket.SHUT_WR)

    def sip(connection: socket.socket) -> str:
        received = bytearray()
        while piece := connection.recv(511):
            received += piece
        return digest(bytes(received))

    chatterers = [
        apps.task(lambda: chatter(consumer, there, 17)),
        apps.task(lambda: chatter(producer, back, 23)),
    ]
    arrived = apps.task(lambda: sip(producer))
    assert sip(consumer) == back.digest()
    assert arrived.result() == there.digest()
    for chatterer in chatterers:
        chatterer.result()


def test_each_direction_names_its_path(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    path = "tls-copy" if mode == "tls" else "splice"
    # a first byte that comes just after the relay has looked may be copied, and no later one
    consumer.sendall(b"?")
    assert producer.recv(1) == b"?"
    producer.sendall(b"!")
    assert consumer.recv(1) == b"!"
    for relay in pair:
        (stream,) = relay.status()["streams"]
        assert stream["path"] == {"to_consumer": path, "to_producer": path}
        assert stream["pipe_bytes"] == 0 if mode == "tls" else stream["pipe_bytes"] >= 65536
    apps.exchange(consumer, producer, Payload(1, 3_000_000), Payload(2, 3_000_000))
    for relay in pair:
        close = relay.wait_close()
        assert close["path"] == {"to_consumer": path, "to_producer": path}
        assert close["pipe_bytes"] == 0 if mode == "tls" else close["pipe_bytes"] >= 65536


def test_several_workers_carry_many_connections(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    workers = {"workers": 2}
    pair = gateway.pair(mode, [server.getsockname()], prod=workers, cons=workers)
    ends = [apps.established(server, pair.cons) for _ in range(24)]
    sizes = [(100_001 + 10_007 * number, 500_003 - 10_007 * number) for number in range(len(ends))]
    exchanges = [
        apps.task(partial(apps.exchange, *both, Payload(1, there), Payload(2, back)))
        for both, (there, back) in zip(ends, sizes, strict=True)
    ]
    for exchange in exchanges:
        exchange.result()
    pair.wait_closed(len(ends))
    for relay in pair:
        assert relay.status()["bytes"] == {
            "to_producer": sum(there + 1 for there, _ in sizes),
            "to_consumer": sum(back + 1 for _, back in sizes),
        }


def test_a_relay_has_a_thread_for_every_second_core_and_for_each_if_it_encrypts(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    cores = len(os.sched_getaffinity(0))
    expected = min(cores, 8) if mode == "tls" else min(max(cores // 2, 1), 4)
    for relay in gateway.pair(mode, [apps.listen().getsockname()]):
        assert psutil.Process(relay.pid).num_threads() == expected


class Crowd:
    """So many streams, each full in both directions: everybody sends and nobody reads."""

    there = Payload(1, 1_000_001)
    back = Payload(2, 1_500_003)

    def __init__(self, apps: Applications, pair: Pair, server: socket.socket, count: int) -> None:
        self._apps = apps
        self._ends = []
        for _ in range(count):
            consumer = connect_with_small_windows(apps, pair)
            self._ends.append((consumer, apps.accept(server)))
        self._senders = [
            apps.task(partial(send_and_end, end, payload))
            for ends in self._ends
            for end, payload in zip(ends, (self.there, self.back), strict=True)
        ]
        self._seen: list[object] = []
        eventually(lambda: self._is_stuck(pair), every_s=0.1)

    def _is_stuck(self, pair: Pair) -> bool:
        """Bytes have moved on every stream, not all of them, and between two looks none has."""
        documents = [relay.status() for relay in pair]
        for document in documents:
            assert len(document["streams"]) == len(self._ends)
        to_producer = [stream["bytes"]["to_producer"] for stream in documents[0]["streams"]]
        to_consumer = [stream["bytes"]["to_consumer"] for stream in documents[1]["streams"]]
        assert 0 < min(to_producer) <= max(to_producer) < self.there.size
        assert 0 < min(to_consumer) <= max(to_consumer) < self.back.size
        self._seen.append([document["bytes"] for document in documents])
        return self._seen[-1:] == self._seen[-2:-1]

    def release(self) -> None:
        """Reads all of it on both sides; asserts that it is right."""
        arrived = [self._apps.task(partial(receive, end)) for ends in self._ends for end in ends]
        expected = [self.back.digest(), self.there.digest()] * len(self._ends)
        assert [task.result() for task in arrived] == expected
        for sender in self._senders:
            sender.result()


def test_a_hundred_streams_of_one_user_outgrow_his_pipes_and_all_bytes_arrive(
    nobodys_gateway: Gateway,
) -> None:
    """The kernel gives a user 64 MiB of pipes, over all his processes; what gets none is copied, and says so."""
    apps = Applications()
    try:
        server = apps.listen()
        small_windows(server)
        room = {"max_connections": 100}
        pair = nobodys_gateway.pair("none", [server.getsockname()], prod=room, cons=room)
        crowd = Crowd(apps, pair, server, 100)
        streams = [stream for relay in pair for stream in relay.status()["streams"]]
        crowd.release()
        pair.wait_closed(100)
    finally:
        apps.close()
    paths = {path for stream in streams for path in stream["path"].values()}
    assert paths <= {"splice", "copy"}
    if nobodys_gateway.user is not None:
        assert paths == {"splice", "copy"}
    for relay in pair:
        for close in relay.events("close"):
            assert close["reason"] == "closed"
            assert close["bytes"] == {"to_producer": crowd.there.size, "to_consumer": crowd.back.size}


def test_a_file_that_is_sent_without_copying_arrives_whole(
    gateway: Gateway, apps: Applications, mode: str, tmp_path: Path
) -> None:
    """Its pages travel through the relays; as long as nobody writes to it, what arrives is the file."""
    payload = Payload(1, 30_000_000)
    file = tmp_path / "frames"
    file.write_bytes(payload.bytes())
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.through(server, pair.cons)

    def send_file() -> None:
        with file.open("rb") as frames:
            producer.sendfile(frames)
        producer.shutdown(socket.SHUT_WR)

    sending = apps.task(send_file)
    assert receive(consumer) == payload.digest()
    sending.result()


@pytest.mark.parametrize(("mode", "megabytes"), [("none", 40), ("tls", 160)])
def test_two_hundred_stalled_streams_take_little_memory(
    gateway: Gateway, apps: Applications, mode: str, megabytes: int
) -> None:
    """The kernel holds readers up, not a queue of ours."""
    server = apps.listen()
    small_windows(server)
    room = {"max_connections": 200}
    pair = gateway.pair(mode, [server.getsockname()], prod=room, cons=room)
    crowd = Crowd(apps, pair, server, 200)
    for relay in pair:
        resources = relay.status()["resources"]
        assert resources["rss_bytes"] < megabytes << 20, (
            f"{resources} with 200 stalled streams in mode {mode}"
        )
    crowd.release()
    pair.wait_closed(200)


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("mode", ["none", "tls"])
def test_two_thousand_idle_connections_cost_two_descriptors_each(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    count = 2000
    room = {"max_connections": count}
    pair = gateway.pair(mode, [server.getsockname()], prod=room, cons=room)

    def serve() -> None:
        for _ in range(count):
            producer = apps.accept(server)
            producer.sendall(b"!")

    serving = apps.task(serve)
    consumers = [apps.connect(pair.cons) for _ in range(count)]
    for consumer in consumers:
        assert receive_exactly(consumer, 1) == b"!"
    serving.result()
    for relay in pair:
        status = relay.status()
        resources = status["resources"]
        assert status["connections"]["active"] == count
        assert resources["descriptors"] <= 2 * count + 40, resources
        assert resources["pipes"] <= 8, resources
    consumers[-1].sendall(b"?")
    eventually(lambda: pair.prod.status()["bytes"]["to_producer"] == 1)
