"""A HAProxy in the place of `s2ds`: run as a program, it starts one, and stays with it until it ends.

    python haproxy.py start --runtime-dir DIR        with the configuration of a relay on stdin, as `s2ds start`

It leaves a control socket and an event log as `s2ds` does, so that every other verb is that of `s2ds`. HAProxy gets its
configuration from memory and its listeners as open sockets: no file is left, and nobody can take a port from it. What
changes later (targets, peers, sources) goes through its command line, of which this process alone has the other end.

HAProxy has no keys and sends no probe: only mode `none`, and READY is unproven. No other module is loaded with this
one, since a process of it stays for each relay.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import json
import os
import random
import re
import resource
import secrets
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, NamedTuple

from scistream_flows.errors import PROTOCOL, RelayError

UNPROVEN: Final = (
    "HAProxy carries it: in clear text and unproven, READY means that it listens; it keeps to no rate"
)

_START_TIMEOUT_S: Final = 15.0
_CONNECT_TIMEOUT_S: Final = 10
_ASK_TIMEOUT_S: Final = 1.0
_CLIENT_TIMEOUT_S: Final = 1.0
_CLOSING_S: Final = 0.5
_TICK_S: Final = 0.25
_RATE_OVER_S: Final = 6.0  # HAProxy counts the bytes of an open connection every 5 s
_LONGEST_S: Final = 315_360_000.0
_LONGEST_REQUEST_BYTES: Final = 1 << 20
_AT_ONCE: Final = 100  # commands in a line, which HAProxy takes up to 16 KiB long
_PIPE_BYTES: Final = 1 << 20
_MOST_THREADS: Final = 4
_SPARE: Final = 8  # connections accepted beyond the limit, to be turned away

_FIELDS: Final = frozenset(
    (
        *("protocol", "relay_id", "role", "mode", "listen", "sources", "targets", "peers", "onward_source"),
        *("probe", "until", "max_connections", "rate_mbits_per_s"),
        *("lease_s", "lifetime_s", "hello_timeout_s", "linger_s"),
    )
)
_CHANGES: Final = frozenset(("protocol", "targets", "peers", "sources", "lease_s"))

_MISTAKES: Final = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38


def find_haproxy() -> str:
    """The path of HAProxy on this machine: on PATH, or where only an administrator's PATH leads.

    Raises:
        RelayError: When there is none.
    """
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
    found = shutil.which("haproxy", path=path)
    if found is None:
        raise RelayError(
            "haproxy was not found on PATH nor in /usr/sbin",
            which="haproxy",
            hint="Install it (Debian: apt-get install haproxy), or let the facility run S2DS",
            cause="haproxy",
        )
    return str(Path(found).absolute())


def starter() -> Sequence[str]:
    """What is run in the place of `s2ds`, before `start`."""
    return (sys.executable, str(Path(__file__).resolve()))


# --- what it is told


class Address(NamedTuple):
    """A numeric address and a port; nothing else gets into a configuration or a command."""

    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @classmethod
    def read(cls, text: str) -> Address:
        """From `IP:PORT` or `[IPv6]:PORT`."""
        host, _, port = text.rpartition(":")
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65_535:
            raise ValueError(f"{text!r} is not IP:PORT")
        return cls(_ip(host.removeprefix("[").removesuffix("]")), int(port))

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if self.ip.version == 6 else f"{self.ip}:{self.port}"


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    # what follows a % is free text, and an address for ipaddress
    if "%" in text:
        raise ValueError(f"{text!r} has a zone")
    return ipaddress.ip_address(text)


def _networks(texts: Sequence[str]) -> list[str]:
    for one in texts:
        _ip(one.partition("/")[0])
    return [str(ipaddress.ip_network(one, strict=False)) for one in texts]


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LONGEST_S:
        raise ValueError(f"{value!r} is no number of seconds")
    return float(value)


class Failed(Exception):
    """It does not start; the words are for who asked."""

    def __init__(self, code: str, message: str, *, errno_name: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.errno_name = errno_name


class _Wish:
    """The configuration, checked: every value has its type from here on."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        unknown = sorted(document.keys() - _FIELDS)
        if document.get("protocol") != PROTOCOL or unknown:
            raise ValueError(f"unknown fields: {', '.join(unknown)}" if unknown else "another protocol")
        if document["mode"] != "none":
            raise ValueError(f"mode {document['mode']!r}: HAProxy has no keys, only mode 'none' is possible")
        if not re.fullmatch("[0-9a-f]{32}", document["relay_id"]):
            raise ValueError("relay_id: not 32 hex digits")
        if document["role"] not in ("PROD", "CONS"):
            raise ValueError("role: neither PROD nor CONS")
        listen = document["listen"]
        self.relay_id = str(document["relay_id"])
        self.role = str(document["role"])
        self.bind = [_ip(one) for one in listen.get("addresses") or [listen["address"]]]
        self.ports = int(listen["first_port"]), int(listen["last_port"])
        self.indices = [int(one) for one in listen["indices"]]
        source = document.get("onward_source")
        self.onward_source = None if source is None else _ip(source)
        self.ends_closed = document.get("until", "closed") == "closed"
        self.max_connections = int(document["max_connections"])
        self.lease_s = _seconds(document["lease_s"])
        self.lifetime_s = _seconds(document["lifetime_s"])
        self.hello_timeout_s = _seconds(document["hello_timeout_s"])
        self.linger_s = _seconds(document.get("linger_s", 0))
        self.known = _Known()
        self.known.change(document, self.role)


