"""A private gateway: a runtime directory of its own with real relays, and proof that nothing is left of them."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
MODES = ("none", "auth", "tls")
PROVEN_MODES = ("auth", "tls")
# What must happen, happens at once; this is for a machine that is busy with something else.
DEADLINE_S = 20.0

T = TypeVar("T")
Document = dict[str, Any]


def find_binary() -> Path:
    """The relay as built in this checkout, else as installed beside this Python."""
    places = [
        Path(os.environ.get("S2DS") or "/nonexistent"),
        ROOT / "relay" / "target" / "release" / "s2ds",
        Path(sysconfig.get_path("scripts")) / "s2ds",
    ]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"s2ds is not built; looked at {', '.join(map(str, places))}")
    return found


def eventually(what: Callable[[], T], within_s: float = DEADLINE_S, every_s: float = 0.01) -> T:
    """The first true answer of `what`. An AssertionError of `what` counts as "not yet"."""
    end = time.monotonic() + within_s
    while True:
        problem: AssertionError | None = None
        try:
            answer = what()
        except AssertionError as error:
            problem = error
        else:
            if answer:
                return answer
        if time.monotonic() > end:
            raise AssertionError(f"not within {within_s} s; the last answer: {problem or answer!r}")
        time.sleep(every_s)


def split(address: str) -> tuple[str, int]:
    """`IP:PORT` or `[IPv6]:PORT`, as the relay writes it."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def join(address: tuple[Any, ...]) -> str:
    """The address of a socket as the relay reads it."""
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie that init has yet to reap.

    One whose first thread is dead may have others.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    state, threads = fields[0], int(fields[17])
    return state not in "ZX" or threads > 1


def listening() -> set[tuple[str, int]]:
    """Every (IP, port) on which somebody listens on this machine."""
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        table = Path(f"/proc/net/{name}")
        for row in table.read_text().splitlines()[1:] if table.exists() else ():
            columns = row.split()
            if columns[3] != "0A":
                continue
            number, port = columns[1].split(":")
            raw = bytes.fromhex(number)
            words = [raw[at : at + 4][::-1] for at in range(0, len(raw), 4)]
            found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


class RefusedError(Exception):
    """A verb that exited with something else than 0."""

    def __init__(self, done: "subprocess.CompletedProcess[str]") -> None:
        super().__init__(f"exit {done.returncode}: {done.stdout.strip()} {done.stderr.strip()}")
        self.exit = done.returncode
        self.stderr = done.stderr
        self.document: Document = json.loads(done.stdout) if done.stdout.strip() else {}

    @property
    def code(self) -> str:
        """The code of a client verb's refusal, or of the `failed` event."""
        error: Document = self.document.get("error", self.document)
        return str(error.get("code"))

    @property
    def message(self) -> str:
        error: Document = self.document.get("error", self.document)
        return str(error.get("message"))


