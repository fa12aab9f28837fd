"""The verbs of a facility on a Unix socket, for the accounts of this machine. Who calls, the kernel says.

One connection is one question: a line of JSON, `{"protocol", "verb", "document"}`, and a line back, the answer of
`S2CS.answer`. The owner of what is asked for comes from SO_PEERCRED (unix(7)), never from the document.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pwd
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from scistream_flows.config import FacilityConfig
from scistream_flows.errors import (
    PROTOCOL,
    BadRequest,
    Busy,
    ConfigError,
    FacilityUnreachable,
    ProtocolMismatch,
    RateLimited,
    ScistreamError,
    Unauthenticated,
    error_from_document,
)
from scistream_flows.registry import asked_from
from scistream_flows.s2cs import S2CS, unix_owner

log = logging.getLogger(__name__)

LONGEST_QUESTION_BYTES: Final = 256 * 1024
LONGEST_ANSWER_BYTES: Final = 16 * 1024 * 1024
QUESTION_S: Final = 10.0  # for the whole of a question, and again for taking its answer
DEADLINE_S: Final = 120.0
AT_ONCE: Final = 64
AT_ONCE_PER_ACCOUNT: Final = 16
_LONGEST_PATH_BYTES: Final = 107  # sockaddr_un
_OVERFLOW: Final = Path("/proc/sys/kernel/overflowuid")


# --- the service's side


@contextlib.contextmanager
def serve_socket(config: FacilityConfig) -> Iterator[Path | None]:
    """Serve a facility at the socket of its configuration while the block runs; without one, do nothing.

    Yields:
        The socket, which is there and accepts.

    Raises:
        ConfigError: The socket cannot be made, its directory is open to others, or another process serves it.
    """
    if config.service.socket is None:
        yield None
        return
    path = Path(config.service.socket)
    if len(os.fsencode(path)) > _LONGEST_PATH_BYTES:
        raise _unusable(path, f"is longer than {_LONGEST_PATH_BYTES} bytes", "Choose a shorter path")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _check_directory(path)
            stack.enter_context(_alone(path))
            _clear(path)
            server = _Server(path, stack.enter_context(S2CS(config)))
            stack.callback(path.unlink, missing_ok=True)
            stack.callback(server.server_close)
            path.chmod(0o666)
        except OSError as wrong:
            raise _unusable(path, f"cannot be made: {wrong.strerror}", "Look at its directory") from None
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="socket")
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        yield path


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """A lock beside the socket, which the kernel frees with its process."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _unusable(path, "is served by another process", "End that one first") from None
        yield