class _Known:
    """What may change: where it leads, and who may come."""

    def __init__(self) -> None:
        self.onwards: list[Address] = []
        self.sources: list[str] = []
        self.peers: list[str] | None = None  # their networks

    @property
    def admitted(self) -> list[str]:
        return list(dict.fromkeys([*self.sources, *(self.peers or ())]))

    def change(self, changes: Mapping[str, Any], role: str) -> None:
        """Take over what is given, all of it or nothing."""
        onwards, sources, peers = self.onwards, self.sources, self.peers
        if "sources" in changes:
            sources = _networks(changes["sources"])
        if role == "PROD":
            if "targets" in changes:
                onwards = [Address.read(one) for one in changes["targets"]]
            if "peers" in changes:
                peers = []
                for one in changes["peers"]:
                    if not one.get("source_addresses"):
                        raise ValueError(
                            "peers: source_addresses is needed, HAProxy has nothing else to know one by"
                        )
                    peers += _networks(one["source_addresses"])
        elif changes.get("targets"):
            raise ValueError("targets: only PROD has them")
        elif "peers" in changes:
            listeners = [one for peer in changes["peers"] for one in peer["listeners"]]
            ordered = sorted(listeners, key=lambda one: int(one["index"]))
            onwards = [Address.read(one["address"]) for one in ordered]
        self.onwards, self.sources, self.peers = onwards, sources, peers


# --- listening


def _bind(wish: _Wish) -> dict[int, list[socket.socket]]:
    """Sockets that listen, of each index one for each address, all of an index at the same port."""
    first, last = wish.ports
    ports = list(range(first, last + 1)) if first else [0] * 16
    random.shuffle(ports)
    bound: dict[int, list[socket.socket]] = {}
    why: OSError | None = None
    try:
        for index in wish.indices:
            while index not in bound:
                if not ports:
                    raise Failed(
                        "ports-exhausted",
                        f"no port of {first} to {last} can be had: {why.strerror if why else 'too few'}",
                        errno_name=_name(why),
                    )
                try:
                    bound[index] = _listen(wish, ports.pop())
                except OSError as taken:
                    if taken.errno not in (errno.EADDRINUSE, errno.EACCES):
                        raise Failed(
                            "bind",
                            f"{', '.join(map(str, wish.bind))}: {taken.strerror}",
                            errno_name=_name(taken),
                        ) from None
                    why = taken
            if not first:
                ports = [0] * 16
    except BaseException:
        for sockets in bound.values():
            for one in sockets:
                one.close()
        raise
    return bound


def _listen(wish: _Wish, port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        for ip in wish.bind:
            one = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET)
            sockets.append(one)
            if ip.version == 6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((str(ip), port))
            one.listen(1024)  # not before this is the port ours
            port = one.getsockname()[1]
    except BaseException:
        for one in sockets:
            one.close()
        raise
    return sockets


def _name(wrong: OSError | None) -> str | None:
    return errno.errorcode.get(wrong.errno or 0) if wrong else None


# --- HAProxy