@dataclass
class Relay:
    """One relay of a gateway, detached unless `process` is there."""

    gateway: "Gateway"
    config: Document
    ready: Document
    process: "subprocess.Popen[str] | None" = None

    @property
    def id(self) -> str:
        return str(self.config["relay_id"])

    @property
    def pid(self) -> int:
        return int(self.ready["pid"])

    @property
    def public_key(self) -> str:
        return str(self.ready["public_key"])

    def address(self, index: int = 0) -> tuple[str, int]:
        """Where listener `index` listens."""
        return split(
            next(str(row["address"]) for row in self.ready["listeners"] if int(row["index"]) == index)
        )

    def status(self) -> Document:
        return self.gateway.verb("status", self.id)

    def update(self, **changes: object) -> Document:
        return self.gateway.verb("update", self.id, document=changes)

    def renew(self, lease_s: float) -> Document:
        return self.gateway.verb("renew", self.id, "--lease-s", str(lease_s))

    def drain(self, deadline_s: float = 30) -> Document:
        return self.gateway.verb("drain", self.id, "--deadline-s", str(deadline_s))

    def stop(self, *arguments: str) -> Document:
        return self.gateway.verb("stop", self.id, *arguments)

    def forget(self) -> Document:
        return self.gateway.verb("forget", self.id)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; returns after SIGKILL only when the process is gone."""
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self.wait_gone()

    def wait_gone(self) -> None:
        """Returns when the process is not there any more."""
        if self.process is not None:
            self.process.wait(DEADLINE_S)
        eventually(lambda: not is_running(self.pid))

    def wait_end(self, within_s: float = DEADLINE_S) -> Document:
        """The end record of a relay that ends by itself."""
        eventually(lambda: not is_running(self.pid), within_s)
        return self.status()

    def wait_close(self) -> Document:
        """The one `close` event of a relay that has carried one connection."""
        (close,) = eventually(lambda: self.events("close"))
        return close

    def events(self, *names: str) -> list[Document]:
        """The event log, whole or only the events of these names."""
        lines = (self.gateway.directory / f"{self.id}.log").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        return [event for event in events if not names or event["event"] in names]

    @property
    def socket_path(self) -> Path:
        return self.gateway.directory / f"{self.id}.sock"

    @property
    def log_path(self) -> Path:
        return self.gateway.directory / f"{self.id}.log"

    def ask(self, request: bytes) -> bytes:
        """Speaks to the control socket without the client; the raw answer, or nothing."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(DEADLINE_S)
            control.connect(str(self.socket_path))
            try:
                control.sendall(request)
                control.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has heard enough; its answer stands in our buffer
            answer = b""
            try:
                while piece := control.recv(65536):
                    answer += piece
            except ConnectionResetError:
                pass
            return answer


@dataclass
class Pair:
    """A PROD and a CONS relay that know each other."""

    prod: Relay
    cons: Relay

    def __iter__(self) -> Iterator[Relay]:
        return iter((self.prod, self.cons))

    def wait_ready(self) -> None:
        eventually(self.is_ready)

    def is_ready(self) -> bool:
        for relay in self:
            state = relay.status()["state"]
            assert state == "READY", f"{relay.config['role']} is {state}: {relay.status()['last_probe']}"
        return True

    def wait_closed(self, count: int) -> None:
        """Returns when `count` data connections have been there and none is open, on both sides."""
        eventually(lambda: all(self._has_closed(relay, count) for relay in self))

    def wait_idle(self) -> None:
        """Returns when no data connection is open, on both sides."""
        eventually(lambda: all(relay.status()["connections"]["active"] == 0 for relay in self))

    @staticmethod
    def _has_closed(relay: Relay, count: int) -> bool:
        connections = relay.status()["connections"]
        assert connections["total"] == count, connections
        assert connections["active"] == 0, connections
        return True


