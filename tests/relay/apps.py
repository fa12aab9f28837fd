"""The applications of a test, and what stands between two relays: plain sockets, each with a deadline."""

import hashlib
import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from .gateway import DEADLINE_S, Relay

T = TypeVar("T")
BLOCK_BYTES = 1 << 18
Address = tuple[Any, ...]


@lru_cache(maxsize=8)
def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK_BYTES)  # noqa: S311 - a payload, no secret


@dataclass(frozen=True)
class Payload:
    """Bytes of which each depends on its position: what is lost, doubled or exchanged changes the digest."""

    seed: int
    size: int

    def blocks(self) -> Iterator[bytes]:
        base = memoryview(noise(self.seed))
        for offset in range(0, self.size, BLOCK_BYTES):
            block = (offset ^ self.seed).to_bytes(8, "little") + base[8:]
            yield block[: self.size - offset]

    def bytes(self) -> bytes:
        return b"".join(self.blocks())

    def digest(self) -> str:
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return f"{self.size} bytes {digest.hexdigest()}"


def digest(received: bytes) -> str:
    return f"{len(received)} bytes {hashlib.sha256(received).hexdigest()}"


def send(connection: socket.socket, payload: Payload) -> None:
    for block in payload.blocks():
        connection.sendall(block)


def send_and_end(connection: socket.socket, payload: Payload) -> None:
    send(connection, payload)
    connection.shutdown(socket.SHUT_WR)


def receive(connection: socket.socket) -> str:
    """The digest of everything until the end of file; a reset is an exception."""
    count, digest = 0, hashlib.sha256()
    while piece := connection.recv(1 << 20):
        count += len(piece)
        digest.update(piece)
    return f"{count} bytes {digest.hexdigest()}"


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = connection.recv(min(1 << 20, count - len(received)))
        assert piece, f"end of file after {len(received)} of {count} bytes"
        received += piece
    return bytes(received)


def receive_until_broken(connection: socket.socket) -> tuple[bytes, str]:
    """Everything that arrives, and how it ended: "eof" or the name of the error."""
    received = bytearray()
    try:
        while piece := connection.recv(1 << 20):
            received += piece
    except OSError as error:
        return bytes(received), type(error).__name__
    return bytes(received), "eof"


def nobody_waits(server: socket.socket) -> bool:
    """Whether no connection waits to be accepted at this moment."""
    return not select.select([server], [], [], 0)[0]


def reset(connection: socket.socket) -> None:
    """Closes with RST, as a killed connection does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Task(Generic[T]):
    """A thread with an answer."""

    def __init__(self, what: Callable[[], T]) -> None:
        self._what = what
        self._answer: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer.append(self._what())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever asks
            self._error = error

    def result(self, within_s: float = 60) -> T:
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"not done within {within_s} s"
        if self._error is not None:
            raise self._error
        return self._answer[0]

    def is_done(self) -> bool:
        """Whether it has come to its end."""
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Waits for the end without an interest in how."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "a thread of the test does not end"


class Applications:
    """Every socket and thread of one test; closed at its end."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._tasks: list[Task[Any]] = []

    def keep(self, connection: socket.socket) -> socket.socket:
        connection.settimeout(DEADLINE_S)
        self._sockets.append(connection)
        return connection

    def listen(self, host: str = "127.0.0.1", port: int = 0, backlog: int = 4096) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return self.keep(socket.create_server((host, port), family=family, backlog=backlog))

    def accept(self, server: socket.socket) -> socket.socket:
        return self.keep(server.accept()[0])

    def connect(self, relay: Relay, index: int = 0) -> socket.socket:
        return self.dial(relay.address(index))

    def dial(self, address: Address, source: str = "") -> socket.socket:
        return self.keep(
            socket.create_connection(address[:2], timeout=DEADLINE_S, source_address=(source, 0))
        )

    def knock(self, address: Address, words: bytes = b"", source: str = "") -> tuple[bytes, str]:
        """Connects, says something, and hears the answer. Who is turned away may be so before connect returns."""
        try:
            connection = self.dial(address, source)
            connection.sendall(words)
        except (BrokenPipeError, ConnectionResetError):
            return b"", "ConnectionResetError"
        return receive_until_broken(connection)

    def through(
        self, server: socket.socket, relay: Relay, index: int = 0
    ) -> tuple[socket.socket, socket.socket]:
        """A connection through the relays: the consumer's end and the producer's end."""
        consumer = self.connect(relay, index)
        return consumer, self.accept(server)

    def task(self, what: Callable[[], T]) -> Task[T]:
        task = Task(what)
        self._tasks.append(task)
        return task

    def established(
        self, server: socket.socket, relay: Relay, index: int = 0
    ) -> tuple[socket.socket, socket.socket]:
        """As `through`, and a byte has gone each way: the relays have both sockets of it, and no doubt."""
        consumer, producer = self.through(server, relay, index)
        consumer.sendall(b"?")
        assert receive_exactly(producer, 1) == b"?"
        producer.sendall(b"!")
        assert receive_exactly(consumer, 1) == b"!"
        return consumer, producer

    def exchange(self, one: socket.socket, other: socket.socket, there: Payload, back: Payload) -> None:
        """Both payloads at once, one in each direction, each ended by its sender; asserts what arrived."""
        senders = [
            self.task(lambda: send_and_end(one, there)),
            self.task(lambda: send_and_end(other, back)),
        ]
        arrived = self.task(lambda: receive(other))
        assert receive(one) == back.digest()
        assert arrived.result() == there.digest()
        for sender in senders:
            sender.result()

    def forget(self, *connections: socket.socket) -> None:
        """Closes these now: a test of many would keep them all until its end. Tasks that are done go as well."""
        for connection in connections:
            self._sockets.remove(connection)
            connection.close()
        self._tasks = [task for task in self._tasks if not task.is_done()]

    def close(self) -> None:
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for task in self._tasks:
            task.abandon()