class HAProxy:
    """The process, and the other end of its command line.

    Args:
        wish: What it is to do.
        sockets: What it listens at, by index.

    Raises:
        Failed: When it does not start.
    """

    def __init__(self, wish: _Wish, sockets: Mapping[int, Sequence[socket.socket]]) -> None:
        program = find_haproxy()
        self._indices = list(wish.indices)
        self._commands, theirs = socket.socketpair()
        inherited = [one.fileno() for some in sockets.values() for one in some]
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        parent = os.getpid()

        def confine() -> None:
            # in the child: whatever ends the one who keeps its lease, ends it too
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        with (
            theirs,
            os.fdopen(os.memfd_create("haproxy.cfg"), "w+b") as given,
            os.fdopen(os.memfd_create("words"), "w+b") as words,
        ):
            given.write(_rendered(wish, sockets, theirs.fileno()).encode("ascii"))
            given.seek(0)
            self.process = subprocess.Popen(
                [program, "-db", "-f", "/dev/stdin"],
                stdin=given,
                stdout=subprocess.DEVNULL,
                stderr=words,
                pass_fds=[*inherited, theirs.fileno()],
                preexec_fn=confine,  # noqa: PLW1509 - this process has one thread
            )
            try:
                self._await_answer(words.fileno())
            except BaseException:
                self.kill()
                raise

    def _await_answer(self, words: int) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            if self.process.poll() is None and self.ask("show version"):
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = os.pread(words, 65_536, 0).decode(errors="replace").splitlines()
                alerts = [one.partition(":")[2].strip() for one in said if one.startswith("[ALERT]")]
                raise Failed("io", f"haproxy did not start: {'; '.join(alerts)[:500] or 'it said nothing'}")
            time.sleep(0.01)

    def ask(self, command: str) -> str:
        """What it answers; nothing when it does not."""
        ours, theirs = socket.socketpair()
        said = b""
        with ours, contextlib.suppress(OSError):
            with theirs:
                socket.send_fds(self._commands, [b"\0"], [theirs.fileno()])
            deadline = time.monotonic() + _ASK_TIMEOUT_S
            ours.settimeout(_ASK_TIMEOUT_S)
            ours.sendall(command.encode("ascii") + b"\n")
            while time.monotonic() < deadline and (some := ours.recv(65_536)):
                said += some
        return said.decode("ascii", errors="replace")

    def lead(self, onwards: Sequence[Address]) -> None:
        """From now on listener i leads to the (i mod m)-th; open connections stay where they are."""
        commands = []
        for index in self._indices:
            if onwards:
                to = onwards[index % len(onwards)]
                commands.append(f"set server b{index}/s addr {to.ip} port {to.port}")
            commands.append(f"set server b{index}/s state {'ready' if onwards else 'maint'}")
        self._tell(commands)

    def admit(self, networks: Sequence[str]) -> None:
        """From now on these may connect, and nobody else: the list changes as a whole."""
        created = re.search(r"New version created: ([0-9]+)", self.ask("prepare acl /dev/null"))
        if created is None:
            raise OSError(errno.EIO, "haproxy does not answer")
        version = created[1]
        self._tell([f"add acl @{version} /dev/null {one}" for one in networks])
        self._tell([f"commit acl @{version} /dev/null"])

    def close_all(self) -> None:
        """Take no more connections, and close those that are open, so that their bytes are counted."""
        self._tell([f"disable frontend f{one}; shutdown sessions server b{one}/s" for one in self._indices])

    def _tell(self, commands: Sequence[str]) -> None:
        for first in range(0, len(commands), _AT_ONCE):
            if not self.ask("; ".join(commands[first : first + _AT_ONCE])):
                raise OSError(errno.EIO, "haproxy does not answer")

    def counts(self) -> dict[int, _Counts] | None:
        """The counters of each listener; None when it does not answer."""
        rows = [line.split(",") for line in self.ask("show stat").splitlines() if line]
        if len(rows) < 2:
            return None
        names = rows[0]
        counts: dict[int, _Counts] = {}
        for row in rows[1:]:
            found = dict(zip(names, row, strict=False))
            number = {name: int(text) for name, text in found.items() if text.isdigit()}
            name = found["# pxname"]
            if name[:1] == "f" and name[1:].isdigit() and found["svname"] == "FRONTEND":
                counts[int(name[1:])] = _Counts(
                    active=number["scur"],
                    turned_away=number["dcon"],
                    accepted=number["stot"],
                    incoming=number["bin"],
                    outgoing=number["bout"],
                )
            elif name[:1] == "b" and name[1:].isdigit() and found["svname"] == "BACKEND":
                index = int(name[1:])
                aborted = number["cli_abrt"] + number["srv_abrt"] + number["econ"]
                counts[index] = counts[index]._replace(aborted=aborted)
        return counts if counts.keys() >= set(self._indices) else None

    def kill(self) -> float:
        """End it for certain; answers the processor time that it took, seconds."""
        self.process.kill()
        self.process.wait()
        self._commands.close()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return round(used.ru_utime + used.ru_stime, 3)