@dataclass
class Gateway:
    """The relays of one test."""

    binary: Path
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="s2ds-")))
    user: int | None = None
    relays: list[Relay] = field(default_factory=list)

    def call(
        self, *arguments: str, text: str | None = None, directory: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Runs the binary to its end."""
        return subprocess.run(
            [str(self.binary), *arguments, "--runtime-dir", str(directory or self.directory)],
            input=text or "",
            capture_output=True,
            text=True,
            timeout=60,
            user=self.user,
            group=self.user,
            extra_groups=None if self.user is None else [],
        )

    def verb(self, *arguments: str, document: object = None) -> Document:
        """One document from one verb; anything but exit 0 is a RefusedError."""
        done = self.call(*arguments, text=None if document is None else json.dumps(document))
        if done.returncode != 0:
            raise RefusedError(done)
        answer: Document = json.loads(done.stdout)
        return answer

    def config(self, role: str, mode: str, **changes: object) -> Document:
        """A configuration for this machine: loopback, ports by the kernel, leases longer than any test."""
        listen = {"address": "127.0.0.1", "first_port": 0, "last_port": 0, "indices": [0]}
        listen.update(changes.pop("listen", {}))  # type: ignore[call-overload]
        if "addresses" in listen:
            del listen["address"]
        return {
            "protocol": 1,
            "relay_id": secrets.token_hex(16),
            "role": role,
            "mode": mode,
            "listen": listen,
            "sources": ["127.0.0.0/8"],
            "lease_s": 300,
            "lifetime_s": 3600,
            "until": "released",
            **changes,
        }

    def start(self, config: Document) -> Relay:
        """`s2ds start`: a detached relay."""
        relay = Relay(self, config, self.verb("start", document=config))
        self.relays.append(relay)
        return relay

    def run(self, config: Document) -> Relay:
        """`s2ds run`: a relay in the foreground, its events on a pipe that is read at the end."""
        process = subprocess.Popen(
            [str(self.binary), "run", "--runtime-dir", str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        assert process.stdout
        with process.stdin as stdin:
            stdin.write(json.dumps(config))
        relay = Relay(self, config, {"pid": process.pid}, process)
        self.relays.append(relay)
        relay.ready = json.loads(process.stdout.readline())
        assert relay.ready["event"] == "ready", relay.ready
        return relay

    def peer_of(self, prod: Relay, listeners: Sequence[Document] | None = None) -> Document:
        """A PROD relay as its CONS relay is told of it; of several addresses of a listener, the first."""
        return {
            "relay_id": prod.id,
            "public_key": prod.public_key,
            "listeners": list(
                {row["index"]: row for row in reversed(listeners or prod.ready["listeners"])}.values()
            ),
        }

    def pair(
        self,
        mode: str,
        targets: Sequence[tuple[Any, ...]],
        *,
        prod: Document | None = None,
        cons: Document | None = None,
        via: Callable[[tuple[str, int]], tuple[str, int]] | None = None,
        ready: bool = True,
    ) -> Pair:
        """PROD, CONS and the introduction of one to the other; `via` puts something between them on the WAN."""
        settings = {"targets": [join(target) for target in targets], **(prod or {})}
        producer = self.start(self.config("PROD", mode, **settings))
        listeners = [
            {"index": row["index"], "address": join(via(split(row["address"]))) if via else row["address"]}
            for row in producer.ready["listeners"]
        ]
        consumer = self.start(
            self.config("CONS", mode, **{"peers": [self.peer_of(producer, listeners)], **(cons or {})})
        )
        self.introduce(producer, consumer)
        pair = Pair(producer, consumer)
        if ready:
            pair.wait_ready()
        return pair

    def introduce(self, prod: Relay, cons: Relay, sources: Sequence[str] = ("127.0.0.1", "::1")) -> None:
        """PROD admits this CONS relay."""
        peer = {"public_key": cons.public_key, "source_addresses": list(sources)}
        prod.update(peers=[peer])

    def processes(self) -> list[int]:
        """Every living process that works in this directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    here = (entry / "cwd").readlink() == self.directory
                except OSError:
                    continue
                if here and is_running(int(entry.name)):
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Ends what the test has left running, and asserts that then nothing is left of any relay."""
        try:
            for relay in self.relays:
                if is_running(relay.pid):
                    done = self.call("stop", relay.id, "--reason", "admin")
                    assert done.returncode == 0, f"stop: {done.stdout} {done.stderr}"
                if relay.process is not None:
                    relay.wait_gone()
                    assert relay.process.stdout
                    relay.process.stdout.close()
                self.call("forget", relay.id)
            eventually(lambda: not self.processes(), within_s=5)
            assert [path.name for path in self.directory.iterdir()] == []
            bound = {split(row["address"]) for relay in self.relays for row in relay.ready["listeners"]}
            assert not bound & listening()
        finally:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            for relay in self.relays:
                if relay.process is not None and relay.process.stdout is not None:
                    relay.process.wait(DEADLINE_S)
                    relay.process.stdout.close()
            shutil.rmtree(self.directory)
