"""Whoever can be killed or frozen: applications and a workflow as programs, each a process of its own.

Each says what it does as one JSON document a line, and hears from us by lines. Run as `python cast.py ROLE ARGUMENTS`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from relay.apps import Payload, Task, digest, receive_until_broken
from relay.gateway import eventually, is_running

from scistream_flows.errors import ScistreamError
from scistream_flows.stream import Progress, StreamEnd, open_stream

Document = dict[str, Any]


class Actor:
    """One of these programs, as the test sees it."""

    def __init__(self, role: str, *, environment: Mapping[str, str], **arguments: Any) -> None:
        self.role = role
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), role, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        self.said: list[Document] = []
        self._words: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._read_words, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def words(self) -> str:
        """What it has said to stderr."""
        return "".join(self._words)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def _read_words(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self._words.append(line)

    def heard(self, event: str) -> list[Document]:
        """What it has said of this kind."""
        return [one for one in self.said if one["event"] == event]

    def wait_for(self, *events: str, within_s: float = 30) -> Document:
        """The first thing it says of one of these kinds."""

        def hear() -> Document | None:
            found = next((one for one in self.said if one["event"] in events), None)
            if found is None and self.process.poll() is not None:
                for reader in self._readers:
                    reader.join(5)
                found = next((one for one in self.said if one["event"] in events), None)
                assert found, f"{self.role} has ended: {self.said} {self.words}"
            return found

        found = eventually(hear, within_s)
        assert found
        return found

    def tell(self, word: str) -> None:
        """Say something to it."""
        assert self.process.stdin
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait(10)
        for reader in self._readers:
            reader.join(5)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        assert not is_running(self.pid)


def say(event: str, **more: Any) -> None:
    """One document on stdout."""
    print(json.dumps({"event": event, **more}), flush=True)


def hear() -> str:
    """The next word from the test; ends the program when there is none any more."""
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return line.strip()


def converse(
    connection: socket.socket, seed: int, size: int, bytes_per_s: float, hurry: threading.Event
) -> None:
    """Sends a payload and the end of output while it receives until there is no more; says how both went.

    It sends so many bytes a second at most, 0 for any, until it is in a hurry.
    """
    connection.settimeout(60)
    payload = Payload(seed, size)

    def send() -> str:
        began, sent = time.monotonic(), 0
        try:
            for block in payload.blocks():
                connection.sendall(block)
                sent += len(block)
                if bytes_per_s:
                    hurry.wait(max(0.0, began + sent / bytes_per_s - time.monotonic()))
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            return type(error).__name__
        return "eof"

    sending = Task(send)
    received, end = receive_until_broken(connection)
    say("received", count=len(received), digest=digest(received), end=end)
    say("sent", end=sending.result())


def produce(*, port: int, seed: int, size: int, bytes_per_s: float) -> None:
    """Listens, and serves one connection after the other until it is killed; a word puts it in a hurry."""
    hurry = threading.Event()

    def listen() -> None:
        hear()
        hurry.set()

    threading.Thread(target=listen, daemon=True).start()
    with socket.create_server(("127.0.0.1", port), backlog=64) as server:
        say("listening", address="{}:{}".format(*server.getsockname()))
        while True:
            connection, _ = server.accept()
            threading.Thread(
                target=_serve, args=(connection, seed, size, bytes_per_s, hurry), daemon=True
            ).start()


def _serve(
    connection: socket.socket, seed: int, size: int, bytes_per_s: float, hurry: threading.Event
) -> None:
    with connection:
        try:
            first = connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return
        if first:  # else: a probe's, which nobody used
            converse(connection, seed, size, bytes_per_s, hurry)


def consume(*, address: str, seed: int, size: int, bytes_per_s: float) -> None:
    """Connects, sends, receives, and ends."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        say("connected")
        converse(connection, seed, size, bytes_per_s, threading.Event())


def ends(end: StreamEnd) -> Document:
    """How a stream has ended, by side."""
    sides = {"PROD": end.prod, "CONS": end.cons}
    return {
        role: {"state": one.state, "reason": one.reason, "bytes": one.bytes.model_dump()}
        for role, one in sides.items()
    }


def work(*, producer: str, consumer: str, holds: list[str], options: Document) -> None:
    """A script with a stream. It stops where it is told to, until it hears a word; then it waits for `release`."""

    def tell(progress: Progress) -> None:
        if progress.step in holds:
            say(progress.step)
            hear()

    try:
        with open_stream(producer, consumer, on_progress=tell, **options) as stream:
            say("opened", listeners=stream.listeners)
            hear()
            say("released", ends=ends(stream.release()))
    except ScistreamError as wrong:
        say("failed", code=wrong.code, message=wrong.message)


if __name__ == "__main__":
    ROLES: dict[str, Callable[..., None]] = {"produce": produce, "consume": consume, "work": work}
    ROLES[sys.argv[1]](**json.loads(sys.argv[2]))