class _Counts(NamedTuple):
    active: int = 0
    turned_away: int = 0
    accepted: int = 0
    incoming: int = 0
    outgoing: int = 0
    aborted: int = 0


def _rendered(wish: _Wish, sockets: Mapping[int, Sequence[socket.socket]], commands: int) -> str:
    """The configuration, from numbers and addresses only.

    No `timeout client` and `timeout server`: a stream may be silent for as long as its applications like. Whoever has
    gone without a word is noticed by keepalive.
    """
    most = len(wish.indices) * (wish.max_connections + _SPARE)
    threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 2))
    lines = [
        "global",
        f"  maxconn {most}",
        f"  maxpipes {most}",
        f"  nbthread {threads}",
        f"  tune.pipesize {_PIPE_BYTES}",
        f"  stats socket sockpair@{commands} level admin",
        "defaults",
        "  mode tcp",
        "  option splice-request",
        "  option splice-response",
        "  option contstats",
        "  option clitcpka",
        "  clitcpka-idle 20s",
        "  clitcpka-intvl 20s",
        "  clitcpka-cnt 3",
        "  option srvtcpka",
        "  srvtcpka-idle 20s",
        "  srvtcpka-intvl 20s",
        "  srvtcpka-cnt 3",
        f"  timeout connect {_CONNECT_TIMEOUT_S}s",
        "  retries 0",
    ]
    source = "" if wish.onward_source is None else f" source {wish.onward_source}"
    for index in wish.indices:
        lines += [
            f"frontend f{index}",
            *(f"  bind fd@{one.fileno()}" for one in sockets[index]),
            f"  maxconn {wish.max_connections + _SPARE}",
            # the list has a name and no content: what it holds, it is told
            "  tcp-request connection reject unless { src -f /dev/null }",
            f"  tcp-request connection reject if {{ fe_conn gt {wish.max_connections} }}",
            f"  default_backend b{index}",
            f"backend b{index}",
            f"  server s 127.0.0.1:1 disabled{source}",
        ]
    return "\n".join(lines) + "\n"


# --- the relay


