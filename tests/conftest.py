"""Shared by the tests. Fixtures of the control plane first; each says what it leaves behind: nothing."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import ipaddress
import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from scistream_flows.config import load_facility
from scistream_flows.models import split_address
from scistream_flows.s2cs import S2CS

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Whoever runs the tests in the background may have set this, and programs started here would inherit it:
    # the tests of Ctrl-C want what a terminal gives.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def state_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory that holds the state of every facility of this test; after it, no relay of theirs may run."""
    base = tmp_path / "state"
    base.mkdir()
    for variable in [name for name in os.environ if name.startswith("SCISTREAM_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("SCISTREAM_STATE_DIR", str(base))
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path / "no-configuration"))
    yield base
    left = relay_pids(base, patience_s=5)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"{len(left)} relays were left running"


@pytest.fixture
def own_temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where programs of this test put what they need for a moment; its name is short enough for sockets.

    A worker pool of Parsl that is killed with its block leaves the socket of its manager behind: here it goes with all.
    """
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        deadline = time.monotonic() + 5  # a worker may be about to end
        while sockets := [
            one.laddr for one in psutil.net_connections("unix") if str(one.laddr).startswith(folder)
        ]:
            assert time.monotonic() < deadline, f"still open: {sockets}"
            time.sleep(0.05)


@pytest.fixture
def relays_below() -> Callable[..., list[int]]:
    """A function from a state directory to the pids of the relays that run for it."""
    return relay_pids


def relay_pids(state: Path, *, patience_s: float = 0) -> list[int]:
    """The pids of the relays whose runtime directory is below `state`; waits for there to be none.

    They are `s2ds`, or HAProxy and the one who keeps it.
    """
    deadline = time.monotonic() + patience_s
    while True:
        found = [int(one.name) for one in Path("/proc").glob("[0-9]*") if _serves(one, state)]
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.02)


def _serves(process: Path, state: Path) -> bool:
    """Whether a process is a relay, which lives in its runtime directory, or starts one."""
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
        if not any(one.endswith((b"s2ds", b"/haproxy", b"/haproxy.py")) for one in arguments[:2]):
            return False
        below = [
            os.fsencode(state) + b"/" in one
            for one in (*arguments, os.fsencode((process / "cwd").readlink()))
        ]
    except OSError:  # it is gone, or a zombie
        return False
    return any(below)


@pytest.fixture
def facility(state_base: Path) -> Iterator[Callable[..., S2CS]]:  # noqa: ARG001 - where the state goes
    """A function that makes the service of a development facility; with the same name, one more on the same state."""
    services: list[S2CS] = []

    def make(name: str = "aps", **environment: str) -> S2CS:
        services.append(S2CS(load_facility(name, environment={**os.environ, **environment})))
        return services[-1]

    yield make
    for service in services:
        service.close()


@pytest.fixture
def site(state_base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that writes the facility.toml of a facility, from its gateways and its policy.

    Each gateway is a mapping of keys; by default it is this machine, on the loopback address that it names. The policy
    allows everything on loopback.
    """
    folder = state_base.parent / "configuration"
    folder.mkdir()
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(folder))
    loopback = ["127.0.0.0/8", "::1/128"]

    def write(name: str, *gateways: Mapping[str, Any], **policy: Any) -> None:
        lines = ["[facility]", f'name = "{name}"']
        for number, gateway in enumerate(gateways, start=1):
            address = f"127.0.0.{number}"
            table = {"name": f"gw{number}", "wan_bind": address, "lan_bind": address, **gateway}
            lines += ["[[gateway]]", *_keys(table)]
        policy = {
            "users": ["all_authenticated_users"],
            "targets": loopback,
            "peers": loopback,
            "consumers": loopback,
            "modes": ["tls", "auth", "none"],
        } | policy
        quotas = policy.pop("quota", [])
        lines += ["[policy]", *_keys(policy)]
        for quota in quotas:
            lines += ["[[policy.quota]]", *_keys(quota)]
        (folder / f"{name}.toml").write_text("\n".join(lines) + "\n")

    return write


def _keys(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in table.items()]


class Application:
    """A listening application: sends `payload` to each connection, and hashes what it gets until the end of input."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.received: list[str] = []
        self.accepted = 0
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = "{}:{}".format(*self._server.getsockname())
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Stop listening, and wait for the connections."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(10)
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self.accepted += 1
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30)
            self.received.append(exchange(connection, self.payload))


def exchange(connection: socket.socket, payload: bytes) -> str:
    """Send `payload` and the end of output while receiving until the end of input; the hash of what came."""
    connection.settimeout(30)

    def send() -> None:
        with contextlib.suppress(OSError):
            connection.sendall(payload)
            connection.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    digest = hashlib.sha256()
    try:
        while block := connection.recv(1 << 16):
            digest.update(block)
    finally:
        sender.join(30)
    return digest.hexdigest()


def connect_and_exchange(address: str, payload: bytes) -> str:
    """Connect to `ip:port` and exchange payloads; the hash of what came."""
    with socket.create_connection(split_address(address), timeout=30) as connection:
        return exchange(connection, payload)


@pytest.fixture
def talk() -> Callable[[str, bytes], str]:
    """A function that connects to an address, sends a payload, and answers the hash of what it got."""
    return connect_and_exchange


@pytest.fixture
def application() -> Iterator[Application]:
    """A listening application on loopback with 3 MB to send, none of it alike."""
    application = Application(random.Random(1).randbytes(3_000_000))  # noqa: S311 - no secret
    yield application
    application.close()


@pytest.fixture
def free_address() -> str:
    """An address of loopback where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return "{}:{}".format(*server.getsockname())


@pytest.fixture
def within() -> Callable[..., None]:
    """A function that waits until a condition holds, and fails past its deadline."""

    def wait(condition: Callable[[], object], *, timeout_s: float = 5, what: str = "") -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of a certificate for 127.0.0.1, which has signed itself, and of its key."""
    return certificate_for_loopback(tmp_path_factory.mktemp("certificate"))


def certificate_for_loopback(folder: Path) -> tuple[Path, Path]:
    """Write these files into a folder."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "facility")])
    now = dt.datetime.now(dt.timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    chain, private = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return chain, private