def _pass_on(_: list[str], destination: socket.socket, piece: bytes) -> None:
    destination.sendall(piece)


class Tap:
    """Stands on the WAN between two relays: records each byte, and can cut."""

    def __init__(self, applications: Applications) -> None:
        self._applications = applications
        self._lock = threading.Lock()
        self._far: Address = ()
        self.legs: list[tuple[socket.socket, socket.socket]] = []
        self.to_prod: list[bytearray] = []
        self.to_cons: list[bytearray] = []
        self.speakers: list[list[str]] = []
        """Whose turn it was on each connection, in their order."""
        self._has_cut = False
        self.begins: Callable[[bytes], object] | None = None
        """Told of the first bytes of each direction, before they go on."""
        self.passes: Callable[[list[str], socket.socket, bytes], object] = _pass_on
        """Gives a piece to where it is to go; told whose turn it was on this connection so far, and is."""

    def __call__(self, far: tuple[str, int]) -> tuple[str, int]:
        """Stands before this address from now on; the address to dial instead."""
        self._far = far
        server = self._applications.listen()
        self._applications.task(lambda: self._serve(server))
        host, port = server.getsockname()
        return host, port

    def _serve(self, server: socket.socket) -> None:
        server.settimeout(None)
        with suppress(OSError):
            while True:
                near = self._applications.keep(server.accept()[0])
                try:
                    far = self._applications.dial(self._far)
                except OSError:
                    near.close()
                    continue
                there, back = bytearray(), bytearray()
                with self._lock:
                    self.legs.append((near, far))
                    self.to_prod.append(there)
                    self.to_cons.append(back)
                    turns: list[str] = []
                    self.speakers.append(turns)
                self._pump(near, far, there, turns, "cons")
                self._pump(far, near, back, turns, "prod")

    def _speaks(self, turns: list[str], who: str) -> list[str]:
        with self._lock:
            if turns[-1:] != [who]:
                turns.append(who)
            return list(turns)

    def _pump(
        self,
        source: socket.socket,
        destination: socket.socket,
        record: bytearray,
        turns: list[str],
        who: str,
    ) -> None:
        def pump() -> None:
            source.settimeout(None)
            try:
                while piece := source.recv(1 << 16):
                    if self.begins and not record:
                        self.begins(piece)
                    record.extend(piece)
                    self.passes(self._speaks(turns, who), destination, piece)
                destination.shutdown(socket.SHUT_WR)
            except OSError:
                # After a cut one relay's reset must not overtake the FIN that the other one is to see.
                for end in () if self._has_cut else (source, destination):
                    with suppress(OSError):
                        # The other pump may be reading it: a socket is not closed while somebody reads it.
                        end.shutdown(socket.SHUT_RD)
                    with suppress(OSError):
                        reset(end)

        self._applications.task(pump)

    def cut_with_fin(self, leg: int = -1) -> None:
        """Ends both directions of a connection as a middlebox does that closes in order."""
        self._has_cut = True
        for end in self.legs[leg]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_WR)

    def seen(self) -> bytes:
        """Every byte of every connection, in both directions."""
        return b"\n".join(bytes(record) for record in self.to_prod + self.to_cons)