class _Relay:
    """One relay from `ready` to its end record: what `s2ds` would say of itself, said of a HAProxy."""

    def __init__(self, wish: _Wish, log: int) -> None:
        self.wish = wish
        self._log = log
        sockets = _bind(wish)
        try:
            self._listeners = [
                {"index": index, "address": str(Address(ipaddress.ip_address(name[0]), name[1]))}
                for index in wish.indices
                for name in (one.getsockname() for one in sockets[index])
            ]
            self.haproxy = HAProxy(wish, sockets)
        finally:
            for some in sockets.values():
                for one in some:
                    one.close()
        try:
            self.haproxy.lead(wish.known.onwards)
            self.haproxy.admit(wish.known.admitted)
        except BaseException:
            self.haproxy.kill()
            raise
        self._public_key = secrets.token_urlsafe(32)  # a name only: there is no private part
        self._began = now = time.monotonic()
        self._lease_ends = now + wish.lease_s
        self._lease_s = wish.lease_s
        self._idle_since = now
        self._drain_ends: float | None = None
        self._drain_reason = "released"
        self._counts = {index: _Counts() for index in wish.indices}
        self._bytes_at: list[tuple[float, int, int]] = [(now, 0, 0)]
        self._said = ""
        self.record: dict[str, Any] | None = None

    def ready(self) -> dict[str, Any]:
        """The event that says that all listens."""
        return self._say(
            "ready",
            relay_id=self.wish.relay_id,
            pid=os.getpid(),
            public_key=self._public_key,
            listeners=self._listeners,
        )

    def _say(self, event: str, **fields: Any) -> dict[str, Any]:
        at = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        document = {"protocol": PROTOCOL, "event": event, "at": at, **fields}
        with contextlib.suppress(OSError):  # a full disk does not end a stream
            os.write(self._log, json.dumps(document).encode() + b"\n")
        return document

    # --- time goes by

    def look(self) -> None:
        """See what has happened; end it when it is over."""
        now = time.monotonic()
        ended = self.haproxy.process.poll()
        if ended is not None:
            how = signal.Signals(-ended).name if ended < 0 else f"exit {ended}"
            self.end("relay_lost", message=f"haproxy was ended by {how}")
            return
        self._count(now)
        active = sum(one.active for one in self._counts.values())
        if active:
            self._idle_since = now
        state = self.state
        if state != self._said:
            self._said = state
            self._say("state", state=state, reason=None)
        if now >= self._began + self.wish.lifetime_s:
            self.end("lifetime_reached")
        elif now >= self._lease_ends:
            self.end("lease_expired")
        elif self._drain_ends is not None and (not active or now >= self._drain_ends):
            self.end(self._drain_reason)
        elif self._is_waiting and now >= self._began + self.wish.hello_timeout_s:
            self.end(
                "hello_timeout", message="it was not told in time where to connect to, and whom to admit"
            )
        elif (
            self.wish.ends_closed
            and self._bytes != (0, 0)
            and now >= self._idle_since + self.wish.linger_s
            and not active
        ):
            self.end("finished")

    def _count(self, now: float) -> bool:
        """Read the counters; whether they could be had."""
        counts = self.haproxy.counts()
        if counts is None:
            return False
        before, seen = self._bytes, self._counts
        self._counts = counts
        if counts != seen:
            self._idle_since = now
        if self._bytes != before:
            self._lease_ends = max(self._lease_ends, now + self._lease_s)
        self._bytes_at.append((now, *self._bytes))
        while len(self._bytes_at) > 2 and self._bytes_at[1][0] < now - _RATE_OVER_S:
            del self._bytes_at[0]
        return True

    @property
    def _bytes(self) -> tuple[int, int]:
        """To the consumer, and to the producer. At either side the consumer's is the side that connects."""
        counts = self._counts.values()
        return sum(one.outgoing for one in counts), sum(one.incoming for one in counts)

    @property
    def _is_waiting(self) -> bool:
        known = self.wish.known
        return not known.onwards or (self.wish.role == "PROD" and not known.peers)

    @property
    def state(self) -> str:
        """As `s2ds` names it."""
        if self._drain_ends is not None:
            return "DRAINING"
        if not self.wish.known.onwards:
            return "WAITING_HELLO"
        if self._is_waiting:
            return "LISTENING"
        return "STREAMING" if self._bytes != (0, 0) or self._connections()["active"] else "READY"

    def end(self, reason: str, *, message: str | None = None) -> None:
        """End HAProxy, and write the end record."""
        if self.record is not None:
            return
        cut = False
        if self.haproxy.process.poll() is None and self._count(time.monotonic()):
            cut = any(one.active for one in self._counts.values())
            with contextlib.suppress(OSError):
                self.haproxy.close_all()
            until = time.monotonic() + (_CLOSING_S if cut else 0)
            self._count(time.monotonic())
            while time.monotonic() < until and any(one.active for one in self._counts.values()):
                time.sleep(0.01)
                self._count(time.monotonic())
        cpu_s = self.haproxy.kill()
        kept_well = ("finished", "released", "lease_expired", "lifetime_reached", "admin")
        self.record = self._say(
            "end",
            relay_id=self.wish.relay_id,
            role=self.wish.role,
            mode="none",
            pid=os.getpid(),
            state="ENDED" if reason in kept_well else "FAILED",
            reason=reason,
            message=message,
            bytes=self._sums(),
            connections={**self._connections(), "active": 0},
            duration_s=round(time.monotonic() - self._began, 3),
            cut=cut,
            cpu_s=cpu_s,
            suppressed_events=0,
        )

    # --- what is asked

    def drain(self, deadline_s: float, *, reason: str) -> None:
        """Take no more connections; end when those that are open have closed."""
        if self._drain_ends is None:
            self._drain_ends = time.monotonic() + deadline_s
            self._drain_reason = reason
            self.haproxy.admit([])
        else:
            self._drain_ends = min(self._drain_ends, time.monotonic() + deadline_s)

    def answer(self, line: bytes) -> dict[str, Any]:
        """The answer to a request at the control socket."""
        try:
            request = json.loads(line)
            if request.get("protocol") != PROTOCOL:
                return _refusal("protocol", f"protocol {request.get('protocol')!r} was asked, not {PROTOCOL}")
            self._obey(request)
        except _MISTAKES as wrong:
            return _refusal("bad-request", str(wrong) or type(wrong).__name__)
        except OSError as wrong:
            return _refusal("io", str(wrong.strerror))
        self.look()
        return self.record or self.status()

    def _obey(self, request: Mapping[str, Any]) -> None:
        verb = request["verb"]
        if verb == "update":
            changes = request["changes"]
            unknown = sorted(changes.keys() - _CHANGES)
            if unknown:
                raise ValueError(f"{', '.join(unknown)}: HAProxy cannot change that")
            known = self.wish.known
            known.change(changes, self.wish.role)
            if "targets" in changes or (self.wish.role == "CONS" and "peers" in changes):
                self.haproxy.lead(known.onwards)
            if self._drain_ends is None:
                self.haproxy.admit(known.admitted)
            if "lease_s" in changes:
                self._renew(_seconds(changes["lease_s"]))
        elif verb == "renew":
            self._renew(_seconds(request["lease_s"]))
        elif verb == "drain":
            self.drain(_seconds(request["deadline_s"]), reason="released")
        elif verb == "stop":
            self.end("admin" if request["reason"] == "admin" else "released")
        elif verb != "status":
            raise ValueError(f"there is no verb {verb!r}")

    def _renew(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._lease_ends = time.monotonic() + lease_s

    def status(self) -> dict[str, Any]:
        """As `s2ds` says it; what HAProxy does not tell is left out."""
        now = time.monotonic()
        began, *bytes_then = self._bytes_at[0]
        passed_s = max(now - began, 1e-3)
        rates = [8 * (ours - theirs) / passed_s for ours, theirs in zip(self._bytes, bytes_then, strict=True)]
        hello_s = self._began + self.wish.hello_timeout_s - now
        return {
            "protocol": PROTOCOL,
            "relay_id": self.wish.relay_id,
            "role": self.wish.role,
            "mode": "none",
            "pid": os.getpid(),
            "version": "haproxy",
            "state": self.state,
            "reason": None,
            "message": UNPROVEN,
            "public_key": self._public_key,
            "listeners": [
                {
                    **one,
                    "active": self._counts[int(str(one["index"]))].active,
                    "accepted": self._counts[int(str(one["index"]))].accepted,
                    "refused": self._counts[int(str(one["index"]))].turned_away,
                }
                for one in self._listeners
            ],
            "targets": [str(one) for one in self.wish.known.onwards] if self.wish.role == "PROD" else [],
            "sources": self.wish.known.sources,
            "proof": None,
            "last_probe": None,
            "uptime_s": round(now - self._began, 3),
            "lease_remaining_s": round(max(0.0, self._lease_ends - now), 3),
            "lifetime_remaining_s": round(max(0.0, self._began + self.wish.lifetime_s - now), 3),
            "hello_remaining_s": round(max(0.0, hello_s), 3) if self._is_waiting else None,
            "connections": self._connections(),
            "bytes": self._sums(),
            "bits_per_s": {"to_consumer": rates[0], "to_producer": rates[1]},
        }

    def _sums(self) -> dict[str, int]:
        return dict(zip(("to_consumer", "to_producer"), self._bytes, strict=True))

    def _connections(self) -> dict[str, int]:
        counts = self._counts.values()
        return {
            "active": sum(one.active for one in counts),
            "total": sum(one.accepted for one in counts),
            "refused": sum(one.turned_away for one in counts),
            "aborted": sum(one.aborted for one in counts),
            "kept": 0,
        }


def _refusal(code: str, message: str) -> dict[str, Any]:
    return {"protocol": PROTOCOL, "error": {"code": code, "message": message}}


# --- the process


def _serve(relay: _Relay, control: socket.socket) -> None:
    """Answer at the control socket and look after the relay, until there is an end record."""
    signals: list[int] = []
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda number, _: signals.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with selectors.DefaultSelector() as waiting:
        waiting.register(control, selectors.EVENT_READ)
        while relay.record is None:
            for _ in waiting.select(_TICK_S):
                with contextlib.suppress(OSError):
                    _attend(relay, control)
            for _ in range(len(signals)):
                signals.pop()
                if relay.state == "DRAINING":
                    relay.end("admin", message="ended by a second signal")
                else:
                    relay.drain(30, reason="admin")
            if relay.record is None:
                relay.look()


def _attend(relay: _Relay, control: socket.socket) -> None:
    client, _ = control.accept()
    with client:
        client.settimeout(_CLIENT_TIMEOUT_S)
        theirs = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if theirs not in (0, os.geteuid()):
            return
        line = b""
        deadline = time.monotonic() + _CLIENT_TIMEOUT_S
        while not line.endswith(b"\n"):
            some = client.recv(65_536)
            if not some or len(line) > _LONGEST_REQUEST_BYTES or time.monotonic() > deadline:
                return
            line += some
        client.sendall(json.dumps(relay.answer(line)).encode() + b"\n")


def _start(configuration: bytes, say: Callable[[dict[str, Any]], None]) -> None:
    """The life of a relay in this process, in the runtime directory. `say` is heard once: ready, or failed."""
    with contextlib.ExitStack() as closing:
        try:
            try:
                wish = _Wish(json.loads(configuration))
            except _MISTAKES as wrong:
                raise Failed("bad-config", f"the configuration is wrong: {wrong}") from None
            files = Path(f"{wish.relay_id}.log"), Path(f"{wish.relay_id}.sock")
            os.umask(0o177)
            log = os.open(files[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            # until it is ready, nothing may stay
            failing = closing.enter_context(contextlib.ExitStack())
            failing.callback(files[0].unlink)
            closing.callback(os.close, log)
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            relay = _Relay(wish, log)
            closing.callback(relay.haproxy.kill)
            control = closing.enter_context(socket.socket(socket.AF_UNIX))
            control.bind(str(files[1]))
            closing.callback(files[1].unlink)
            control.listen(64)
        except RelayError as missing:
            raise Failed("io", f"{missing.message}. {missing.hint}") from None
        except OSError as wrong:
            raise Failed("io", f"{wrong.strerror}", errno_name=_name(wrong)) from None
        say(relay.ready())
        failing.pop_all()
        _serve(relay, control)


def _enter(directory: Path) -> None:
    """Make the runtime directory 0700, refuse one that others can look into, and change into it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(0o700)
    found = directory.lstat()
    if (
        not directory.is_dir()
        or directory.is_symlink()
        or found.st_uid != os.geteuid()
        or found.st_mode & 0o077
    ):
        raise Failed("io", f"runtime directory {directory}: not a directory of this user alone; chmod 700 it")
    os.chdir(directory)


def main(arguments: Sequence[str]) -> int:
    """`start --runtime-dir DIR`: prints `ready` or `failed`, and leaves the relay behind."""
    if len(arguments) != 3 or arguments[0] != "start" or arguments[1] != "--runtime-dir":
        sys.stderr.write("usage: haproxy.py start --runtime-dir DIR, with a configuration on stdin\n")
        return 64
    configuration = sys.stdin.buffer.read(_LONGEST_REQUEST_BYTES)
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as words:
            said = words.readline() or json.dumps(
                _failed(Failed("io", "the relay ended before it was ready"))
            )
        sys.stdout.write(said.rstrip() + "\n")
        return 0 if json.loads(said)["event"] == "ready" else 1
    # from here on the child, which never returns
    status = 1
    try:
        os.close(reading)
        os.setsid()
        os.umask(0o077)
        null = os.open(os.devnull, os.O_RDWR)
        for one in range(3):
            os.dup2(null, one)

        def say(document: dict[str, Any]) -> None:
            with contextlib.suppress(OSError):
                os.write(writing, json.dumps(document).encode() + b"\n")
            os.close(writing)

        try:
            _enter(Path(arguments[2]))
            _start(configuration, say)
            status = 0
        except Failed as wrong:
            say(_failed(wrong))
    finally:
        os._exit(status)


def _failed(wrong: Failed) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "event": "failed",
        "code": wrong.code,
        "errno": wrong.errno_name,
        "message": str(wrong),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
