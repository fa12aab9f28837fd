"""The two facilities of a test: a gateway with real relays on each side of the WAN, an application behind each."""

import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay.apps import Address, Applications
from relay.gateway import Document, Gateway, Pair, Relay, join

from .topology import Family, Host, Network


@dataclass
class Site(Gateway):
    """A gateway whose relays live on a host of the test network. Control sockets are files: any host reaches them."""

    host: Host = field(kw_only=True)

    def call(
        self, *arguments: str, text: str | None = None, directory: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        if arguments[0] != "start":
            return super().call(*arguments, text=text, directory=directory)
        command = [str(self.binary), *arguments, "--runtime-dir", str(directory or self.directory)]
        return subprocess.run(
            self.host.command(*command), input=text or "", capture_output=True, text=True, timeout=60
        )


@dataclass
class Facilities:
    """Producer's side A, consumer's side B."""

    network: Network
    a: Site
    b: Site
    apps: Applications

    def listen(self, family: Family = "IPv4") -> socket.socket:
        """The producer's application, on its host."""
        host = self.network.producer
        return host.inside(lambda: self.apps.listen(host.address(family)))

    def connect(self, pair: Pair) -> socket.socket:
        """The consumer's application connects to its gateway, from its host."""
        return self.network.consumer.inside(lambda: self.apps.connect(pair.cons))

    def established(self, server: socket.socket, pair: Pair) -> tuple[socket.socket, socket.socket]:
        """A connection over which a byte has gone each way: the consumer's and the producer's end."""
        return self.network.consumer.inside(lambda: self.apps.established(server, pair.cons))

    def prod(self, mode: str, target: Address, family: Family = "IPv4", **changes: object) -> Relay:
        """The producer's relay, on the way to this target."""
        settings = {
            "listen": {"address": self.network.gateway_a.address(family, "wan")},
            "sources": [],
            "targets": [join(target)],
            **changes,
        }
        return self.a.start(self.a.config("PROD", mode, **settings))

    def cons(
        self,
        prod: Relay,
        family: Family = "IPv4",
        *,
        listeners: Sequence[Document] | None = None,
        **changes: Any,
    ) -> Pair:
        """The consumer's relay, introduced to the producer's, which it believes to listen at `listeners`."""
        settings = {
            "listen": {"address": self.network.gateway_b.address(family, "lan-b")},
            "sources": [self.network.consumer.address(family)],
            "peers": [self.a.peer_of(prod, listeners)],
            **changes,
        }
        cons = self.b.start(self.b.config("CONS", str(prod.config["mode"]), **settings))
        self.a.introduce(prod, cons, [self.network.gateway_b.address(family, "wan")])
        return Pair(prod, cons)

    def pair(self, mode: str, target: Address, family: Family = "IPv4", **changes: Any) -> Pair:
        """Both relays, READY; `changes` apply to both."""
        pair = self.cons(self.prod(mode, target, family, **changes), family, **changes)
        pair.wait_ready()
        return pair


def last_probe(pair: Pair) -> dict[str, Any]:
    """What CONS said of its last probe; empty before there was one."""
    probe: dict[str, Any] | None = pair.cons.status()["last_probe"]
    return probe or {}
