"""The services of both facilities, on the control host. Each reaches its gateways by SSH, and in no other way."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import paramiko
from relay.apps import Applications, receive_exactly
from relay.gateway import eventually, join, split
from sshd import Account, Server, make_key

from scistream_flows.config import load_facility
from scistream_flows.facility import LocalFacility
from scistream_flows.s2cs import S2CS
from scistream_flows.stream import Stream, open_stream

from .topology import NETWORKS, Family, Host, Leg, Network

Side: TypeAlias = Literal["a", "b"]

# Opens a stream on the state and the configuration of this environment, and does one more thing, which it is told.
OPENING = """
import json, logging, os, signal, sys, time
from scistream_flows.facility import LocalFacility
from scistream_flows.config import load_facility
from scistream_flows.s2cs import S2CS
from scistream_flows.stream import open_stream

class Kill(logging.Handler):
    def emit(self, record):
        if record.getMessage() == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)

logger = logging.getLogger("scistream_flows.s2cs")
logger.setLevel(logging.DEBUG)
logger.addHandler(Kill())
sites = [LocalFacility(S2CS(load_facility(name))) for name in ("site-a", "site-b")]
stream = open_stream(*sites, **json.loads(sys.argv[2]))
print(json.dumps(stream.listeners), flush=True)
sys.stdin.read()
"""


@dataclass
class Node:
    """A gateway: a host of the network with an sshd, and the user whom it lets in."""

    host: Host
    control: Leg
    account: Account
    server: Server

    def table(self, family: Family, **changes: Any) -> dict[str, Any]:
        """Its `[[gateway]]` in facility.toml."""
        lan = "lan-a" if self.host.name.startswith("gateway-a") else "lan-b"
        keys = {
            "name": self.host.name,
            "kind": "ssh",
            "wan_bind": self.host.address(family, "wan"),
            "lan_bind": self.host.address(family, lan),
            "port_range": "5100-5199",
            "host": self.server.address,
            "port": self.server.port,
            "user": self.account.name,
            "directory": str(self.account.directory),
        }
        return keys | changes

    def relays(self) -> list[int]:
        """The pids of its relays."""
        return self.account.relays()

    def left(self) -> list[object]:
        """What is there of any stream: processes, files, sockets."""
        sshd = f":{self.server.port}"
        return [
            *self.account.processes(),
            *self.account.left(),
            *self.account.lost(),
            *(one for one in self.host.connections() if not one.split()[1].endswith(sshd)),
        ]


@dataclass
class Services:
    """The facilities `site-a` and `site-b`: PROD is at A, CONS at B."""

    network: Network
    apps: Applications
    nodes: Mapping[str, Node]
    home: Path
    configuration: Path
    family: Family
    _facilities: list[LocalFacility] = field(default_factory=list)
    _unused: list[socket.socket] = field(default_factory=list)

    @property
    def a(self) -> Node:
        return self.node("a")

    @property
    def b(self) -> Node:
        return self.node("b")

    def node(self, side: Side) -> Node:
        """The first gateway of a facility."""
        return self.nodes[f"gateway-{side}"]

    def configure(
        self, side: Side, *, policy: Mapping[str, Any] | None = None, **changes: Mapping[str, Any]
    ) -> None:
        """Writes the file of a facility; `changes` are those of its gateways, by name (`gateway_a2`)."""
        lines = ["[facility]", f'name = "site-{side}"']
        for name, node in self.nodes.items():
            if name.startswith(f"gateway-{side}"):
                table = node.table(self.family, **changes.get(name.replace("-", "_"), {}))
                lines += ["[[gateway]]", *[f"{key} = {json.dumps(value)}" for key, value in table.items()]]
        allowed = {
            leg: NETWORKS[leg][self.family] if self.family == "IPv4" else f"[{NETWORKS[leg][self.family]}]"
            for leg in ("lan-a", "wan", "lan-b")
        }
        rules = {
            "targets": [allowed["lan-a"]],
            "peers": [allowed["wan"]],
            "consumers": [allowed["lan-b"]],
            "modes": ["tls", "auth", "none"],
            **(policy or {}),
        }
        lines += ["[policy]", *[f"{key} = {json.dumps(value)}" for key, value in rules.items()]]
        self.configuration.mkdir(exist_ok=True)
        (self.configuration / f"site-{side}.toml").write_text("\n".join(lines))

    def service(self, side: Side) -> S2CS:
        """One more service of a facility, as its file is now."""
        service = S2CS(load_facility(f"site-{side}"))
        self._facilities.append(LocalFacility(service))
        return service

    def facility(self, side: Side) -> LocalFacility:
        """The same as a client sees it."""
        self.service(side)
        return self._facilities[-1]

    def options(self, server: socket.socket, **changes: Any) -> dict[str, Any]:
        """What `open_stream` is told to bring the consumer's host to this server."""
        return {
            "targets": [join(server.getsockname())],
            "consumers": [self.network.consumer.address(self.family)],
            **changes,
        }

    def open(self, server: socket.socket, **changes: Any) -> Stream:
        """A stream between the facilities, through services of its own."""
        return open_stream(self.facility("a"), self.facility("b"), **self.options(server, **changes))

    @contextlib.contextmanager
    def opening(
        self, server: socket.socket, *, dies_at: str = "", **changes: Any
    ) -> "Iterator[subprocess.Popen[str]]":
        """The same by another process. It dies when a service of it logs `dies_at`, else ends with the block."""
        words = json.dumps(self.options(server, **changes))
        with subprocess.Popen(
            [sys.executable, "-c", OPENING, dies_at, words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def listen(self) -> socket.socket:
        """The producer's application, on its host."""
        host = self.network.producer
        return host.inside(lambda: self.apps.listen(host.address(self.family)))

    def established(self, server: socket.socket, address: str) -> tuple[socket.socket, socket.socket]:
        """A connection over which a byte has gone each way: the consumer's and the producer's end."""
        consumer = self.network.consumer.inside(lambda: self.apps.dial(split(address)))
        consumer.sendall(b"?")
        (producer,) = eventually(lambda: self._asked(server))
        producer.sendall(b"!")
        assert receive_exactly(consumer, 1) == b"!"
        return consumer, producer

    def _asked(self, server: socket.socket) -> list[socket.socket]:
        """The connection to the server over which a byte has come, if there is one by now.

        Others wait there for their first one: probes have made them, some of streams that ended unused.
        """
        readable = select.select([server, *self._unused], [], [], 0.1)[0]
        if server in readable:
            self._unused.append(self.apps.accept(server))
        for one in readable:
            if one is not server:
                self._unused.remove(one)
                if one.recv(1):
                    return [one]
        return []

    def relays(self) -> dict[str, int]:
        """How many relays run on each gateway; those without any are left out."""
        counts = {name: len(node.relays()) for name, node in self.nodes.items()}
        return {name: count for name, count in counts.items() if count}

    def audit(self, side: Side, event: str) -> list[dict[str, Any]]:
        """The lines of a facility's audit log about one kind of event."""
        log = load_facility(f"site-{side}").state_dir / "audit.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def wait_bare(self, within_s: float = 8) -> None:
        """Returns when nothing is left on any gateway."""

        def bare() -> bool:
            left = {name: found for name, node in self.nodes.items() if (found := node.left())}
            assert not left, f"left on gateways: {left}"
            return True

        eventually(bare, within_s)

    def close(self) -> None:
        """Ends the services of this process; streams live on."""
        for facility in self._facilities:
            facility.close()
        self._facilities.clear()
        kinds = (paramiko.Transport, threading.Timer)
        eventually(lambda: not [one for one in threading.enumerate() if isinstance(one, kinds)], within_s=5)


@contextlib.contextmanager
def both_facilities(
    network: Network, account_of: Callable[[str], Account], *, home: Path, configuration: Path, family: Family
) -> Iterator[Services]:
    """The services, with the calling thread on the control host; after the block nothing is left on any gateway."""
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    make_key(home / ".ssh" / "id_ed25519")
    authorized = (home / ".ssh" / "id_ed25519.pub").read_text()
    nodes: dict[str, Node] = {}
    apps = Applications()
    try:
        for host in network.hosts:
            if host.name.startswith("gateway-"):
                leg = network.leg(host.name.replace("gateway", "control"))
                account = account_of(host.name)
                account.clean(copies=False)
                address = host.address(family, leg.name)
                server = Server(account, authorized, address=address, inside=host.inside)
                nodes[host.name] = Node(host, leg, account, server)
                server.start()
        (home / ".ssh" / "known_hosts").write_text("".join(node.server.host_key for node in nodes.values()))
        services = Services(network, apps, nodes, home, configuration, family)
        services.configure("a")
        services.configure("b")
        with network.control.here():
            try:
                yield services
            finally:
                services.close()
        network.restore()
        apps.close()
        services.wait_bare()
    finally:
        apps.close()
        for node in nodes.values():
            node.server.kill()
            for pid in node.account.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
