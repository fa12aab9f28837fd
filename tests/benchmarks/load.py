"""The load: one process that produces or consumes on command. Nothing but the standard library; run as a script.

Commands are JSON documents, one a line on stdin, each answered by one line on stdout. What is sent depends on its
position: a block of a prime number of bytes, again and again, from a start that differs between connections. The
consumer lets the kernel throw away what it does not look at (MSG_TRUNC), so that the load costs less than what it
measures; a sample of 64 KiB out of every 16 MiB is read and compared.
"""

from __future__ import annotations

import json
import random
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PERIOD_BYTES = 4_194_301
CHUNK_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 16
SAMPLE_EVERY_BYTES = 1 << 24
# Kind, number of the connection, milliseconds to send, pacing in bytes/s, and the most bytes to send; 0 is no limit.
HEADER = struct.Struct(">cIQQQ")
MESSAGE = bytes(range(64))
DEADLINE_S = 60.0
SO_MAX_PACING_RATE = 47  # Python has no name for it before 3.14
TRY_AGAIN = (BlockingIOError, InterruptedError)

_once = random.Random(8).randbytes(PERIOD_BYTES)  # noqa: S311 - a payload, no secret
PAYLOAD = memoryview(_once + _once[:CHUNK_BYTES])


def expected(number: int, offset: int, count: int) -> memoryview:
    """What connection `number` carries at an offset; at most CHUNK_BYTES of it."""
    at = (number * 999_983 + offset) % PERIOD_BYTES
    return PAYLOAD[at : at + count]


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- the producer's side ---------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A connection as the listening application has it; its first bytes say what is wanted."""

    connection: socket.socket
    head: bytes = b""
    kind: bytes = b""
    number: int = 0
    duration_s: float = 0
    most_bytes: int = 0
    until: float = 0
    sent: int = 0
    waiting: bytes = b""