def _clear(path: Path) -> None:
    """Remove the socket of a process that was killed, and nothing else. Whoever calls has the lock."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise _unusable(path, "is there, and is no socket", "Name another path")
        path.unlink()


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: Path, service: S2CS) -> None:
        super().__init__(str(path), _Question)
        self.service = service
        self._counting = threading.Lock()
        self._asking: Counter[int] = Counter()

    def process_request(self, request: Any, client_address: Any) -> None:
        uid = _peer(request)[1]
        with self._counting:
            busy = self._asking.total() >= AT_ONCE or self._asking[uid] >= AT_ONCE_PER_ACCOUNT
            if not busy:
                self._asking[uid] += 1
        if busy:
            # Whoever has not read a word yet has room for these: this thread does not wait.
            _say(request, _refusal(Busy("the service answers as many questions as it can", which="socket")))
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        uid = _peer(request)[1]
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self._asking[uid] -= 1
                if not self._asking[uid]:
                    del self._asking[uid]

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - as the library has it
        log.warning("a question at the socket was not answered: %r", sys.exc_info()[1])


class _Question(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        try:
            verb, document = _question(_line(self.request, LONGEST_QUESTION_BYTES, QUESTION_S))
            pid, uid, _ = _peer(self.request)
            owner = _owner(uid, self.server.service.config)
            asked_from.set(f"uid {uid} pid {pid}")  # of this thread, which answers one question
            self.server.service.pace(owner)
            said = self.server.service.answer(verb, document, owner=owner)
        except ScistreamError as wrong:
            said = _refusal(wrong)
        except OSError:
            return  # whoever asked is gone, or says nothing
        except Exception as wrong:
            log.exception("a question at the socket")
            said = _refusal(
                ScistreamError(f"{type(wrong).__name__}: {wrong}", which="socket", hint="See its log")
            )
        _say(self.request, said)


def _question(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRequest("the question is not JSON", which="socket") from None
    if not isinstance(asked, dict):
        raise BadRequest("the question is not an object", which="socket")
    if asked.get("protocol") != PROTOCOL:
        raise ProtocolMismatch(
            f"the question speaks protocol {asked.get('protocol')!r}, this service {PROTOCOL}", which="socket"
        )
    verb, document = asked.get("verb"), asked.get("document")
    if (
        not isinstance(verb, str)
        or not isinstance(document, dict)
        or set(asked) != {"protocol", "verb", "document"}
    ):
        raise BadRequest("a question has protocol, verb and document", which="socket")
    return verb, document


def _owner(uid: int, config: FacilityConfig) -> str:
    """The owner of what an account opens.

    Raises:
        Unauthenticated: The kernel cannot name the account: it is of another user namespace.
    """
    if _OVERFLOW.exists() and uid == int(_OVERFLOW.read_text()):
        raise Unauthenticated(
            f"account {uid} stands for every account that this machine does not know",
            which=str(uid),
            hint="Call from outside the container, or map your account into it",
        )
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return unix_owner(uid)
    return config.service.accounts.get(name) or unix_owner(uid)


def _refusal(wrong: ScistreamError) -> dict[str, Any]:
    return {"protocol": PROTOCOL, "ok": False, "error": wrong.to_document()}


def _say(connection: socket.socket, document: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # whoever asked does not listen any more
        connection.settimeout(QUESTION_S)
        connection.sendall(json.dumps(document).encode() + b"\n")


# --- the client's side


def ask(
    path: str | Path, verb: str, document: Mapping[str, Any], *, deadline_s: float = DEADLINE_S
) -> dict[str, Any]:
    """What the service at a socket answers to a verb.

    Args:
        path: The socket.
        verb: One of `S2CS`'s.
        document: The verb's document.
        deadline_s: For the answer, seconds.

    Raises:
        ConfigError: Others could put a socket of theirs into that directory.
        BadRequest: The document is not JSON.
        FacilityUnreachable: Nobody serves there, or no answer came.
    """
    path = Path(path)
    _check_directory(path)
    try:
        question = json.dumps({"protocol": PROTOCOL, "verb": verb, "document": document}).encode() + b"\n"
    except (TypeError, ValueError) as wrong:
        raise BadRequest(f"the document is not JSON: {wrong}", which="document") from None
    until = time.monotonic() + deadline_s
    while True:
        said = _asked(path, verb, question, deadline_s, until)
        pause_s = _pause_s(said)
        if pause_s is None or time.monotonic() + pause_s >= until:
            return said
        time.sleep(pause_s)


def _pause_s(said: Mapping[str, Any]) -> float | None:
    """How long to wait before asking again, seconds; None unless the answer is that this account asks too often."""
    wrong = said.get("error")
    limited = error_from_document(wrong) if isinstance(wrong, dict) else None
    return limited.retry_after_s if isinstance(limited, RateLimited) else None


def _asked(path: Path, verb: str, question: bytes, deadline_s: float, until: float) -> dict[str, Any]:
    """One question and its answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(deadline_s)
            connection.connect(str(path))
            with contextlib.suppress(
                BrokenPipeError, ConnectionResetError
            ):  # refused unread: the reason is there
                connection.sendall(question)
            said = json.loads(_line(connection, LONGEST_ANSWER_BYTES, until - time.monotonic()))
        except (FileNotFoundError, ConnectionRefusedError):
            raise FacilityUnreachable(
                f"no service at {path}", which=str(path), hint="Its administrator starts it: s2cs"
            ) from None
        except TimeoutError:
            raise FacilityUnreachable(
                f"the service at {path} has not answered {verb} within {deadline_s:g} s",
                which=str(path),
                hint="What it did is unknown, and ends by its lease",
            ) from None
        except (OSError, ValueError) as wrong:
            raise FacilityUnreachable(
                f"the service at {path} gave no answer: {wrong}", which=str(path)
            ) from None
    if not isinstance(said, dict):
        raise FacilityUnreachable(f"the service at {path} answered with no document", which=str(path))
    return said


# --- both


def _check_directory(path: Path) -> None:
    """Only whoever owns the directory can have put the socket there: the service, or root."""
    try:
        mode = path.parent.stat().st_mode
    except FileNotFoundError:
        return  # then nobody serves there
    except OSError as wrong:
        raise _unusable(
            path, f"cannot be reached: {wrong.strerror}", "Ask the facility's administrator"
        ) from None
    if mode & 0o022:
        raise _unusable(
            path,
            "is in a directory in which others may write",
            f"chmod go-w {path.parent}, or use another one",
        )


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """Process, account and group at the other end, as they were when it connected."""
    size = struct.calcsize("iII")
    pid, uid, gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid, gid


def _line(connection: socket.socket, longest_bytes: int, within_s: float) -> bytes:
    """Raises OSError when the other end is gone or slow, BadRequest when it says more than it may."""
    until = time.monotonic() + within_s
    received = bytearray()
    while not received.endswith(b"\n"):
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        piece = connection.recv(65_536)
        if not piece:
            raise ConnectionResetError("it hung up in the middle of a line")
        received += piece
        if len(received) > longest_bytes:
            raise BadRequest(f"more than {longest_bytes} bytes in a line", which="socket")
    return bytes(received)


def _unusable(path: Path, words: str, hint: str) -> ConfigError:
    return ConfigError(f"the socket {path} {words}", which=str(path), hint=hint, key="service.socket")