class Producer:
    """Listens, and does for each connection what its header asks for."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.server = socket.create_server((host, 0), family=family, backlog=4096)
        self.server.settimeout(0)
        self.poll = select.epoll()
        self.poll.register(self.server, select.EPOLLIN)
        self.poll.register(sys.stdin, select.EPOLLIN)
        self.served: dict[int, Served] = {}
        self.sent: dict[int, int] = {}
        self.cpu_s = cpu_s()

    def run(self) -> None:
        say({"address": list(self.server.getsockname()[:2])})
        while True:
            for number, event in self.poll.poll():
                if number == self.server.fileno():
                    self._accept()
                elif number == sys.stdin.fileno():
                    if not self._command(sys.stdin.readline()):
                        return
                elif one := self.served.get(number):
                    try:
                        self._serve(one, event)
                    except TRY_AGAIN:
                        pass
                    except OSError:
                        self._drop(one)

    def _command(self, line: str) -> bool:
        if line:
            counts, self.sent = self.sent, {}
            open_too = {str(one.number): one.sent for one in self.served.values() if one.kind == b"B"}
            spent, self.cpu_s = cpu_s() - self.cpu_s, cpu_s()
            say({"sent": counts | open_too, "cpu_s": spent})
        return bool(line)

    def _accept(self) -> None:
        for _ in range(256):
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            connection.settimeout(0)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.served[connection.fileno()] = Served(connection)
            self.poll.register(connection, select.EPOLLIN)

    def _serve(self, one: Served, event: int) -> None:
        if one.until:
            self._send(one)
            if event & (select.EPOLLHUP | select.EPOLLERR):
                self._drop(one)
        elif one.kind == b"E":
            self._echo(one)
        else:
            self._read(one)

    def _read(self, one: Served) -> None:
        piece = one.connection.recv(HEADER.size - len(one.head) if not one.kind else 1)
        if not piece:
            self._drop(one)
        elif one.kind == b"B":
            one.until = time.monotonic() + one.duration_s
            self.poll.modify(one.connection, select.EPOLLOUT)
        else:
            one.head += piece
            if len(one.head) == HEADER.size:
                one.kind, one.number, milliseconds, pacing, one.most_bytes = HEADER.unpack(one.head)
                one.duration_s = milliseconds / 1000
                if pacing:
                    one.connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", pacing))
                one.connection.send(b"k")
                if one.kind == b"C":
                    one.connection.shutdown(socket.SHUT_WR)

    def _send(self, one: Served) -> None:
        left = one.most_bytes - one.sent if one.most_bytes else CHUNK_BYTES
        if left and time.monotonic() < one.until:
            one.sent += one.connection.send(expected(one.number, one.sent, min(left, CHUNK_BYTES)))
        else:
            self.sent[one.number] = one.sent
            one.kind, one.until = b"-", 0  # what is left is to hear the consumer's end
            one.connection.shutdown(socket.SHUT_WR)
            self.poll.modify(one.connection, select.EPOLLIN)

    def _echo(self, one: Served) -> None:
        piece = one.connection.recv(1 << 16)
        if not piece:
            self._drop(one)
        else:
            one.connection.send(piece)

    def _drop(self, one: Served) -> None:
        if one.kind == b"B":
            self.sent[one.number] = one.sent
        self.served.pop(one.connection.fileno())
        self.poll.unregister(one.connection)
        one.connection.close()


# --- the consumer's side ---------------------------------------------------------------------------------------------


@dataclass
class Received:
    """A connection of the connecting application."""

    connection: socket.socket
    number: int
    received: int = 0
    next_sample: int = 0
    samples: int = 0
    wrong: list[int] = field(default_factory=list)


class Consumer:
    """Does one thing after the other."""

    def __init__(self) -> None:
        self.sink = bytearray(4 * CHUNK_BYTES)
        self.next_number = 1

    def run(self) -> None:
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "bulk": self.bulk,
            "round_trips": self.round_trips,
            "connects": self.connects,
            "idle": self.idle,
        }
        for line in sys.stdin:
            command = json.loads(line)
            action = actions[command.pop("do")]
            try:
                say(action(**command))
            except (OSError, AssertionError) as error:
                say({"error": f"{type(error).__name__}: {error}"})

    def bulk(
        self,
        addresses: list[tuple[str, int]],
        *,
        duration_s: float,
        preamble: str = "",
        idle: int = 0,
        slow_s: float = 0,
        timeline: bool = False,
        pacing_bytes_per_s: int = 0,
        most_bytes: int = 0,
    ) -> dict[str, Any]:
        """Receives on connections at once; the last `idle` ones carry nothing.

        With `slow_s`, that long each connection reads 16 KiB every 50 ms, and after it as fast as it can. With
        `most_bytes` the producer ends each after so many, if its time has not.
        """
        ours = [
            Received(self._dial(address, preamble), self.next_number + i)
            for i, address in enumerate(addresses)
        ]
        self.next_number += len(ours)
        asks = (int(duration_s * 1000), pacing_bytes_per_s, most_bytes)
        for one in ours:
            one.connection.sendall(HEADER.pack(b"B", one.number, *asks))
        for one in ours:
            take(one.connection, b"k")
        say({"connected": len(ours)})
        sys.stdin.readline()
        active = ours[: len(ours) - idle]
        began, used = time.monotonic(), cpu_s()
        for one in active:
            one.connection.sendall(b"g")
        if slow_s:
            self._read_slowly(active, began + slow_s)
        events = self._receive(active, timeline=timeline)
        ended = time.monotonic()
        for one in ours:
            one.connection.close()
        wrong = [f"connection {one.number} at {at}" for one in ours for at in one.wrong]
        return {
            "received": {str(one.number): one.received for one in active},
            "seconds": ended - began,
            "cpu_s": cpu_s() - used,
            "samples": sum(one.samples for one in ours),
            "wrong": wrong,
            "timeline": events,
        }

    def _receive(self, active: list[Received], *, timeline: bool) -> list[tuple[float, int]]:
        poll = select.epoll()
        by_descriptor = {one.connection.fileno(): one for one in active}
        for one in active:
            one.connection.settimeout(0)
            poll.register(one.connection, select.EPOLLIN)
        events: list[tuple[float, int]] = []
        total = 0
        while by_descriptor:
            ready = poll.poll(DEADLINE_S)
            assert ready, f"nothing for {DEADLINE_S:g} s"
            for descriptor, _ in ready:
                one = by_descriptor[descriptor]
                count = self._take(one)
                total += count
                if count == 0:
                    poll.unregister(descriptor)
                    del by_descriptor[descriptor]
            if timeline:
                events.append((time.monotonic(), total))
        poll.close()
        return events

    def _take(self, one: Received) -> int:
        """One read: up to the next sample thrown away by the kernel, or of a sample as much as is there."""
        left = one.next_sample - one.received
        if left > 0:
            count = one.connection.recv_into(self.sink, min(left, len(self.sink)), socket.MSG_TRUNC)
        else:
            count = one.connection.recv_into(self.sink, SAMPLE_BYTES + left)
            if self.sink[:count] != expected(one.number, one.received, count):
                one.wrong.append(one.received)
            if left - count <= -SAMPLE_BYTES:
                one.samples += 1
                one.next_sample += SAMPLE_EVERY_BYTES
        one.received += count
        return count

    def _read_slowly(self, active: list[Received], until: float) -> None:
        while time.monotonic() < until:
            for one in active:
                one.connection.settimeout(0)
                try:
                    count = one.connection.recv_into(self.sink, 1 << 14)
                except TRY_AGAIN:
                    continue
                if self.sink[:count] != expected(one.number, one.received, count):
                    one.wrong.append(one.received)
                one.received += count
                one.next_sample = one.received
            time.sleep(0.05)

    def round_trips(self, address: tuple[str, int], duration_s: float) -> dict[str, Any]:
        """64 bytes there and back, one after the other."""
        connection = self._dial(address)
        connection.sendall(HEADER.pack(b"E", 0, 0, 0, 0))
        take(connection, b"k")
        for _ in range(200):
            connection.sendall(MESSAGE)
            take(connection, MESSAGE)
        say({"connected": 1})
        sys.stdin.readline()
        times: list[int] = []
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            began = time.perf_counter_ns()
            connection.sendall(MESSAGE)
            answer = connection.recv(64)
            times.append(time.perf_counter_ns() - began)
            if answer != MESSAGE:
                take(connection, MESSAGE[len(answer) :])
        connection.close()
        times.sort()
        return {
            "count": len(times),
            "p50_us": times[len(times) // 2] / 1000,
            "p99_us": times[len(times) * 99 // 100] / 1000,
        }

    def connects(self, address: tuple[str, int], duration_s: float, at_once: int) -> dict[str, Any]:
        """Connect, one byte back, close; always `at_once` of them under way."""
        poll = select.epoll()
        header = HEADER.pack(b"C", 0, 0, 0, 0)
        ours: dict[int, socket.socket] = {}

        def begin() -> None:
            one = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
            one.settimeout(0)
            one.connect_ex((address[0], address[1]))
            ours[one.fileno()] = one
            poll.register(one, select.EPOLLOUT)

        say({"connected": 0})
        sys.stdin.readline()
        count = failed = 0
        began = time.monotonic()
        end = began + duration_s
        for _ in range(at_once):
            begin()
        while ours:
            ready = poll.poll(DEADLINE_S)
            assert ready, f"no connection for {DEADLINE_S:g} s"
            for number, event in ready:
                one = ours[number]
                try:
                    if event & select.EPOLLOUT and not event & select.EPOLLERR:
                        one.send(header)
                        poll.modify(number, select.EPOLLIN)
                        continue
                    piece = one.recv(2)
                    if piece == b"k":
                        count += 1
                        continue  # the end of file is to come
                    failed += piece != b""
                except TRY_AGAIN:
                    continue
                except OSError:
                    failed += 1
                poll.unregister(number)
                del ours[number]
                one.close()
                if time.monotonic() < end:
                    begin()
        return {"count": count, "failed": failed, "seconds": time.monotonic() - began}

    def idle(self, address: tuple[str, int], connections: int) -> dict[str, Any]:
        """Holds connections, of which each has carried a byte each way."""
        ours: list[socket.socket] = []
        for at in range(0, connections, 64):  # no burst that a backlog would drop
            some = [self._dial(address) for _ in range(min(64, connections - at))]
            for one in some:
                one.sendall(HEADER.pack(b"I", 0, 0, 0, 0))
            for one in some:
                take(one, b"k")
            ours += some
        say({"connected": len(ours)})
        sys.stdin.readline()
        alive = 0
        for one in ours:
            one.settimeout(0)
            try:
                one.recv(1)
            except BlockingIOError:
                alive += 1
            one.close()
        return {"alive": alive}

    def _dial(self, address: tuple[str, int], preamble: str = "") -> socket.socket:
        connection = socket.create_connection((address[0], address[1]), timeout=DEADLINE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if preamble:
            # a relay of ours without one before it is spoken to as that one would
            connection.sendall(bytes.fromhex(preamble))
            answer = b""
            while len(answer) < 32:
                answer += (piece := connection.recv(32 - len(answer)))
                assert piece, "the relay has hung up"
            assert answer[:6] == b"S2DR\1\0", f"the relay says {answer!r}"
        return connection


def take(connection: socket.socket, what: bytes) -> None:
    """Reads exactly this."""
    got = b""
    while len(got) < len(what):
        piece = connection.recv(len(what) - len(got))
        assert piece, f"end of file after {len(got)} of {len(what)} bytes"
        got += piece
    assert got == what, f"{got!r} is not {what!r}"


def say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        Producer(sys.argv[2]).run()
    else:
        Consumer().run()
